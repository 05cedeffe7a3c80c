# SPDX-License-Identifier: Apache-2.0
"""Real processes that train: forked from a server that has imported torch and the rest, so that each starts at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

# What the first run of a process imports late: here, so that the server has it.
import diffusers.models.unets.unet_2d_condition  # noqa: F401
import torch
import transformers.models.clip.modeling_clip  # noqa: F401
from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

from library.cli import run as run_script
from tests.trainers.helpers import argv, make_trainer, settle

CONTEXT = multiprocessing.get_context("forkserver")


def start(target: Callable[..., None], *args: Any) -> ForkServerProcess:
    """A process that runs `target`."""
    CONTEXT.set_forkserver_preload([__name__])
    process = CONTEXT.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def script(values: Mapping[str, Any], output: Path, method: str = "network", family: str = "sd") -> None:
    """A training script with these options, train_network.py by default; what it prints goes to a file."""
    torch.set_num_threads(1)
    settle()
    redirect(output)
    sys.argv[0] = "script.py"
    run_script(method, family, argv(values))


def rank_of_two(rank: int, port: int, values: Mapping[str, Any], interrupt_in: int | None, result: Path) -> None:
    """One of two processes as torchrun starts them; its weights go to `result`, and its exit code is the script's."""
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    settle()
    redirect(result.with_suffix(".log"))
    trainer = make_trainer(values)
    trainer.interrupt_in = interrupt_in
    code = trainer.run()
    facts = {"step": str(trainer.position.step), "written": " ".join(path.name for path in trainer.saver.written)}
    save_file(trainer.network.state(None), result, facts)
    sys.exit(code)


def redirect(output: Path) -> None:
    """Everything that this process prints goes to a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)


def wait_until(true: Callable[[], bool], process: ForkServerProcess, output: Path, *, seconds: float = 120) -> None:
    """Poll; an AssertionError with the process's output when it ends first, or when it takes too long."""
    end = time.monotonic() + seconds
    while not true():
        ended = not process.is_alive() and not true()
        assert not ended and time.monotonic() < end, output.read_text(encoding="utf-8")[-3000:]
        time.sleep(0.002)


def exit_code(process: ForkServerProcess, *, seconds: float = 120) -> int | None:
    """How it ended: minus the number of the signal that killed it, None when it did not end."""
    process.join(seconds)
    return process.exitcode


def tell(process: ForkServerProcess, number: signal.Signals) -> None:
    """Send a signal to that process alone."""
    assert process.pid is not None
    os.kill(process.pid, number)


def states(folder: Path) -> Sequence[Path]:
    """Whole states below a folder, oldest first."""
    return sorted(path for path in folder.glob("[!.]*-state") if (path / "manifest.json").is_file())
