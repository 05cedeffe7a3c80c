# SPDX-License-Identifier: Apache-2.0
"""When one of two processes fails: `python -m tests.trainers.faults` prints the table of docs/many_cards.md."""

from __future__ import annotations

import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from library.cli import run as run_script
from library.io.state import load_state
from library.sampling.preview import Previewer
from library.trainers.trainer import Trainer
from library.trainers.validation import Validation
from tests.tiny import make_tiny_sd
from tests.trainers import child
from tests.trainers.helpers import DEFAULTS, argv, make_pictures, settle, subset, write_dataset


def kill(of: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(of: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail(*of: Any) -> None:
    raise RuntimeError("a mistake in the program")


def fill_disk(of: Any) -> None:
    """No file of this process may be larger than 4 KB from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def lose_cache(of: Trainer) -> None:
    shutil.rmtree(Path(of.options.save.output_dir or "") / "cache")


def fail_in_pass(of: Previewer) -> None:
    """The next pass of the denoiser fails in this process; the other one waits for its weights."""
    of.family.predict = fail  # type: ignore[method-assign]


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one process, right before a call of this method, and the options of both processes."""

    happen: Callable[[Any], None]
    options: Mapping[str, Any] = field(default_factory=dict)
    of: type = Trainer
    method: str = "train_step"


SHARDED: dict[str, Any] = {"shard_base": True, "network_train_unet_only": True}
PREVIEWS: dict[str, Any] = {**SHARDED, "sample_every_n_steps": 1}
VALIDATES: dict[str, Any] = {**SHARDED, "validate_every_n_steps": 1, "validation_split": 0.4}
FAULTS = {
    "killed (SIGKILL)": Fault(kill),
    "SIGTERM": Fault(terminate),
    "an exception in a step": Fault(fail),
    "the disk is full": Fault(fill_disk),
    "the cache is removed": Fault(lose_cache, {"cache_latents_to_disk": True}),
    "`--shard_base`: killed": Fault(kill, SHARDED),
    "`--shard_base`: a preview fails between passes": Fault(fail, PREVIEWS, Previewer, "_picture"),
    "`--shard_base`: a preview fails inside a pass": Fault(fail_in_pass, PREVIEWS, Previewer, "_denoise"),
    "`--shard_base`: validation fails": Fault(fail, VALIDATES, Validation, "_loss"),
}
CALL = 3  # of the method: the one in which the fault happens


def rank_with_fault(rank: int, port: int, values: Mapping[str, Any], fault: str | None, folder: Path) -> None:
    """One of two processes that run the script; with a fault its time goes to the file `failed`."""
    child.meet(rank, port)
    torch.set_num_threads(1)
    settle()
    child.redirect(folder / f"{rank}.log")
    if fault is not None:
        inject(FAULTS[fault], folder / "failed")
    sys.argv[0] = "script.py"
    run_script("network", "sd", argv(values))


def inject(fault: Fault, file: Path) -> None:
    """Let the fault happen in this process."""
    original, calls = getattr(fault.of, fault.method), iter(range(1, 1000))

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == CALL:
            file.write_text(str(time.time()))
            fault.happen(self)
        return original(self, *args, **kwargs)

    setattr(fault.of, fault.method, method)


@dataclass(frozen=True)
class Outcome:
    """How both processes ended."""

    codes: list[int | None]
    seconds: float  # from the fault until both were gone
    told: list[list[str]]  # by each process: its lines of errors, and the last one of a traceback
    states: list[int]  # steps of the states, all of which can be resumed
    half_written: list[str]

    def row(self, name: str, rank: int) -> str:
        """A row of the table."""
        told = " / ".join(line for lines in self.told for line in lines)
        codes = ", ".join(map(str, self.codes))
        left = f"state of step {max(self.states)}" if self.states else "no state"
        left += "".join(f", half-written: {name}" for name in self.half_written)
        return f"| {name} | {rank} | {told} | {codes} | {self.seconds:.0f} s | {left} |"


def outcome(name: str, rank: int, model: Path, ground: Path, *, seconds: float = 60) -> Outcome:
    """Run two processes, of which number `rank` has the fault."""
    folder = Path(tempfile.mkdtemp(dir=ground))
    pictures = make_pictures(ground / "pictures", 5)
    own = dict(FAULTS[name].options)
    split = own.pop("validation_split", 0.0)
    dataset = write_dataset(folder / "data.toml", subset(pictures), batch_size=1, validation_split=split)
    (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2\n", encoding="utf-8")
    values = {
        **DEFAULTS, "pretrained_model_name_or_path": model, "dataset_config": dataset, "output_dir": folder / "out",
        "cache_dir": folder / "out/cache", "sample_prompts": folder / "prompts.txt", "max_train_steps": 6,
        "save_every_n_steps": 1, "save_state": True, **own,
    }  # fmt: skip
    if "sample_every_n_steps" not in own:
        del values["sample_prompts"]
    (port,) = child.free_ports(1)
    both = [child.start(rank_with_fault, r, port, values, name if r == rank else None, folder) for r in (0, 1)]
    codes = [child.exit_code(process, seconds=seconds) for process in both]
    ended = time.time()
    for process in both:
        process.kill()  # nothing happens to one that has ended
    failed = folder / "failed"
    states = sorted(load_state(path).step for path in child.states(folder / "out"))
    return Outcome(
        codes,
        ended - float(failed.read_text()) if failed.exists() else math.nan,
        [lines_of((folder / f"{r}.log").read_text(encoding="utf-8")) for r in (0, 1)],
        states,
        sorted(path.name for path in (folder / "out").glob(".*")),
    )


def lines_of(log: str) -> list[str]:
    """The lines about a failure in what a process printed: those that begin so, and the last one of a traceback."""
    lines = log.splitlines()
    signs = ("error: ", "stopped: ", "stopping: ", "the training goes on")
    found = [line for line in lines if any(sign in line for sign in signs)]
    return [*found, *(lines[-1:] if "Traceback (most recent call last):" in lines else [])]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ground = Path(folder)
        model = make_tiny_sd(ground / "sd1", version=1)
        print("| What happens | to process | What you see | exit codes 0, 1 | all gone after | left |")
        print("|---|---|---|---|---|---|")
        for name in FAULTS:
            for rank in (0, 1):
                print(outcome(name, rank, model, ground).row(name, rank), flush=True)


if __name__ == "__main__":
    main()
