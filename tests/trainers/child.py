# SPDX-License-Identifier: Apache-2.0
"""Real processes that train: forked from a server that has imported torch and the rest, so that each starts at once."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

# What the first run of a process imports late: here, so that the server has it.
import diffusers.models.unets.unet_2d_condition  # noqa: F401
import torch
import transformers.models.clip.modeling_clip  # noqa: F401
from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

from library import device
from library.cli import EXIT_STOPPED
from library.cli import run as run_script
from library.io.state import StateParts
from library.io.weights_port import ReplicatedWeights
from library.trainers import stages
from tests.trainers.finetune_runs import make_finetune
from tests.trainers.helpers import argv, make_trainer, settle

CONTEXT = multiprocessing.get_context("forkserver")


def start(target: Callable[..., None], *args: Any, has_children: bool = False) -> ForkServerProcess:
    """A process that runs `target`."""
    CONTEXT.set_forkserver_preload([__name__])
    process = CONTEXT.Process(target=target, args=args, daemon=not has_children)
    process.start()
    return process


def script(values: Mapping[str, Any], output: Path, method: str = "network", family: str = "sd") -> None:
    """A training script with these options, train_network.py by default, in a process group of its own; what it prints
    goes to a file."""
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # as Linux has it: what loads pictures is in the same group
    torch.set_num_threads(1)
    settle()
    redirect(output)
    sys.argv[0] = "script.py"
    run_script(method, family, argv(values))


def rank_of_two(rank: int, port: int, values: Mapping[str, Any], interrupt_in: int | None, result: Path) -> None:
    """One of two processes as torchrun starts them; its weights go to `result`, and its exit code is the script's."""
    meet(rank, port)
    torch.set_num_threads(1)
    settle()
    redirect(result.with_suffix(".log"))
    trainer = make_trainer(values)
    trainer.interrupt_in = interrupt_in
    code = trainer.run()
    written = " ".join(path.name for path in trainer.saver.written)
    facts = {"seed": str(trainer.plan.seed), "step": str(trainer.position.step), "written": written}
    save_file(trainer.network.state(None), result, facts)
    sys.exit(code)


def exchanging_rank(rank: int, port: int, values: Mapping[str, Any], result: Path) -> None:
    """One of two processes whose weights port exchanges something in each call; how often it was called goes to
    `result`."""
    meet(rank, port)
    torch.set_num_threads(1)
    settle()
    redirect(result.with_suffix(".log"))
    trainer, weights = make_trainer(values), ExchangingPort()
    stages.ReplicatedWeights = lambda: weights  # type: ignore[assignment,misc]
    code = trainer.run()
    result.write_text(json.dumps({"calls": weights.calls, "written": [path.name for path in trainer.saver.written]}))
    sys.exit(code)


class ExchangingPort(ReplicatedWeights):
    """A port whose calls wait for the other process, as those of weights that are spread over processes do."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def meet(self, name: str) -> None:
        """Check that both processes are in the same call."""
        kinds = torch.tensor([float(ord(name[0]))])
        torch.distributed.all_reduce(kinds)
        assert kinds.item() == 2 * ord(name[0])
        self.calls.append(name)

    @contextmanager
    def whole(self, modules: list[nn.Module]) -> Iterator[None]:
        self.meet("whole")
        yield

    def gather(self, parts: StateParts) -> StateParts:
        self.meet("gather")
        return parts

    def scatter(self, parts: StateParts) -> StateParts:
        self.meet("scatter")
        return parts


def runs_together(rank: int, jobs: Mapping[str, Job], folder: Path, world: int = 2) -> None:
    """One of two or more processes, in which several runs follow each other; `folder` gets `name rank.safetensors` of
    each."""
    torch.set_num_threads(1)
    settle()
    redirect(folder / f"{rank}.log")
    logging.basicConfig(level=logging.INFO)
    for name, job in jobs.items():
        meet(rank, job.port, world)
        trainer = (make_finetune if job.full else make_trainer)(job.values, family=job.family)
        trainer.each_step = TimeoutSeen()
        assert trainer.run() == 0
        losses, norms = (torch.tensor([vars(r)[name] for r in trainer.reports]) for name in ("loss", "grad_norm"))
        facts = {"model": type(trainer.updates.model).__name__, "timeout": str(trainer.each_step.timeout)}
        facts["unused"] = str(getattr(trainer.updates.model, "find_unused_parameters", False))
        facts["bytes"] = str(local_bytes(trainer.models.denoiser))
        numbers = {"losses": losses, "norms": norms}
        learned = {} if job.full and job.values.get("shard_base") else trainer.trainables.state()
        save_file({**learned, **numbers}, folder / f"{name} {rank}.safetensors", facts)


def deepspeed_rank(
    rank: int, port: int, values: Mapping[str, Any], folder: Path, result: str = "", interrupt_in: int | None = None
) -> None:
    """One of two processes that train with DeepSpeed on the CPU; its losses go to `<result><rank>.safetensors`.

    accelerate knows DeepSpeed on several GPUs only: it is told that these processes are such.
    """
    from accelerate.state import DistributedType, PartialState

    meet(rank, port)
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder.parent / "extensions"))
    torch.set_num_threads(1)
    settle()
    redirect(folder / f"{rank}.log")
    device.accelerator_present = lambda: True  # type: ignore[assignment]
    gloo = ("gloo", DistributedType.MULTI_GPU)
    PartialState._prepare_backend = lambda self, *a, **k: gloo  # type: ignore[method-assign]
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))  # type: ignore[method-assign]
    trainer = make_trainer(values)
    trainer.interrupt_in = interrupt_in
    assert trainer.run() == (0 if interrupt_in is None else EXIT_STOPPED)
    losses = torch.tensor([report.loss for report in trainer.reports])
    save_file({"losses": losses}, folder / f"{result}{rank}.safetensors")


@dataclass(frozen=True)
class Job:
    """A run of `runs_together`: the options, and where its processes meet."""

    values: Mapping[str, Any]
    full: bool  # full training, else a network
    port: int
    family: str = "sd"


def local_bytes(module: nn.Module) -> int:
    """Bytes of the weights that this process has."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in module.parameters())


class TimeoutSeen:
    """Looks, at each step of a run, how long its processes wait for each other. Their group ends with the run."""

    timeout: timedelta | None = None

    def __call__(self, trainer: object) -> None:
        group = torch.distributed.group.WORLD
        assert group is not None
        self.timeout = group._get_backend(torch.device("cpu")).options._timeout


def meet(rank: int, port: int, world: int = 2) -> None:
    """Tell torch that this is one of so many processes."""
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


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
