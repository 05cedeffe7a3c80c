# SPDX-License-Identifier: Apache-2.0
"""Facts about the Python that runs this file, one JSON pair (name, value) per line: packages, torch, what it can do.

`doctor.py` runs it inside .venv. Each line is printed as soon as it is known: a library that ends the process takes
only what comes after it.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from library.machine import INSTALL_TORCH  # noqa: E402
from tools.setup.doctor import MISSING, SETUP  # noqa: E402

Facts = Iterator[tuple[str, str]]
OTHERS = (
    "peft", "lycoris-lora", "dadaptation", "wandb", "sentencepiece", "deepspeed", "triton", "triton-windows",
)  # fmt: skip
COMPILERS = {"Linux": "sudo apt install g++", "Darwin": "xcode-select --install"}
WINDOWS_COMPILER = "winget install Microsoft.VisualStudio.2022.BuildTools"


def packages() -> Facts:
    """Versions of what requirements.txt names, and of what may be there besides."""
    yield "environment", f"Python {platform.python_version()} {'in .venv' if in_environment() else 'of your own'}"
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    named = {found[0]: line for line in lines if (found := re.match(r"[A-Za-z][\w.-]*", line)) and applies(line)}
    versions = {name: version_of(name) for name in (*named, *OTHERS)}
    for name, version in versions.items():
        if version and name != "torch":
            yield name, version
    absent = [name for name in named if not versions[name]]
    if absent:
        yield MISSING, f"{', '.join(absent)}: delete the folder .venv, then {SETUP}"


def in_environment() -> bool:
    return Path(sys.prefix).resolve() == (ROOT / ".venv").resolve()


def applies(line: str) -> bool:
    """Whether a line of requirements.txt is for this Python and system: `python_version < "3.11"` and the like."""
    marker = re.search(r';\s*(python_version|sys_platform)\s*(>=|<|!=)\s*"(.+)"', line)
    if marker is None:
        return True
    if marker[1] == "sys_platform":
        return sys.platform != marker[3]
    newer = sys.version_info[:2] >= tuple(map(int, marker[3].split(".")))
    return newer == (marker[2] == ">=")


def version_of(package: str) -> str:
    """The installed version, "" where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def torch_build() -> Facts:
    if not version_of("torch"):
        return
    from library import device_report

    yield "torch", device_report.torch_build()


def devices() -> Facts:
    """Each device that torch sees, with its abilities, whether it computes, and its free memory."""
    import torch

    from library.device_report import abilities, unused_card
    from tools.setup.torch_check import computes

    kind = kind_of_device()
    count = torch.cuda.device_count() if kind == "cuda" else 1
    for index in range(count):
        device = torch.device(kind) if kind == "cpu" else torch.device(kind, index)
        free = f", {torch.cuda.mem_get_info(device)[0] / 2**30:.1f} GB free" if kind == "cuda" else ""
        yield "torch runs on", f"{device}: {abilities(device)}{free}"
        if not computes(str(device)):
            yield MISSING, f"a torch that computes on {device} (it only lists it): {INSTALL_TORCH}"
    if card := unused_card():
        yield MISSING, f"a torch that uses the card: {card}"


def kind_of_device() -> str:
    import torch

    from library.device import accelerator_present

    if not accelerator_present():
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "xpu"


def compiling() -> Facts:
    """Whether --compile has what it needs."""
    import torch

    from library.memory.compiling import missing_compiler

    absent = missing_compiler("inductor", torch.device(kind_of_device()))
    yield "--compile", f"no, {absent} is missing" if absent else "yes"
    if absent == "Triton":
        windows = f"{sys.executable} -m pip install triton-windows"
        yield MISSING, f"Triton, for --compile: {windows if platform.system() == 'Windows' else INSTALL_TORCH}"
    elif absent:
        yield MISSING, f"{absent}, for --compile: {COMPILERS.get(platform.system(), WINDOWS_COMPILER)}"


def main() -> None:
    """All sections; one that fails says so in its place."""
    sections = {"packages": packages, "torch": torch_build, "torch runs on": devices, "--compile": compiling}
    for title, section in sections.items():
        try:
            for fact in section():
                print(json.dumps(fact), flush=True)
        except Exception as error:  # whatever a library raises is a fact, too
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            print(json.dumps((title, f"not known: {said}")), flush=True)
            if title == "torch":
                print(json.dumps((MISSING, f"a torch that can be imported: {INSTALL_TORCH}")), flush=True)
                return


if __name__ == "__main__":
    main()
