# SPDX-License-Identifier: Apache-2.0
"""The commands of `python start.py`: one function each, called with the arguments after the command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

from library.errors import UserError
from tools.setup.doctor import doctor as examine
from tools.setup.environment import ROOT, RUN, TEST, Environment, set_up

DEMO_CONFIG = "configs/demo.toml"
DEMO_OUTPUT = ROOT / "output" / "demo"
SIMULATED_CARD = ROOT / "tests" / "cuda_simulation" / "plugin.py"


def setup(arguments: list[str]) -> None:
    """Make the environment only. Checks torch even when nothing has changed: this command repairs it."""
    asked, rest = take_torch_option(arguments)
    if rest:
        raise UserError(f"setup takes only --torch, not {rest[0]}")
    set_up(Environment(), RUN, asked, try_torch=True)


def demo(arguments: list[str]) -> None:
    """Train a LoRA of a rocket on the built-in base model and say where everything is."""
    environment, rest = prepare(arguments, RUN)
    started = time.monotonic()
    # many threads slow down such a small model
    os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))
    run([str(environment.python), "train_network.py", "--config_file", DEMO_CONFIG, *rest])
    if rest:  # --help, another folder, other steps: what follows need not hold
        return
    print(f"\nDone in {time.monotonic() - started:.0f} s. The base model had never seen a rocket; now it draws one.")
    print(f"  LoRA file       {DEMO_OUTPUT / 'rocket.safetensors'}")
    print(f"  before / after  {DEMO_OUTPUT / 'sample' / 'rocket_before_after.png'}")
    print(f"  training curves {environment.folder.name}: tensorboard --logdir {DEMO_OUTPUT / 'logs'}")
    print("Next, with your own pictures and checkpoint (step by step: docs/first_lora.md):")
    activate, more = (r".venv\Scripts\Activate.ps1", "`") if os.name == "nt" else ("source .venv/bin/activate", "\\")
    print(f"  {activate}")
    print(f"  accelerate launch train_network.py --config_file configs/sd_lora.toml {more}")
    print("      --pretrained_model_name_or_path model.safetensors --train_data_dir pictures --output_dir output")


def test(arguments: list[str]) -> None:
    """Run what CI runs: style, types, tests, and tests on a simulated card (left out when arguments are given)."""
    environment, rest = prepare(arguments, TEST)
    python = str(environment.python)
    run([python, "-m", "ruff", "check", "."])
    run([python, "-m", "ruff", "format", "--check", "."])
    run([python, "-m", "mypy"])
    # in the order of the files: else those with few tests come last, and some of these take longest
    pytest = [python, "-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    run([*pytest, *rest])
    if not rest and SIMULATED_CARD.exists():
        # loaded before torch is: a process either has the simulated card or not
        run([*pytest, "-p", "tests.cuda_simulation.plugin", "tests/on_card"])


def doctor(arguments: list[str]) -> None:
    """Print what a bug report needs. Installs nothing."""
    if arguments:
        raise UserError(f"doctor takes no arguments, not {arguments[0]}")
    print(examine(Environment()).text())


def gpu(arguments: list[str]) -> None:
    """Tests and benchmarks on this machine's card; ends with the suite's exit code."""
    environment, rest = prepare(arguments, TEST)
    run([str(environment.python), "benchmarks/gpu/suite.py", *rest])


def prepare(arguments: list[str], lock: str) -> tuple[Environment, list[str]]:
    """Update the environment. Returns it and the arguments other than --torch."""
    asked, rest = take_torch_option(arguments)
    environment = Environment()
    set_up(environment, lock, asked)
    return environment, rest


def take_torch_option(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of --torch, None if it is not given, and the other arguments."""
    asked, rest = None, []
    words = iter(arguments)
    for word in words:
        if word == "--torch":
            asked = next(words, "")
        elif word.startswith("--torch="):
            asked = word.partition("=")[2]
        else:
            rest.append(word)
    if asked == "":
        raise UserError("--torch needs a value, for example --torch cpu")
    return asked, rest


def run(command: list[str]) -> None:
    """Run a command in the project's folder; when it fails, end with its exit code.

    Ctrl-C reaches the command as well, which ends in good order: subprocess.call would kill it after 0.25 s.
    """
    process = subprocess.Popen(command, cwd=ROOT)
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            continue
    if code:
        sys.exit(code if code > 0 else 128 - code)


WORDS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo, "test": test, "setup": setup, "doctor": doctor, "gpu": gpu,
}  # fmt: skip
