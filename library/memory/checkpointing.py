# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing with a budget: the share of the activations that is kept for the backward pass.

    recomputation = Recomputation(family.blocks(denoiser))
    recomputation.set_budget(0.5)  # recompute half of the blocks, evenly spread, in the backward pass
    recomputation.set_budget(0)  # recompute all of them
    recomputation.forwards.undo()

Only the inputs of a recomputed block are kept. Random draws are repeated exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

ForwardFunction = Callable[..., Any]


class ReplacedForwards:
    """Replaces the `forward` methods of blocks on their instances, and restores them."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self.blocks = list(blocks)
        self.before: list[ForwardFunction] = [block.forward for block in self.blocks]
        self._instances = [vars(block).get("forward") for block in self.blocks]  # None: the class's method

    def replace(self, index: int, forward: ForwardFunction) -> None:
        """Make block `index` compute `forward`."""
        self.blocks[index].forward = forward

    def undo(self) -> None:
        """Restore all blocks."""
        for block, instance in zip(self.blocks, self._instances):
            if instance is not None:
                block.forward = instance
            elif "forward" in vars(block):
                del block.forward


class Recomputation:
    """Recomputes some blocks in the backward pass.

    weights: bytes of activations of each block, or anything proportional to them; None: all blocks are equal.
    """

    def __init__(self, blocks: Iterable[nn.Module], weights: Sequence[float] | None = None) -> None:
        self.forwards = ReplacedForwards(blocks)
        count = len(self.forwards.blocks)
        self.weights = [1.0] * count if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != count:
            raise ValueError(f"{count} blocks have {len(self.weights)} weights")

    def set_budget(self, budget: float) -> list[int]:
        """Keep about this share of the activations. May be called again between any two steps.

        Returns the indices of the blocks that are recomputed.
        """
        again = recomputed_blocks(self.weights, budget)
        self.forwards.undo()
        for index in again:
            self.forwards.replace(index, recomputed(self.forwards.before[index]))
        return again


def recomputed_blocks(weights: Sequence[float], budget: float) -> list[int]:
    """Indices of the blocks to recompute, evenly spread, so that about `budget` of the sum of `weights` is kept.

    Works like drawing a line in pixels: a block is kept when that brings the weight kept so far closer to the line
    budget * (weight so far). Raises ValueError unless 0 <= budget <= 1.
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


def recomputed(forward: ForwardFunction) -> ForwardFunction:
    """`forward` with recomputation: only its inputs are kept for the backward pass.

    Uses non-reentrant checkpointing, which takes keyword arguments, lets gradients flow when no input requires one, and
    recomputes only as much of the block as the backward pass needs.
    """

    def again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return again


def recompute_encoders(encoders: Sequence[nn.Module]) -> None:
    """Recompute text encoders that learn, through transformers. Puts them into training mode, which that requires."""
    for encoder in encoders:
        encoder.train()  # transformers recomputes in training mode only
        encoder.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
