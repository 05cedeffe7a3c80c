# SPDX-License-Identifier: Apache-2.0
"""A random input for a layer and a copy of its module in main memory, for comparing two changes of the layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEED = 20240229
POSITIONS = 4  # of a norm's input: values per channel
Norm = (nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Probe:
    """An input of a module. `pick` reads (rows) or, of a norm, (rows, positions) from the module's output."""

    x: Tensor
    flat: Tensor  # what a weight of shape (rows, columns) is multiplied with; of a norm: its input, normalised
    nothing: Callable[[int], Tensor]  # an output of so many channels, all zero
    pick: Callable[[Tensor], Tensor]


def probe_of(module: nn.Module) -> Probe | None:
    """The same probe for every module of the same form; None for forms that no reader changes."""
    if isinstance(module, nn.Linear):
        flat = _noise(module.in_features)
        return Probe(flat[None], flat, lambda width: _zeros(1, width), lambda y: y[0])
    if isinstance(module, nn.Conv2d):
        return _of_convolution(module)
    if isinstance(module, nn.LayerNorm):
        x = _noise(POSITIONS, *module.normalized_shape)
        flat = F.layer_norm(x, module.normalized_shape, eps=module.eps).T
        return Probe(x, flat, lambda width: _zeros(POSITIONS, width), lambda y: y.T)
    if isinstance(module, nn.GroupNorm):
        x = _noise(1, module.num_channels, POSITIONS)
        flat = F.group_norm(x, module.num_groups, eps=module.eps)[0]
        return Probe(x, flat, lambda width: _zeros(1, width, POSITIONS), lambda y: y[0])
    return None


def _of_convolution(module: nn.Conv2d) -> Probe | None:
    """A picture of zeros with one random patch, which the kernel covers at one place of the output."""
    if module.groups != 1 or isinstance(module.padding, str) or module.dilation != (1, 1):
        return None
    (height, width), (down, right), (top, left) = module.kernel_size, module.stride, module.padding
    place = -(-top // down), -(-left // right)  # the first output that reads no padding
    start = place[0] * down - top, place[1] * right - left
    x = torch.zeros(1, module.in_channels, start[0] + height, start[1] + width, dtype=torch.float64)
    flat = _noise(module.in_channels, height, width)
    x[0, :, start[0] :, start[1] :] = flat
    sizes = [(size + 2 * pad - kernel) // stride + 1 for size, pad, kernel, stride in zip(
        x.shape[2:], module.padding, module.kernel_size, module.stride)]  # fmt: skip
    return Probe(x, flat.flatten(), lambda rows: _zeros(1, rows, *sizes), lambda y: y[0, :, place[0], place[1]])


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)


def host(tensor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """A copy in main memory."""
    return tensor.detach().to("cpu", dtype)


def on_host(
    module: nn.Module, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """A plain module of the same form in main memory, without hooks; without a weight it has no values either."""
    copy: nn.Module
    if isinstance(module, nn.Linear):
        copy = nn.Linear(module.in_features, module.out_features, device="meta")
    elif isinstance(module, nn.Conv2d):
        form: Any = module
        copy = nn.Conv2d(
            form.in_channels, form.out_channels, form.kernel_size, form.stride, form.padding, device="meta"
        )
    elif isinstance(module, nn.LayerNorm):
        copy = nn.LayerNorm(module.normalized_shape, module.eps, device="meta")
    else:
        assert isinstance(module, nn.GroupNorm)
        copy = nn.GroupNorm(module.num_groups, module.num_channels, module.eps, device="meta")
    if weight is not None:
        copy.weight = nn.Parameter(host(weight, dtype), requires_grad=False)
        copy.bias = None if bias is None else nn.Parameter(host(bias, dtype), requires_grad=False)
    return copy.requires_grad_(False)
