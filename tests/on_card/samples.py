# SPDX-License-Identifier: Apache-2.0
"""The models of tests/memory on the card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.memory.swap_models import MODELS, Sample, recompute, stack

MADE = {torch.randn, torch.tensor, torch.zeros, torch.ones}


class MovedToCard(TorchFunctionMode):
    """New tensors without a device are made as they are on the CPU, and moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.to("cuda", non_blocking=True) if func in MADE and "device" not in (kwargs or {}) else result


def on_card(name: str, *, recomputed: bool = False) -> Sample:
    """One of the models, or "stack", with the inputs of its loss, on the card."""
    sample = MODELS.get(name, stack)()
    sample.denoiser.to("cuda")
    for block in sample.blocks if recomputed else ():
        recompute(block)
    return Sample(sample.denoiser, sample.blocks, moved(sample.loss))


def moved(loss: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    def run(seed: int) -> Tensor:
        with MovedToCard():
            return loss(seed)

    return run


def attach_lora(sample: Sample) -> list[nn.Parameter]:
    """A low-rank change on every Linear inside blocks, through forward hooks, as adapters do it."""
    found: list[nn.Parameter] = []
    with MovedToCard():
        for linear in (m for block in sample.blocks for m in block.modules() if isinstance(m, nn.Linear)):
            down = nn.Parameter(torch.randn(2, linear.in_features) / 4)
            up = nn.Parameter(torch.randn(linear.out_features, 2) / 4)
            linear.register_forward_hook(lambda _, args, y, d=down, u=up: y + args[0] @ d.t() @ u.t())
            found += [down, up]
    return found
