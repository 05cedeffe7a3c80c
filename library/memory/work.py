# SPDX-License-Identifier: Apache-2.0
"""Cost of an operation on a device: floating-point operations of its matrix products, and bytes that it moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

# FLOPs of attention's backward pass relative to its forward pass: the four matrix products of the gradients. Kernels
# that recompute the scores need a fifth, which is not counted: it is the price of not storing them
ATTENTION_BACKWARD = 2


@dataclass(frozen=True)
class Work:
    """Totals over operations."""

    flops: int = 0  # in matrix products, convolutions and attention; a multiply-add counts as two
    moved: int = 0  # bytes that all other operations read and write; each tensor counts once per operation
    calls: int = 0  # operations, without views

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.moved + other.moved, self.calls + other.calls)

    def __sub__(self, other: Work) -> Work:
        return Work(self.flops - other.flops, self.moved - other.moved, self.calls - other.calls)


def work_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Work:
    """Work of one call of an operation. Views and allocations are free."""
    packet = func._overloadpacket
    count = _formulas().get(packet)
    if count is not None:
        return Work(int(count(*args, **kwargs, out_val=out)), 0, 1)
    name = packet.__name__
    if name.startswith("_scaled_dot_product"):
        return Work(_attention(name, args), 0, 1)
    if func.is_view or name in ("empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view"):
        return Work()
    tensors = [t for t in (*torch.utils._pytree.tree_leaves((args, dict(kwargs), out)),) if isinstance(t, Tensor)]
    return Work(0, sum({id(t): t.numel() * t.element_size() for t in tensors}.values()), 1)


@cache
def _formulas() -> Mapping[Any, Callable[..., int]]:
    """torch's FLOP formulas, except those for attention, which count the fifth product."""
    from torch.utils.flop_counter import flop_registry

    return {k: v for k, v in flop_registry.items() if not k.__name__.startswith("_scaled_dot_product")}


def _attention(name: str, args: tuple[Any, ...]) -> int:
    """FLOPs of scores and weighted values. query B H Q D, key B H K D, value B H K V."""
    backward = name.endswith("_backward")
    query, key, value = args[1:4] if backward else args[:3]
    batch, heads, queries, width = query.shape
    products = 2 * batch * heads * queries * key.shape[-2] * (width + value.shape[-1])
    return products * (ATTENTION_BACKWARD if backward else 1)
