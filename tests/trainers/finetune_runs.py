# SPDX-License-Identifier: Apache-2.0
"""Tiny full-training runs in this process, as helpers.py has them for networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from library.cli import EXIT_STOPPED
from library.io.state import newest_state
from tests.trainers.helpers import Adapters, Recorded, Run, make_trainer, settle

DEFAULTS: dict[str, Any] = {
    "output_name": "x",
    "learning_rate": 1e-3,
    "seed": 7,
    "max_train_steps": 4,
    "max_data_loader_n_workers": 0,
    "save_model_as": "safetensors",
}


def make_finetune(values: Mapping[str, Any], *, family: str, method: str = "finetune") -> Recorded:
    """The run for these options."""
    return make_trainer(values, family=family, method=method)


def finetune(
    dataset: Path | None, folder: Path, *, family: str, method: str = "finetune",
    interrupt_in: int | None = None, keep_gradients: bool = False,
    before: Callable[[Recorded], None] | None = None,
    each_step: Callable[[Recorded], None] | None = None, **values: Any,
) -> Run:  # fmt: skip
    """One run; `values` stand above DEFAULTS. Errors come as the exceptions that the script turns into lines."""
    given = {**DEFAULTS, "dataset_config": dataset, "output_dir": folder, **values}
    trainer = make_finetune(given, family=family, method=method)
    trainer.interrupt_in, trainer.keep_gradients = interrupt_in, keep_gradients
    trainer.before, trainer.each_step = before, each_step
    code = trainer.run()
    settle()
    return Run(trainer, code, folder)


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
