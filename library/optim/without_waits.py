# SPDX-License-Identifier: Apache-2.0
"""Changes to optimizers of other packages that remove a wait for the device at each weight. Results are the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor


def rate_on_device(optimizer: Any) -> None:
    """Make transformers' Adafactor compute rates on the weights' device (Shazeer & Stern 2018, algorithm 4).

    With scale_parameter the rate is proportional to max(eps, RMS(weight)), which transformers evaluates on the host.
    weight_decay together with scale_parameter still waits: it reads the rate itself.
    """
    step_size = optimizer._get_lr

    def rate(group: Mapping[str, Any], state: Mapping[str, Any]) -> float | Tensor:
        step = step_size({**group, "scale_parameter": False}, state)
        if not group["scale_parameter"]:
            return step
        smallest, size = group["eps"][1], state["RMS"]
        return torch.where(size > smallest, size * step, torch.full_like(size, smallest * step))

    optimizer._get_lr = rate


def without_synchronizing(optimizer: Any) -> None:
    """Make a bitsandbytes optimizer step without synchronizing the device after each weight.

    Its kernels run in the current stream, so everything that follows is ordered after them. Only paged optimizers,
    whose states the host may read, need the synchronization. Versions before `sync_gpu` (0.45) are not changed.
    """
    module: Any = sys.modules["bitsandbytes.optim.optimizer"]
    if "sync_gpu" not in vars(module):
        return
    step: Callable[..., Any] = optimizer.step

    def quick_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        synchronize, module.sync_gpu = module.sync_gpu, lambda tensor: None
        try:
            return step(*args, **kwargs)
        finally:
            module.sync_gpu = synchronize

    optimizer.step = MethodType(quick_step, optimizer)  # torch's schedules expect a method
