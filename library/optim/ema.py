# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the trained weights. Weights in flat buffers have their averages in flat buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from library.optim.flat import FlatParameters

CHUNK = 1 << 24  # numbers in a float32 copy at a time; a single larger weight may exceed it


def warm_decay(decay: float, step: int) -> float:
    """Decay at optimizer step `step` (from 0): min(decay, (1 + step) / (10 + step)); early weights fade fast."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """Averages in float32: average = d * average + (1 - d) * weight after each optimizer step.

    flat: the buffers of which `parameters` are all the views, in this order. States are the same with and without it.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float, flat: FlatParameters | None = None) -> None:
        weights = [p.detach() for p in parameters]
        self.decay = decay
        self.tensors = [group.buffer.detach() for group in flat.groups] if flat else weights  # shared storage
        self._sums = [p.float().clone() for p in self.tensors]
        self.averages = self._sums  # one per parameter
        if flat is not None:
            pairs = zip(flat.groups, self._sums, strict=True)
            self.averages = [view for group, average in pairs for view in group.views(average)]
        if [a.shape for a in self.averages] != [p.shape for p in weights]:
            raise ValueError("the flat buffers are of other weights")

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages after optimizer step `step`, counted from 0 over the whole run."""
        weight = 1 - warm_decay(self.decay, step)
        for part in self._parts():
            torch._foreach_lerp_(self._sums[part], [p.float() for p in self.tensors[part]], weight)

    def _parts(self) -> Iterator[slice]:
        """Slices of tensors to update together. Only tensors that need a float32 copy count towards the limit."""
        start = size = 0
        for i, p in enumerate(self.tensors):
            cost = 0 if p.dtype == torch.float32 else p.numel()
            if size and size + cost > CHUNK:
                yield slice(start, i)
                start, size = i, 0
            size += cost
        yield slice(start, len(self.tensors))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside the context the weights are the averages; afterwards they are restored exactly."""
        kept = [p.to("cpu", copy=True) for p in self.tensors]  # the card may be full
        try:
            torch._foreach_copy_(self.tensors, self._sums)
            yield
        finally:
            torch._foreach_copy_(self.tensors, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, by index of the parameter."""
        return {str(i): average for i, average in enumerate(self.averages)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state`. Raises ValueError when it was saved for other weights."""
        shapes = [tuple(state[key].shape) for key in sorted(state, key=int)]
        if shapes != [tuple(average.shape) for average in self.averages]:
            raise ValueError("the moving average was saved for other weights")
        for i, average in enumerate(self.averages):
            average.copy_(state[str(i)])
