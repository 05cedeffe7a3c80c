# SPDX-License-Identifier: Apache-2.0
"""Small real programs that stand in for nvidia-smi, rocminfo, PowerShell and the pip of an environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from library.machine import System
from tools.setup.environment import RUN, TEST, Environment

PIP = """
import json, pathlib, sys
home, arguments = pathlib.Path(__file__).resolve().parents[1], sys.argv[1:]
gives, torch = json.loads((home / "gives.json").read_text()), home / "lib/python3.11/site-packages/torch-2.dist-info"
answer = torch / "answer.json"
with open(home / "calls.txt", "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
if arguments[:2] != ["-m", "pip"]:  # torch_check.py
    sys.exit(print(answer.read_text()) if answer.exists() else "ImportError: libcudart.so.12: cannot open")
if "index" in arguments:
    found = [build for build in gives["index"] if arguments[arguments.index("--index-url") + 1].endswith("/" + build)]
    sys.exit(print("Available versions: 2.13.0+" + found[0]) if found else "No matching distribution found for torch")
if "uninstall" in arguments:
    answer.unlink(missing_ok=True)
    torch.rmdir()
for word in arguments:
    if word.startswith("torch=="):
        build = word.partition("+")[2] or gives["configured"]
        devices = gives["devices"].get(build, ["cpu"])
        torch.mkdir(parents=True)  # which fails when there is one
        if devices:
            answer.write_text(json.dumps({"version": "2.13.0", "build": build, "devices": devices}))
"""


def program(path: Path, code: str) -> None:
    """An executable file that runs Python code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable} -S\n{code}", encoding="utf-8")
    path.chmod(0o755)


class FakeMachine:
    """A folder that is a machine: its root, the only folder in PATH, and a project with an environment."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.root, self.tools, self.project = folder / "root", folder / "bin", folder / "project"
        self.tools.mkdir()
        patch.setenv("PATH", str(self.tools))
        patch.setenv("SYSTEMROOT", str(self.root))
        patch.setenv("PROGRAMFILES", str(self.root))

    def system(self, title: str) -> System:
        """The system as data: "Windows x86_64"."""
        name, architecture = title.split()
        return System({"macOS": "Darwin"}.get(name, name), architecture, (3, 11), self.root)

    def tool(self, name: str, output: str, code: int = 0) -> None:
        """A program in PATH that prints `output`."""
        program(self.tools / name, f"import sys\nprint({output!r})\nsys.exit({code})")

    def nvidia(self, driver: str, *cards: tuple[str, str, str], knows_capability: bool = True) -> None:
        """nvidia-smi for cards of (name, MiB, compute capability)."""
        program(
            self.tools / "nvidia-smi",
            f"""import sys
if "compute_cap" in sys.argv[1] and not {knows_capability}:
    sys.exit(print('Field "compute_cap" is not a valid field to query.') or 2)
for name, memory, capability in {cards!r}:
    print({driver!r}, name, memory, *([capability] if "compute_cap" in sys.argv[1] else []), sep=", ")
""",
        )

    def kernel_file(self, path: str, text: str) -> None:
        """A file of /sys."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text, encoding="utf-8")

    def pci(self, vendor: str, device: str, kind: str = "0x030000") -> None:
        """A device on the PCI bus, by default a display controller."""
        folder = f"sys/bus/pci/devices/0000:{len(list(self.root.rglob('vendor'))):02d}:00.0"
        for name, value in (("vendor", vendor), ("device", device), ("class", kind)):
            self.kernel_file(f"{folder}/{name}", f"{value}\n")

    def environment(self, **gives: object) -> FakeEnvironment:
        """The environment of a project with lock files. gives: what the package indexes and torch answer."""
        self.project.mkdir(exist_ok=True)
        for name in (RUN, TEST):
            (self.project / name).write_text(f"# {name}\n", encoding="utf-8")
        (self.project / "pyproject.toml").write_text('    "torch>=2.6,<3",\n', encoding="utf-8")
        return FakeEnvironment(self.project, gives)


class FakeEnvironment(Environment):
    """An environment whose Python notes how it is called and keeps a torch that can be asked for."""

    def __init__(self, root: Path, gives: dict[str, object]):
        super().__init__(root)
        program(self.python, PIP)
        known = {"index": [], "configured": "cpu", "devices": {}}
        (self.folder / "gives.json").write_text(json.dumps(known | gives), encoding="utf-8")

    def has_torch(self, version: str, build: str, *devices: str) -> None:
        """A torch that is there already, in place of another; without devices: it cannot be imported."""
        torch = self.folder / "lib/python3.11/site-packages/torch-2.dist-info"
        torch.mkdir(parents=True, exist_ok=True)
        (torch / "answer.json").unlink(missing_ok=True)
        if devices:
            answer = {"version": version, "build": build, "devices": devices}
            (torch / "answer.json").write_text(json.dumps(answer), encoding="utf-8")

    def calls(self) -> list[str]:
        """The pip commands since the last call of this method, without what all have in common."""
        file = self.folder / "calls.txt"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        file.unlink(missing_ok=True)
        common = {"-m", "pip", "--disable-pip-version-check", "--quiet"}
        return [" ".join(w for w in words if w not in common) for words in lines if words[0] == "-m"]


class RealPip(Environment):
    """An environment whose Python is the one of these tests; pip is told by variables where to install."""

    @property
    def python(self) -> Path:
        return Path(sys.executable)
