# SPDX-License-Identifier: Apache-2.0
"""The product x · downᵀ · upᵀ of a LoRA as one autograd function, with gradients added straight into their buffers.

With the product p = x downᵀ, the output y + s p upᵀ and its gradient g (s: scale):
∂up = s gᵀ p,  ∂p = s g up,  ∂down = (∂p)ᵀ x,  ∂x = ∂p down. These are six calls; as single operations, with a cast of
each matrix, they would be sixteen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from library.optim.working_copy import WorkingCopy


@dataclass(frozen=True)
class LowRank:
    """The two matrices of a LoRA on a Linear, as working copies. down: (rank, in), up: (out, rank)."""

    down: WorkingCopy
    up: WorkingCopy

    def takes(self, y: Tensor) -> bool:
        """Whether these copies can compute the change of the output `y`, in this pass."""
        return self.down.in_use and y.dtype == self.down.value.dtype and torch.is_grad_enabled()

    def added(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """y + scale * up(down(x)). x: ... in, y: ... out."""
        rows = x.to(y.dtype).reshape(-1, x.shape[-1])
        return _Product.apply(rows, y.reshape(-1, y.shape[-1]), self.down.parameter, self, scale).view(y.shape)

    def product(self, x: Tensor, scale: float) -> Tensor:
        """scale * up(down(x)). x: ... in. Returns ... out."""
        rows = x.to(self.down.value.dtype).reshape(-1, x.shape[-1])
        return _Product.apply(rows, None, self.down.parameter, self, scale).view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """x: (N, in), y: (N, out) or None. `parameter` makes the output need a gradient, where x does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, parameter: Tensor, pair: LowRank, scale: float) -> Tensor:
        up = pair.up.value
        inner = torch.mm(x, pair.down.value.t())
        ctx.save_for_backward(x, inner)
        ctx.pair, ctx.scale = pair, scale
        if y is None:  # with beta = 0 the first argument only has to have a fitting shape
            return torch.addmm(up[:, 0], inner, up.t(), beta=0, alpha=scale)
        return torch.addmm(y, inner, up.t(), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, inner = ctx.saved_tensors
        down, up = ctx.pair.down, ctx.pair.up
        inner_gradient = torch.addmm(inner, gradient, up.value, beta=0, alpha=ctx.scale)
        up.add_product(gradient.t(), inner, ctx.scale)
        down.add_product(inner_gradient.t(), x, 1.0)
        of_x = torch.mm(inner_gradient, down.value) if ctx.needs_input_grad[0] else None
        return of_x, gradient if ctx.needs_input_grad[1] else None, None, None, None
