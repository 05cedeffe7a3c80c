# SPDX-License-Identifier: Apache-2.0
"""Frozen Linear and Conv2d weights that keep the half precision or fp8 of their file in a float32 computation.

Casting float16, bfloat16 or fp8 to float32 is exact, so the results are bit-identical to those of float32 weights, with
a half or a quarter of the memory. The only cost is a cast at each use. Autograd keeps the stored weight, not the
float32 copy, and not the input, which only the weight's gradient would need.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.memory.quantise import QuantLinear

HALF = (torch.float16, torch.bfloat16)
SMALL = (*HALF, torch.float8_e4m3fn, torch.float8_e5m2)


class Scratch:
    """A buffer for the cast weight of one layer at a time: allocating a new one each time costs more than the cast."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` in `dtype`, valid until the next cast."""
        buffer = self._buffer
        if buffer is None or buffer.numel() < weight.numel() or (buffer.dtype, buffer.device) != (dtype, weight.device):
            buffer = self._buffer = torch.empty(weight.numel(), dtype=dtype, device=weight.device)
        return buffer[: weight.numel()].view(weight.shape).copy_(weight)


class _CastLinear(torch.autograd.Function):
    """y = x W^T + b with W cast to x's dtype in each pass. W and b get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scratch: Scratch) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.scratch = scratch
        return F.linear(x, scratch.cast(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (weight,) = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ ctx.scratch.cast(weight, gradient.dtype), None, None, None


class _CastConv2d(torch.autograd.Function):
    """A 2-D convolution with the weight cast to x's dtype in each pass. Weight and bias get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, conv: nn.Conv2d, scratch: Scratch) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.conv, ctx.shape, ctx.scratch = conv, x.shape, scratch
        return F.conv2d(x, scratch.cast(weight, x.dtype), bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (weight,) = ctx.saved_tensors
        (gradient,) = gradients
        conv, only_input = ctx.conv, [True, False, False]
        like_x = gradient.new_zeros(()).expand(ctx.shape)  # only its shape is used
        result = torch.ops.aten.convolution_backward(
            gradient, like_x, ctx.scratch.cast(weight, gradient.dtype), None,
            conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups, only_input,
        )  # fmt: skip
        return result[0], None, None, None, None


def cast_when_used(module: nn.Module) -> int:
    """Make every frozen Linear and Conv2d in `module` with a half-precision or fp8 weight compute in its input's dtype.

    Returns the number of these layers. Biases must have the computation's dtype.
    """
    count, scratch = 0, Scratch()
    for child in module.modules():
        if isinstance(child, QuantLinear):
            continue  # does so by itself
        if isinstance(child, (nn.Linear, nn.Conv2d)) and child.weight.dtype in SMALL:
            child.forward = _linear(child, scratch) if isinstance(child, nn.Linear) else _conv(child, scratch)  # type: ignore[method-assign]
            count += 1
    return count


def _linear(linear: nn.Linear, scratch: Scratch) -> Any:
    return lambda x: _CastLinear.apply(x, linear.weight, linear.bias, scratch)


def _conv(conv: nn.Conv2d, scratch: Scratch) -> Any:
    assert conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return lambda x: _CastConv2d.apply(x, conv.weight, conv.bias, conv, scratch)


def never_in_float16(linear: nn.Linear) -> None:
    """Compute this layer in float32 where it would be computed in float16, since its outputs exceed 65504.

    The weight keeps its dtype. The output is float32, also under autocast.
    """
    plain, scratch = linear.forward, Scratch()

    def forward(x: Tensor) -> Tensor:
        device, is_quantised = x.device.type, isinstance(linear, QuantLinear)
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        own = linear.dtype if is_quantised else linear.weight.dtype
        if not autocast and torch.float16 not in (x.dtype, own):
            return plain(x)
        with torch.autocast(device, enabled=False):
            if is_quantised:
                return plain(x.float())  # QuantLinear computes in its input's dtype
            weight = linear.weight
            if weight.requires_grad or weight.dtype == torch.float32:
                return F.linear(x.float(), weight.float(), None if linear.bias is None else linear.bias.float())
            return _CastLinear.apply(x.float(), weight, linear.bias, scratch)

    linear.forward = forward  # type: ignore[method-assign, assignment]


def castable_weights(module: nn.Module) -> set[str]:
    """Names of the weights that `cast_when_used` supports: those of Linear and Conv2d, not of embeddings."""
    return {f"{n}.weight" for n, child in module.named_modules() if isinstance(child, (nn.Linear, nn.Conv2d))}
