#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Set up and try Trainyard with nothing but Python 3.10 or newer.

    python start.py demo     make the environment (.venv), train a LoRA on the built-in model, show before and after
    python start.py test     make the environment and run the tests
    python start.py setup    make the environment only

Linux, macOS and Windows; standard library only. Arguments after the word are passed on (to the training or to pytest).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
DEMO_CONFIG = "configs/demo.toml"
DEMO_OUTPUT = ROOT / "output" / "demo"


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


def demo(arguments: list[str]) -> None:
    """Train a LoRA of a rocket on the built-in base model and say where everything is."""
    started = time.monotonic()
    # so small a model is slower, not faster, with many threads
    os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
    run([str(environment_python()), "train_network.py", "--config_file", DEMO_CONFIG, *arguments])
    print(f"\nDone in {time.monotonic() - started:.0f} s. The base model had never seen a rocket; now it draws one.")
    print(f"  LoRA file       {DEMO_OUTPUT / 'rocket.safetensors'}")
    print(f"  before / after  {DEMO_OUTPUT / 'sample' / 'rocket_before_after.png'}")
    print(f"  training curves {ENVIRONMENT.name}: tensorboard --logdir {DEMO_OUTPUT / 'logs'}")
    print("Next, with your own pictures and checkpoint (see README.md and configs/sd_lora.toml):")
    activate = r".venv\Scripts\activate" if os.name == "nt" else "source .venv/bin/activate"
    print(f"  {activate}")
    print("  accelerate launch train_network.py --config_file configs/sd_lora.toml \\")
    print("      --pretrained_model_name_or_path model.safetensors --train_data_dir pictures --output_dir output")


def test(arguments: list[str]) -> None:
    """The whole test run, as CI does it: style, types, tests."""
    python = str(environment_python())
    run([python, "-m", "ruff", "check", "."])
    run([python, "-m", "ruff", "format", "--check", "."])
    run([python, "-m", "mypy"])
    run([python, "-m", "pytest", "-n", "2", "--dist", "loadfile", *arguments])


def main() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 - this script is what an older Python runs first
        sys.exit(f"Trainyard needs Python 3.10 or newer; this is {sys.version.split()[0]}")
    words = {"demo": "requirements.txt", "test": "requirements-test.txt", "setup": "requirements.txt"}
    if len(sys.argv) < 2 or sys.argv[1] not in words:
        sys.exit((__doc__ or "").strip())
    word, rest = sys.argv[1], sys.argv[2:]
    make_environment(words[word])
    if word == "demo":
        demo(rest)
    elif word == "test":
        test(rest)


if __name__ == "__main__":
    main()
