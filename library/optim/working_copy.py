# SPDX-License-Identifier: Apache-2.0
"""Weights that learn, in the dtype of the computation: one copy of each flat buffer, made once per training pass.

Weights in float32 that are computed with in bf16 would otherwise be cast one by one in each forward pass, and their
gradients in each backward pass. Layers that know the working copies (`AdapterLayer.use_copies`) compute with them and
add their gradients to them; after the pass the gradients are added to the float32 ones, one call per buffer.

    copies = WorkingCopies(flat, torch.bfloat16)
    network.use_copies(copies.find)
    with copies.in_use():
        loss.backward()  # the gradients are in `flat` afterwards
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from library.optim.flat import FlatParameters

FindCopy = Callable[[Tensor], "WorkingCopy | None"]  # the working copy of a parameter, if it has one


class WorkingCopy:
    """A matrix in the dtype of the computation, and its gradient of the current pass."""

    def __init__(self, parameter: Tensor, value: Tensor, gradient: Tensor, owner: Use) -> None:
        self.parameter, self.value, self.gradient, self._owner = parameter, value, gradient, owner

    @property
    def in_use(self) -> bool:
        """Whether a training pass is going on, in which the value is up to date."""
        return self._owner.going_on

    def add_product(self, left: Tensor, right: Tensor, factor: float) -> None:
        """Add factor * left · right to the gradient. Of a second product in one pass the sum is in float32."""
        written = self._owner.written
        if self.parameter in written and self.value.dtype != self.parameter.dtype:
            assert self.parameter.grad is not None
            self.parameter.grad.add_(torch.mm(left, right), alpha=factor)
            return
        written.add(self.parameter)
        self.gradient.addmm_(left, right, alpha=factor)


class Use:
    """The current use of working copies."""

    def __init__(self) -> None:
        self.going_on = False
        self.written: set[Tensor] = set()  # parameters whose copies have got a gradient in this pass


class WorkingCopies:
    """The working copies of all parameters in flat buffers. Buffers in `dtype` already are their own copies."""

    def __init__(self, flat: FlatParameters, dtype: torch.dtype) -> None:
        self.flat, self._use = flat, Use()
        self._copies: dict[Tensor, WorkingCopy] = {}
        self._buffers: list[Tensor] = []  # of the groups whose copies are other tensors
        self._sums: list[Tensor] = []  # ... and their gradients
        self._values: list[Tensor] = []  # the copies
        self._gradients: list[Tensor] = []  # ... and theirs
        for group in flat.groups:
            value, gradient = group.buffer.detach(), group.grad
            if value.dtype != dtype:
                self._buffers.append(value)
                self._sums.append(gradient)
                value = torch.zeros_like(value, dtype=dtype)
                gradient = torch.zeros_like(value)
                self._values.append(value)
                self._gradients.append(gradient)
            for p, own, gathered in zip(group.params, group.views(value), group.views(gradient), strict=True):
                self._copies[p] = WorkingCopy(p, own, gathered, self._use)

    def find(self, parameter: Tensor) -> WorkingCopy | None:
        """The working copy of a parameter, if it is in a flat buffer."""
        return self._copies.get(parameter)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context manager around the forward and backward pass of one micro-batch."""
        if self._values:
            torch._foreach_copy_(self._values, self._buffers)
            torch._foreach_zero_(self._gradients)
        self._use.going_on = True
        try:
            yield
        finally:
            self._use.going_on = False
            written, self._use.written = self._use.written, set()
        self.flat.heard_from(written)
        for gathered, gradient in zip(self._sums, self._gradients, strict=True):
            gathered.add_(gradient)
