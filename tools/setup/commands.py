# SPDX-License-Identifier: Apache-2.0
"""The words of `python start.py`: one function each, which takes the arguments after the word."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from tools.setup.environment import ENVIRONMENT, ROOT, environment_python, make_environment, run

DEMO_CONFIG = "configs/demo.toml"
DEMO_OUTPUT = ROOT / "output" / "demo"


def setup(arguments: list[str]) -> None:
    """The environment only."""
    make_environment("requirements.txt")


def demo(arguments: list[str]) -> None:
    """Train a LoRA of a rocket on the built-in base model and say where everything is."""
    make_environment("requirements.txt")
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
    make_environment("requirements-test.txt")
    python = str(environment_python())
    run([python, "-m", "ruff", "check", "."])
    run([python, "-m", "ruff", "format", "--check", "."])
    run([python, "-m", "mypy"])
    run([python, "-m", "pytest", "-n", "2", "--dist", "loadfile", *arguments])


WORDS: dict[str, Callable[[list[str]], None]] = {"demo": demo, "test": test, "setup": setup}
