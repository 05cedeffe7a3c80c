# SPDX-License-Identifier: Apache-2.0
"""Optimizers of other packages, changed so that the host does not wait for the device at each weight.

What they compute stays the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor


def rate_on_device(optimizer: Any) -> None:
    """Let transformers' Adafactor compute the rate of a weight where the weight is (Shazeer & Stern 2018, algorithm 4).

    With scale_parameter the rate grows with the weight: max(eps, RMS(weight)), of which transformers reads the larger
    one on the host. What is left is weight_decay together with scale_parameter, which reads the rate itself.
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
    """Let an optimizer of bitsandbytes step without a synchronization of the device after each weight.

    Its kernels run in the current stream, where everything that follows comes after them. Only paged optimizers, whose
    states the host may read too, need it. Versions before `sync_gpu` (0.45) stay as they are.
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

    optimizer.step = MethodType(quick_step, optimizer)  # schedules of torch want a method
