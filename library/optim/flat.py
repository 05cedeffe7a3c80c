# SPDX-License-Identifier: Apache-2.0
"""Many small parameters as one buffer per learning-rate group, so that clip and step are a few calls, not thousands.

The parameters stay ordinary tensors: views of the buffer, whose gradients are views of a second buffer. Only for
optimizers whose update is elementwise (`BuiltOptimizer.elementwise`). Build it when the parameters are on their device
and in their dtype: a later `module.to(...)` would cut the views.

A parameter that received no gradient counts as one with gradient 0: momentum and weight decay still act on it, and
`p.grad` is never None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # elements between the starts of tensors are a multiple of this: kernels want 16-byte aligned operands


@dataclass(frozen=True)
class FlatGroup:
    """One buffer and where each parameter lies in it."""

    buffer: nn.Parameter  # 1-D; its .grad is the gradient buffer
    params: tuple[Tensor, ...]
    offsets: tuple[int, ...]

    @property
    def grad(self) -> Tensor:
        assert self.buffer.grad is not None
        return self.buffer.grad

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Of another buffer of this layout, the parts that belong to the parameters, in their shapes."""
        pairs = zip(self.params, self.offsets, strict=True)
        return [buffer[start : start + p.numel()].view(p.shape) for p, start in pairs]


def flatten(params: Sequence[Tensor]) -> FlatGroup:
    """Move parameters of one dtype and device into one buffer. They become views, and so do their gradients.

    Raises ValueError for mixed dtypes or devices.
    """
    kinds = {(p.dtype, p.device) for p in params}
    if len(kinds) != 1:
        raise ValueError(f"a flat group needs one dtype and device, got {sorted(map(str, kinds))}")
    offsets, size = [], 0
    for p in params:
        offsets.append(size)
        size += -(-p.numel() // ALIGNMENT) * ALIGNMENT
    ((dtype, device),) = kinds
    data = torch.zeros(size, dtype=dtype, device=device)  # the gaps stay 0: no gradient, no update
    buffer = nn.Parameter(data)
    buffer.grad = torch.zeros_like(data)
    for p, start in zip(params, offsets, strict=True):
        place = slice(start, start + p.numel())
        data[place].copy_(p.detach().flatten())
        old_gradient = p.grad
        p.data = data[place].view(p.shape)
        p.grad = buffer.grad[place].view(p.shape)
        if old_gradient is not None:
            p.grad.copy_(old_gradient)
    return FlatGroup(buffer, tuple(params), tuple(offsets))


class FlatParameters:
    """The flat buffers of all groups: hand `param_groups` to the optimizer in place of the original groups."""

    def __init__(self, param_groups: Sequence[dict[str, Any]]) -> None:
        self.groups = [flatten(list(group["params"])) for group in param_groups]
        self.param_groups: list[dict[str, Any]] = [
            {**group, "params": [flat.buffer]} for group, flat in zip(param_groups, self.groups, strict=True)
        ]

    def zero_grad(self) -> None:
        """Set all gradients to 0. Use it instead of the optimizer's or the module's, which would drop the views."""
        torch._foreach_zero_([flat.grad for flat in self.groups])

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale all gradients to a common norm of at most `max_norm`; the norm before, as a tensor (no wait)."""
        gradients = [flat.grad for flat in self.groups]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def layout(self) -> list[list[list[int]]]:
        """Shapes per group, in order: what a saved optimizer state of these buffers belongs to."""
        return [[list(p.shape) for p in flat.params] for flat in self.groups]
