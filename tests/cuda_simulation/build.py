# SPDX-License-Identifier: Apache-2.0
"""The compiled card: built once per build of torch and source, kept in the user's cache folder.

Needs a C++ compiler, and of torch only what is installed with it: neither ninja nor Python's headers. Torch is not
imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("card.cpp")
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared")
NEW_STRINGS = b"St7__cxx1112basic_string"  # in the names of symbols that take strings of GCC's newer ABI


class CannotSimulate(Exception):
    """There is no simulated card on this machine; the text is one line that says why."""


def build() -> Path:
    """The card's library. Raises CannotSimulate where it cannot be had."""
    torch = torch_folder()
    command = compile_command(torch)
    key = "\0".join([*command, SOURCE.read_text(encoding="utf-8"), (torch / "version.py").read_text(encoding="utf-8")])
    target = cache_folder() / f"card-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        _compile(command, target)
    return target


def cache_folder() -> Path:
    """Where the libraries are kept. Call it before a test gives itself another XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "trainyard" / "cuda_simulation"


def torch_folder() -> Path:
    """The folder of a build of torch that a card can be added to."""
    if not sys.platform.startswith("linux"):
        raise CannotSimulate(f"the simulated card runs on Linux, not on {sys.platform}")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotSimulate("the simulated card needs torch, which is not installed")
    folder = Path(spec.origin).parent
    version = build_of(folder)
    if version["cuda"] or version.get("hip"):
        found = version["__version__"]
        raise CannotSimulate(f"the simulated card needs a CPU build of torch, and torch {found} is one for GPUs")
    return folder


def build_of(folder: Path) -> dict[str, Any]:
    """What torch says about its own build."""
    return runpy.run_path(str(folder / "version.py"))


def compile_command(torch: Path) -> list[str]:
    """The compiler and its arguments, without files."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise CannotSimulate("the simulated card needs a C++ compiler (c++, g++, clang++ or CXX), and there is none")
    abi = int(NEW_STRINGS in (torch / "lib" / "libc10.so").read_bytes())
    include = torch / "include"
    folders = [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    return [*compiler.split(), *FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={abi}", *folders]


def _compile(command: list[str], target: Path) -> None:
    """Compile in a folder of its own and move the result: two processes may do it at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        try:
            done = subprocess.run([*command, str(SOURCE), "-o", str(made)], capture_output=True, text=True)
        except OSError as error:
            raise CannotSimulate(f"the simulated card could not be compiled: {error}") from None
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
            raise CannotSimulate(f"the simulated card could not be compiled: {lines[0]}")
        made.replace(target)
