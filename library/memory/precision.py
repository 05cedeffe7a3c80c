# SPDX-License-Identifier: Apache-2.0
"""Frozen Linear weights in the half precision of their file while the computation is in float32.

Casting float16 or bfloat16 to float32 is exact, so the results are bit-identical to weights kept in float32, at half
their memory. Casting at each use is all it costs; autograd keeps the half-precision weight, never the float32 copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


class _CastLinear(torch.autograd.Function):
    """y = x W^T + b with W cast to x's dtype, in the backward pass again. W and b get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (weight,) = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ weight.to(gradient.dtype), None, None


def cast_when_used(module: nn.Module) -> int:
    """Make every frozen Linear inside `module` whose weight is half precision compute in its input's dtype.

    Returns how many there are. Biases must have the computation's dtype.
    """
    count = 0
    for child in module.modules():
        if isinstance(child, nn.Linear) and child.weight.dtype in HALF:
            child.forward = _forward_of(child)  # type: ignore[method-assign]
            count += 1
    return count


def _forward_of(linear: nn.Linear) -> Any:
    return lambda x: _CastLinear.apply(x, linear.weight, linear.bias)


def keeps_file_dtype(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight is one that `cast_when_used` serves: a matrix that is not an embedding."""
    return len(shape) == 2 and name.endswith(".weight") and "embed" not in name
