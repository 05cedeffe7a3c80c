# SPDX-License-Identifier: Apache-2.0
"""`python start.py doctor`: machine, drivers, packages and what is missing, as plain text for a bug report.

Works with no environment, no torch, and one that cannot be imported: what needs torch is asked of the environment's
Python (environment_facts.py), in a process of its own. Shows neither the user's name and home folder nor tokens.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from library.machine import INSTALL_TORCH, Machine, main_memory, nvidia_line, private
from tools.setup.environment import ROOT, Environment

MISSING = "missing"  # name of a fact that the user has to fix
SETUP = "python start.py setup"
SECONDS_TO_ANSWER = 300  # of a torch that was never loaded before, from a slow disk
LEAST_DISK = 10  # GB: a model, its caches and what is saved
VARIABLES = (  # of the environment; they change a run and hold no secrets
    "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS",
    "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "HF_HUB_OFFLINE", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR",
)  # fmt: skip


@dataclass
class DoctorReport:
    """Facts in order, and problems with the command that fixes each."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def add(self, name: str, value: str) -> None:
        if name == MISSING:
            self.missing.append(value)
        else:
            self.facts.append((name, value))

    def text(self) -> str:
        """A table of two columns, then what is missing."""
        width = max(len(name) for name, _ in self.facts)
        lines = [f"{name:{width}}  {value}" for name, value in self.facts]
        lines += ["", "Missing:" if self.missing else "Nothing is missing."]
        return "\n".join(private(line) for line in [*lines, *(f"- {line}" for line in self.missing)])


def doctor(environment: Environment) -> DoctorReport:
    """Collect all facts."""
    report = DoctorReport()
    machine = Machine.here()
    for name, value in (*project(), *system(machine), *cards(machine), *variables()):
        report.add(name, value)
    python = environment.python if environment.python.exists() else Path(sys.executable)
    if not environment.python.exists() and importlib.util.find_spec("torch") is None:
        report.add("environment", "there is no .venv")
        report.add(MISSING, f"the environment: {SETUP}")
        return report
    for name, value in environment_facts(python):
        report.add(name, value)
    return report


# ---- facts that need no environment ---------------------------------------------------------------------------------


def project() -> Iterator[tuple[str, str]]:
    """Version, and the revision where git is there."""
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    revision = ""
    if git := shutil.which("git"):
        command = [git, "-C", str(ROOT), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True)
        revision = f", revision {done.stdout.strip()}" if done.returncode == 0 else ""
    yield "Trainyard", f"{version[1] if version else '?'}{revision}"
    yield "date", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def system(machine: Machine) -> Iterator[tuple[str, str]]:
    yield "system", f"{machine.system.title}, {_system_name()}"
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()}), which runs this"
    yield "processor", f"{_processor()}, {os.cpu_count()} cores"
    if memory := main_memory(machine.system):
        free = f", {memory.free / 2**30:.1f} GB free" if memory.free is not None else ""
        yield "memory", f"{memory.total / 2**30:.1f} GB{free}"
    yield from _disks()


def _system_name() -> str:
    """Name and release of the system: Ubuntu 24.04.1 LTS (Linux 6.8.0-45-generic), macOS 15.1, Windows 11."""
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    kernel = f"{platform.system()} {platform.release()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']} ({kernel})"
    except (OSError, KeyError):
        return f"{kernel} {platform.version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _disks() -> Iterator[tuple[str, str]]:
    """Free space of the project's disk, and of that on which models are kept that come from the hub."""
    hub = Path(os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"))
    seen: set[int] = set()
    for name, wanted in (("disk", ROOT), ("disk of the hub's cache", hub)):
        # os.path.exists: a folder that may not be looked into is one that is not there
        folder = next((place for place in (wanted, *wanted.absolute().parents) if os.path.exists(place)), None)
        if folder is None:  # a drive of Windows that is not there
            yield name, f"not known: {wanted} is not there"
            continue
        if folder.stat().st_dev in seen:
            continue
        seen.add(folder.stat().st_dev)
        found = shutil.disk_usage(folder)
        free = f"{found.free / 2**30:.1f}"
        yield name, f"{found.total / 2**30:.1f} GB, {free} GB free"
        if found.free < LEAST_DISK * 2**30:
            yield (
                MISSING,
                f"disk space: {free} GB are free at {folder}; a model and its caches need {LEAST_DISK} GB or more",
            )


def cards(machine: Machine) -> Iterator[tuple[str, str]]:
    """What the drivers say; what torch makes of it comes from the environment."""
    nvidia = machine.nvidia
    if nvidia and nvidia.problem:
        yield "NVIDIA", nvidia.problem
        yield MISSING, f"NVIDIA's driver, in working order: install it or restart the machine, then {INSTALL_TORCH}"
    for card in nvidia.cards if nvidia else ():
        yield "card", nvidia_line(card, nvidia.driver if nvidia else "")
    for amd in machine.amd:
        yield "card", f"{amd.name or 'AMD GPU'} ({amd.target})"
    for name in machine.intel:
        yield "card", name
    if machine.apple_gpu:
        yield "card", "Apple GPU (mps)"
    if not (nvidia or machine.amd or machine.intel or machine.apple_gpu):
        yield "card", "none was found"


def variables() -> Iterator[tuple[str, str]]:
    for name in VARIABLES:
        if name in os.environ:
            yield name, os.environ[name] or '""'


# ---- facts from the environment -------------------------------------------------------------------------------------


def environment_facts(python: Path) -> Iterator[tuple[str, str]]:
    """What environment_facts.py prints; of one that ends early, all that it had said."""
    script = Path(__file__).with_name("environment_facts.py")
    try:
        done = subprocess.run(
            [str(python), str(script)], capture_output=True, text=True, errors="replace", timeout=SECONDS_TO_ANSWER
        )
        text, ending = done.stdout, f"ended with code {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        ending = f"did not answer within {SECONDS_TO_ANSWER} s"
    except OSError as error:
        text, ending = "", f"did not start: {error.strerror or error}"
    for line in text.splitlines():
        try:
            name, value = json.loads(line)
        except (ValueError, TypeError):  # what a library printed
            continue
        yield name, value
    if ending:
        yield "environment", f"its Python {ending}"
        yield MISSING, f"an environment that works (its Python {ending}): delete .venv, then {SETUP}"
