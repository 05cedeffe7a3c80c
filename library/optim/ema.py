# SPDX-License-Identifier: Apache-2.0
"""A moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def warm_decay(decay: float, step: int) -> float:
    """Decay in force at optimizer step `step` (from 0): min(decay, (1 + n) / (10 + n)), so that early weights fade."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """average = d * average + (1 - d) * weight after each optimizer step, kept in float32 beside the weights."""

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.parameters = [p.detach() for p in parameters]  # share storage with the weights
        self.decay = decay
        self.averages = [p.float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 0 over the whole run."""
        current = [p.float() for p in self.parameters]
        torch._foreach_lerp_(self.averages, current, 1 - warm_decay(self.decay, step))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The weights hold the averages inside the block, and exactly what they held before afterwards."""
        kept = [p.clone() for p in self.parameters]
        try:
            torch._foreach_copy_(self.parameters, self.averages)
            yield
        finally:
            torch._foreach_copy_(self.parameters, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by position."""
        return {str(i): average for i, average in enumerate(self.averages)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state`. Raises ValueError when it belongs to other weights."""
        shapes = [tuple(state[key].shape) for key in sorted(state, key=int)]
        if shapes != [tuple(average.shape) for average in self.averages]:
            raise ValueError("the moving average was saved for other weights")
        for i, average in enumerate(self.averages):
            average.copy_(state[str(i)])
