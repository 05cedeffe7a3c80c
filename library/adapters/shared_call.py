# SPDX-License-Identifier: Apache-2.0
"""Values that the modules of one target share in a forward pass: a fused layer has one input and one down product."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class SharedCall:
    """One pass of one input through all modules of a target. What the first module computes, the others find.

    The pass is told by the identity of the input tensor, so it needs no help from the model and holds when a block is
    recomputed: there the input is another tensor, and so is everything that is shared. A module that comes twice begins
    a new pass. With the last module everything is let go.
    """

    def __init__(self, count: int):
        self.count = count
        self._clear()

    def _clear(self) -> None:
        self._input: Tensor | None = None
        self._with_gradient = False
        self._seen: tuple[int, ...] = ()
        self._values: dict[Hashable, Any] = {}

    def enter(self, x: Tensor, index: int) -> None:
        """Begin the call of module `index` with input `x`."""
        if x is not self._input or index in self._seen or torch.is_grad_enabled() != self._with_gradient:
            self._clear()
            self._input, self._with_gradient = x, torch.is_grad_enabled()
        self._seen = (*self._seen, index)

    def leave(self) -> None:
        """End the call of the module."""
        if len(self._seen) == self.count:
            self._clear()

    def forget(self) -> None:
        """Drop all that is shared, and end the pass."""
        self._clear()

    def value(self, name: Hashable, make: Callable[[], Value]) -> Value:
        """The value that this pass keeps under `name`, made on first use. Outside of a pass nothing is kept."""
        if self._input is None:
            return make()
        if name not in self._values:
            self._values[name] = make()
        return self._values[name]
