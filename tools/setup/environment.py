# SPDX-License-Identifier: Apache-2.0
"""The project's environment, .venv, with the packages of the lock files and a torch that fits the machine."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import asdict, dataclass, field
from pathlib import Path

from library.errors import UserError
from library.machine import Machine
from tools.setup.torch_choice import AUTO, KEEP, TORCH, TorchChoice, choose_torch, fallback_arguments

ROOT = Path(__file__).resolve().parents[2]
RUN, TEST = "requirements.lock", "requirements-test.lock"
SECONDS_TO_IMPORT = 300  # of a torch that was never loaded before, from a slow disk


@dataclass
class Record:
    """Record of what was installed, stored in the environment so that a second call does nothing."""

    locks: dict[str, str] = field(default_factory=dict)  # lock file -> hash of its content
    torch_asked: str = AUTO  # the last --torch: it stays until another is given
    torch_chosen: str = ""  # build; "" when it is not there or cannot use the machine's GPU, and is to be tried again


@dataclass(frozen=True)
class Torch:
    """The torch installed in an environment."""

    version: str
    build: str
    devices: tuple[str, ...]  # on which it computes


class Environment:
    """A virtual environment in `<root>/.venv`."""

    def __init__(self, root: Path = ROOT):
        self.root = root
        self.folder = root / ".venv"

    @property
    def python(self) -> Path:
        """The environment's Python, where Windows and the others keep it."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def make(self) -> bool:
        """Create it with pip in it, unless it is there. True when it is new, and so empty."""
        if self.python.exists():
            return False
        if importlib.util.find_spec("ensurepip") is None:
            version = f"{sys.version_info[0]}.{sys.version_info[1]}"
            raise UserError(
                f"this Python cannot make environments; on Debian and Ubuntu: apt install python{version}-venv"
            )
        print(f"making the environment in {self.folder} ...", flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        whole = False
        try:
            venv.create(self.folder, with_pip=True)
            whole = True
        except (OSError, ValueError, subprocess.CalledProcessError) as error:  # ValueError: .venv is a file
            raise UserError(f"{self.folder} cannot be made: {getattr(error, 'strerror', None) or error}") from None
        finally:
            if not whole:  # one with a Python and no pip would be taken for a whole one
                shutil.rmtree(self.folder, ignore_errors=True)
        return True

    def pip(self, *arguments: str) -> int:
        """Run the environment's pip; its exit code."""
        quiet = [] if sys.stdout.isatty() else ["--quiet"]
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *quiet, *arguments]
        try:
            return subprocess.call(command)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self.python} does not start: {reason}: delete {self.folder}, then try again") from None

    def torch(self) -> Torch | None:
        """The installed torch, None if it is missing or cannot be imported."""
        if not self.python.exists():
            return None
        command = [str(self.python), "-I", str(Path(__file__).with_name("torch_check.py"))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS_TO_IMPORT)
            found = json.loads(done.stdout.splitlines()[-1])
        except (OSError, subprocess.TimeoutExpired, IndexError, json.JSONDecodeError):
            return None
        return Torch(found["version"], found["build"], tuple(found["devices"]))

    def torch_error(self) -> str:
        """The last line that `import torch` prints when it fails."""
        command = [str(self.python), "-I", "-c", "import torch"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        return (done.stderr.strip().splitlines() or ["it does not compute"])[-1]

    def holds_torch(self) -> bool:
        """Whether torch is installed, even if it cannot be imported."""
        places = ("lib/python*/site-packages", "Lib/site-packages")
        return any(True for place in places for _ in self.folder.glob(f"{place}/torch-*.dist-info"))

    def read_record(self) -> Record:
        """What was installed; an empty record when it cannot be read."""
        try:
            return Record(**json.loads(self._record_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return Record()

    def write_record(self, record: Record) -> None:
        self._record_file.write_text(json.dumps(asdict(record)), encoding="utf-8")

    @property
    def _record_file(self) -> Path:
        return self.folder / "installed.json"


def set_up(
    environment: Environment,
    lock: str,
    asked: str | None = None,
    machine: Machine | None = None,
    try_torch: bool = False,
) -> None:
    """Make the environment hold what `lock` names and the torch that fits; a second call does nothing.

    asked: the value of --torch, None when it was not given. try_torch: do not rely on what was installed, try it.
    """
    machine = machine or Machine.here()
    record = environment.read_record()
    asked = asked or record.torch_asked
    choice = choose_torch(machine, asked)
    chosen = KEEP if asked == KEEP else choice.build.name
    torch_is_right = not try_torch and (record.torch_asked, record.torch_chosen) == (asked, chosen)
    there = None if torch_is_right else environment.torch()
    if asked == KEEP and not torch_is_right and there is None:
        raise UserError(f"--torch keep: there is no torch that works in {environment.folder}; leave the option out")
    if environment.make():  # .venv was not there, or its Python was gone: what the record says went with it
        record.locks, torch_is_right = {}, False
    install_locks(environment, lock, record)
    if torch_is_right:
        return
    record.torch_asked, record.torch_chosen = asked, ""  # until it is there: an installation may be cut short
    environment.write_record(record)
    record.torch_chosen = chosen if provide_torch(environment, choice, there, asked) else ""
    environment.write_record(record)


# ---- the locked packages --------------------------------------------------------------------------------------------


def install_locks(environment: Environment, lock: str, record: Record) -> None:
    """Install the lock files up to `lock`, each only when its content is new. The hash of every file is checked."""
    for name in (RUN, TEST)[: 1 + (lock == TEST)]:
        content = hashlib.sha256((environment.root / name).read_bytes()).hexdigest()
        if record.locks.get(name) == content:
            continue
        print(f"installing {name} (some minutes the first time) ...", flush=True)
        # a package's own code runs while it is built, with build tools of no known hash: wheels only. For the tests one
        # package has no wheel; the setuptools of the first lock file builds it.
        building = ["--only-binary", ":all:"] if name == RUN else ["--no-build-isolation"]
        path = str(environment.root / name)
        if code := environment.pip("install", "--require-hashes", "--no-deps", *building, "-r", path):
            sys.exit(code)
        record.locks[name] = content
        environment.write_record(record)


# ---- torch ----------------------------------------------------------------------------------------------------------


def provide_torch(environment: Environment, choice: TorchChoice, there: Torch | None, asked: str) -> bool:
    """Keep the torch that is there where it will do, else install the chosen one. True when it can use the device."""
    if there and (asked == KEEP or _will_do(there, choice, asked, environment.root)):
        print(f"torch: {there.version}, {there.build} build, is kept", flush=True)
    else:
        print(choice, flush=True)
        if there is None or (there.version, there.build) != (TORCH, choice.build.name):
            _install(environment, choice, there)
        there = environment.torch()
    if there is None:
        raise UserError(
            f"torch was installed into {environment.folder}, but cannot be used: {environment.torch_error()}"
        )
    usable = asked == KEEP or choice.build.device in there.devices
    if not usable:
        todo = choice.advice or _what_to_do(choice, there)
        print(f"WARNING: torch {there.version} ({there.build}) cannot use {choice.card or choice.build.title}: {todo}")
    elif choice.advice and choice.build.name == "cpu":
        print(f"WARNING: {choice.advice}")
    return usable


def _will_do(there: Torch, choice: TorchChoice, asked: str, root: Path) -> bool:
    """True when the torch that is there need not be replaced."""
    if asked != AUTO:
        return (there.version, there.build) == (TORCH, choice.build.name)
    return choice.build.device in there.devices and in_range(there.version, root)


def in_range(version: str, root: Path = ROOT) -> bool:
    """True when pyproject.toml allows this version of torch."""
    found = re.search(r'"torch>=(\d+)\.(\d+),<(\d+)"', (root / "pyproject.toml").read_text(encoding="utf-8"))
    assert found, "pyproject.toml names a range of torch"
    lowest, above = (int(found[1]), int(found[2])), int(found[3])
    major, minor = (int(part) for part in version.split(".")[:2])
    return lowest <= (major, minor) and major < above


def _install(environment: Environment, choice: TorchChoice, there: Torch | None) -> None:
    """Install the chosen build; where pytorch.org's index does not give it, that release from the configured index."""
    plain = fallback_arguments()
    if choice.pip_arguments == plain or index_answers(environment, choice):
        if environment.holds_torch():  # pip takes `torch==2.13.0` for satisfied by another build of it, or a broken one
            environment.pip("uninstall", "--yes", "torch")
        print("installing torch (up to 3 GB) ...", flush=True)
        code = environment.pip("install", *choice.pip_arguments)
        if code and choice.pip_arguments == plain:
            sys.exit(code)
        if not code:
            return
        there = None
    print(f"torch: {choice.index} did not give this build: the configured index's torch {TORCH} instead", flush=True)
    if there and there.version == TORCH:
        return
    if code := environment.pip("install", *plain):
        sys.exit(code)


def index_answers(environment: Environment, choice: TorchChoice) -> bool:
    """True when the index offers the build for this Python: asked quickly, before anything large is fetched."""
    command = [str(environment.python), "-m", "pip", "--disable-pip-version-check", "index", "versions", "torch"]
    command += ["--index-url", choice.index, "--retries", "0", "--timeout", "10"]
    # this index alone: pip's configuration may name more places
    only = {**os.environ, "PIP_EXTRA_INDEX_URL": choice.index, "PIP_FIND_LINKS": str(environment.folder)}
    done = subprocess.run(command, env=only, capture_output=True, text=True, errors="replace")
    return done.returncode == 0 and f"{TORCH}+{choice.build.name}" in done.stdout


def _what_to_do(choice: TorchChoice, there: Torch) -> str:
    """Advice for a GPU that torch does not see although no problem was found before."""
    if there.build != choice.build.name:
        return f"run `python start.py setup` again when {choice.index} can be reached"
    if choice.build.name.startswith("rocm"):
        return "see that your user is in the groups render and video, then log in again"
    if choice.build.name == "xpu":
        return "install Intel's GPU driver, then run `python start.py setup` again"
    return "restart the machine if its driver was just updated; `nvidia-smi` must list the card"
