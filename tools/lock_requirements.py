#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Lock all requirements, including transitive ones, with hashes for every supported Python version and system.

    python tools/lock_requirements.py              write requirements.lock and requirements-test.lock from the pins
    python tools/lock_requirements.py --upgrade    the same, with the newest version of everything that is not pinned
    python tools/lock_requirements.py --check      check that every Python on every system can install the locks

Requires uv (pip install uv). torch is left out, together with the CUDA libraries and compilers that its builds need:
these depend on the machine, and `python start.py` installs the right build (tools/setup/torch_choice.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SYSTEMS = {  # name -> uv's name
    "Linux x86_64": "x86_64-manylinux_2_28",
    "Linux arm64": "aarch64-manylinux_2_28",
    "Windows x86_64": "x86_64-pc-windows-msvc",
    "macOS arm64": "aarch64-apple-darwin",
}
LOCKS = {"requirements.lock": "requirements.txt", "requirements-test.lock": "requirements-test.txt"}
MACOS_OF_TORCH = "14.0"  # oldest macOS for torch's wheels; uv's default is 13
OF_TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")


def uv(*arguments: str) -> str:
    """Output of `uv pip compile`. Exits with uv's message when it fails."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--no-python-downloads", "--no-annotate", "--no-header"]
    here = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": MACOS_OF_TORCH}
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=here, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"uv pip compile {' '.join(arguments)}:\n{done.stderr.strip()}")
    return done.stdout


def names(lines: str) -> set[str]:
    """The requirements in a file's text as `name==version`, without markers and hashes."""
    return set(re.findall(r"^([\w.\-]+==[\w.\-+!]+)", lines, re.MULTILINE))


def without_torch(pins: set[str]) -> set[str]:
    """The pins without torch and the packages that its builds need."""
    return {pin for pin in pins if not OF_TORCH.fullmatch(pin.partition("==")[0])}


def lock(upgrade: bool) -> None:
    """Write the lock files. The second is constrained by the first, so that both install the same versions."""
    for name, source in LOCKS.items():
        held = ["-c", "requirements.lock"] if name != "requirements.lock" else []
        universal = [source, *held, "--universal", "--python-version", PYTHONS[0]]
        universal += ["--upgrade"] if upgrade else []
        with tempfile.TemporaryDirectory() as folder:
            # uv prefers the versions in its output file, so it gets a copy: the lock is written only when all succeeds
            copy = Path(folder) / name
            if (ROOT / name).exists():
                shutil.copy(ROOT / name, copy)
            universal += ["--output-file", str(copy)]
            pins = names(uv(*universal))
            left_out = sorted({pin.partition("==")[0] for pin in pins - without_torch(pins)})
            options = [word for package in left_out for word in ("--no-emit-package", package)]
            text = uv(*universal, *options, "--generate-hashes")
        header = f"# Made of {source} by `python tools/lock_requirements.py`. Do not edit.\n"
        (ROOT / name).write_text(header + text, encoding="utf-8")
        print(f"{name}: {len(names(text))} packages")


def check() -> None:
    """Check for each Python and system that the locks are consistent and complete, and that wheels exist."""
    for name, source in LOCKS.items():
        for python in PYTHONS:
            for title, system in SYSTEMS.items():
                where = ["--python-version", python, "--python-platform", system]
                wheels = ["--only-binary", ":all:"] if name == "requirements.lock" else []
                resolved = without_torch(names(uv(source, "-c", name, *where, *wheels)))
                locked = names(uv(name, "--no-deps", *where))
                if resolved != locked:
                    sys.exit(f"{name} on {title}, Python {python}: {', '.join(sorted(resolved ^ locked))}")
                print(f"{name}: Python {python} on {title}: {len(locked)} packages")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="newest versions of what is not pinned")
    parser.add_argument("--check", action="store_true", help="write nothing, try every Python on every system")
    options = parser.parse_args()
    if options.check and options.upgrade:
        parser.error("--check writes nothing, so --upgrade has nothing to do beside it")
    if importlib.util.find_spec("uv") is None:
        parser.error("uv is not there: pip install uv")
    if options.check:
        check()
    else:
        lock(options.upgrade)


if __name__ == "__main__":
    main()
