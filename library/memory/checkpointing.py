# SPDX-License-Identifier: Apache-2.0
"""Recomputation as a budget: the share of the activations that is kept for the backward pass.

    recomputation = Recomputation(family.blocks(denoiser))
    recomputation.set_budget(0.5)  # half of the blocks, evenly spread, are computed again in the backward pass
    recomputation.set_budget(0)  # out of memory: all of them
    recomputation.undo()

Of a block that is recomputed only the inputs are kept. Random draws are repeated as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Forward = Callable[..., Any]


class Forwards:
    """The `forward` of each block, replaced on the instance and put back."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self.blocks = list(blocks)
        self.before: list[Forward] = [block.forward for block in self.blocks]
        self._instances = [vars(block).get("forward") for block in self.blocks]  # None: the method of the class

    def replace(self, index: int, forward: Forward) -> None:
        """From now on block `index` computes `forward`."""
        self.blocks[index].forward = forward

    def restore(self, index: int) -> None:
        """Block `index` as it was."""
        block, instance = self.blocks[index], self._instances[index]
        if instance is not None:
            block.forward = instance
        elif "forward" in vars(block):
            del block.forward

    def undo(self) -> None:
        """All blocks as they were."""
        for index in range(len(self.blocks)):
            self.restore(index)


class Recomputation:
    """Which blocks are computed again in the backward pass.

    weights: bytes of activations that each block would keep, or anything in proportion to them; None: all the same.
    """

    def __init__(self, blocks: Iterable[nn.Module], weights: Sequence[float] | None = None) -> None:
        self.forwards = Forwards(blocks)
        count = len(self.forwards.blocks)
        self.weights = [1.0] * count if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != count:
            raise ValueError(f"{count} blocks have {len(self.weights)} weights")

    def set_budget(self, budget: float) -> list[int]:
        """Keep about this share of the activations; may be called again at any time between two steps.

        Returns the numbers of the blocks that are recomputed.
        """
        again = recomputed_blocks(self.weights, budget)
        self.forwards.undo()
        for index in again:
            self.forwards.replace(index, recomputed(self.forwards.before[index]))
        return again

    def undo(self) -> None:
        """Recompute nothing."""
        self.forwards.undo()


def recomputed_blocks(weights: Sequence[float], budget: float) -> list[int]:
    """Numbers of the blocks to recompute, evenly spread, so that about `budget` of the sum of `weights` is kept.

    Like drawing a line with pixels: a block is kept where the line budget * (weight so far) crosses the middle of what
    would be kept with it.
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"a budget is from 0 to 1, got {budget}")
    again, wanted, kept = [], 0.0, 0.0
    for index, weight in enumerate(weights):
        wanted += budget * weight
        if budget > 0 and kept + weight / 2 <= wanted:
            kept += weight
        else:
            again.append(index)
    return again if budget < 1 else []


def recomputed(forward: Forward) -> Forward:
    """`forward`, of which only the inputs are kept for the backward pass.

    The non-reentrant kind: it takes keyword arguments, gradients flow when no input needs one, and a backward pass
    that needs only a part of the block computes no more than that.
    """

    def again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return again


def recompute_encoders(encoders: Sequence[nn.Module]) -> None:
    """The same for text encoders that learn, in the way of transformers. They are put into training mode for it."""
    for encoder in encoders:
        encoder.train()  # transformers recomputes in training mode only
        encoder.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
