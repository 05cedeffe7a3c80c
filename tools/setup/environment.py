# SPDX-License-Identifier: Apache-2.0
"""The project's own environment, .venv: made, filled with the pinned requirements, left alone when it is up to date."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv"


def environment_python() -> Path:
    """The Python of the environment, where Windows and the others keep it."""
    return ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_environment(requirements: str) -> None:
    """Create .venv and install the pinned requirements; a second call with the same files does nothing."""
    wanted = hashlib.sha256(b"".join((ROOT / n).read_bytes() for n in ("requirements.txt", requirements))).hexdigest()
    stamp = ENVIRONMENT / f"{requirements}.installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    if not environment_python().exists():
        print(f"making the environment in {ENVIRONMENT} ...", flush=True)
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        venv.create(ENVIRONMENT, with_pip=True)
    print("installing the requirements (some minutes the first time) ...", flush=True)
    pip = [str(environment_python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch first: what comes after must fit the torch that is there, not pull in another build of it
    torch = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
    run([*pip, torch])
    run([*pip, "-r", requirements])
    stamp.write_text(wanted)


def run(command: list[str]) -> None:
    """Run a command in the project's folder; when it fails, end with its exit code."""
    code = subprocess.call(command, cwd=ROOT)
    if code:
        sys.exit(code)
