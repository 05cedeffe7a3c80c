# SPDX-License-Identifier: Apache-2.0
"""Tiny full-training runs in this process, as helpers.py has them for networks."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from library.cli import EXIT_STOPPED, METHODS
from library.families.registry import FAMILIES, open_family
from library.io.state import newest_state
from library.options import resolve
from library.trainers.finetune import FineTuneTrainer
from library.trainers.guards import StepReport
from library.trainers.tracking import Trackers
from library.types import Batch
from tests.trainers.helpers import Adapters, Run, argv, settle

DEFAULTS: dict[str, Any] = {
    "output_name": "x",
    "learning_rate": 1e-3,
    "seed": 7,
    "max_train_steps": 4,
    "max_data_loader_n_workers": 0,
    "save_model_as": "safetensors",
}


class RecordedFineTune(FineTuneTrainer):
    """The trainer of the scripts, with what the tests look at kept."""

    interrupt_in: int | None = None  # optimizer step, from 1
    keep_gradients = False
    before: Callable[[RecordedFineTune], None] | None = None  # looks at the trainer right before the first step
    each_step: Callable[[RecordedFineTune], None] | None = None  # ... and right after each optimizer step

    def run(self) -> int:
        self.reports: list[StepReport] = []
        self.gradients: list[dict[str, Tensor]] = []  # of each optimizer step before clipping
        return super().run()

    def restore(self) -> None:
        super().restore()
        if self.before is not None:
            self.before(self)

    def gradients_of(self, batches: Sequence[Batch], first_micro_step: int) -> Tensor:
        total = super().gradients_of(batches, first_micro_step)
        if self.keep_gradients:
            own = self.learned.learning_parameters()
            self.gradients.append({name: p.grad.clone() for name, p in own.items() if p.grad is not None})
        return total

    def report(self, reports: Sequence[StepReport], trackers: Trackers) -> None:
        self.reports += reports
        super().report(reports, trackers)

    def after_step(self) -> dict[str, float | Tensor]:
        found = super().after_step()
        if self.each_step is not None:
            self.each_step(self)
        if self.position.step + 1 == self.interrupt_in:
            signal.raise_signal(signal.SIGINT)
        return found


def make_finetune(
    values: Mapping[str, Any], *, family: str, method: str = "finetune",
    cls: type[RecordedFineTune] = RecordedFineTune,
) -> RecordedFineTune:  # fmt: skip
    """The trainer for these options."""
    AcceleratorState._reset_state(reset_partial_state=True)
    entry = FAMILIES[family]
    options = resolve(METHODS[method][1], entry.option_groups, argv(values), prog="test").options
    return cls(open_family(entry, options.model), options)


def finetune(
    dataset: Path | None, folder: Path, *, family: str, method: str = "finetune",
    interrupt_in: int | None = None, keep_gradients: bool = False,
    before: Callable[[RecordedFineTune], None] | None = None,
    each_step: Callable[[RecordedFineTune], None] | None = None, **values: Any,
) -> Run:  # fmt: skip
    """One run; `values` stand above DEFAULTS. Errors come as the exceptions that the script turns into lines."""
    given = {**DEFAULTS, "dataset_config": dataset, "output_dir": folder, **values}
    trainer = make_finetune(given, family=family, method=method)
    trainer.interrupt_in, trainer.keep_gradients = interrupt_in, keep_gradients
    trainer.before, trainer.each_step = before, each_step
    code = trainer.run()
    settle()
    return Run(trainer, code, folder)  # type: ignore[arg-type]


def finetune_with_stop(dataset: Path, folder: Path, stop: int, **values: Any) -> Run:
    """The same run, stopped by Ctrl-C after step `stop` and resumed."""
    assert finetune(dataset, folder, interrupt_in=stop, **values).code == EXIT_STOPPED
    state = newest_state(folder, "x")
    assert state is not None and state.name == f"x-step{stop:08d}-state"
    return finetune(dataset, folder, resume=state, **values)


def open_adapters(weights: Adapters, prefixes: tuple[str, ...]) -> Adapters:
    """Adapters of full rank that change nothing, for the layers of a LoRA file whose names begin with `prefixes`.

    `down` is the identity, so that the gradient of `up` is the gradient of the layer's weight: a literal loss with
    adapters is a literal loss of full training, too.
    """
    result: Adapters = {}
    for name in {key.split(".")[0] for key in weights if key.startswith(prefixes)}:
        down, up = weights[f"{name}.lora_down.weight"], weights[f"{name}.lora_up.weight"]
        rank = down[0].numel()
        result[f"{name}.alpha"] = torch.tensor(float(rank))
        result[f"{name}.lora_down.weight"] = torch.eye(rank).view(rank, *down.shape[1:])
        result[f"{name}.lora_up.weight"] = torch.zeros(len(up), rank, *up.shape[2:]).requires_grad_()
    return result
