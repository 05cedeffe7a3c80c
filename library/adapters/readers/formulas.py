# SPDX-License-Identifier: Apache-2.0
"""The change that a program computes from the tensors of one layer, applied to a vector: kind by kind.

`x` is a vector of the weight's columns, or None for the whole matrix; `weight` gives the frozen weight W. Names and
formulas: LyCORIS, ComfyUI 0.3.64 and PEFT (the shared facts are in docs/lora_formats.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from library.adapters.formats.deltas import GLORA, LOHA, butterfly, loha, lokr, lora, rotations, times
from library.adapters.formats.layer_tensors import ALPHA, DORA, DOWN, MID, UP, Tensors, scale_of

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class BaseWeight:
    """The layer that is changed, as a matrix (rows, columns), when a formula needs it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def matrix(self) -> Tensor:
        return self.read().flatten(1)

    def times(self, x: Tensor | None) -> Tensor:
        return times(self.matrix(), x)


def glora(own: Tensors, x: Tensor | None, base: BaseWeight) -> Tensor:
    a1, a2, b1, b2 = (own[name].flatten(1) for name in GLORA)
    inner = a1 @ a2  # W A1 A2: over the inputs, at each place of the kernel alike
    if x is None:
        moved = torch.einsum("oi...,ij->oj...", base.read(), inner).flatten(1)
    else:
        moved = base.times((inner @ x.reshape(inner.shape[1], -1)).flatten())
    return scale_of(own, len(a2)) * (moved + b1 @ times(b2, x))


def full(own: Tensors, x: Tensor | None, base: BaseWeight) -> Tensor:
    change = times(own["diff"].flatten(1), x)
    return change if x is None or "diff_b" not in own else change + own["diff_b"]


def _rotations(own: Tensors) -> Tensor:
    """R of every block. alpha is the bound itself; 0: no bound."""
    return rotations(own["oft_blocks"], float(own[ALPHA]) if ALPHA in own else 0.0)


def oft(own: Tensors, x: Tensor | None, base: BaseWeight) -> Tensor:
    """ComfyUI reads `rescale` and does not use it here."""
    plain, turn = base.times(x), _rotations(own)
    blocks = plain.unflatten(0, turn.shape[:2])
    return torch.einsum("knm,kn...->km...", turn, blocks).flatten(0, 1) - plain


def boft(own: Tensors, x: Tensor | None, base: BaseWeight) -> Tensor:
    """Rotations of pairs of halves, further apart from factor to factor."""
    plain = base.times(x)
    found = butterfly(_rotations(own), plain)
    if "rescale" in own:  # one learned factor per row
        found = found * own["rescale"].reshape(-1, *[1] * (found.dim() - 1))
    return found - plain


def norm(own: Tensors, x: Tensor | None, base: BaseWeight) -> Tensor:
    """Scale and shift of a norm, for its normalised input (rows, positions)."""
    assert x is not None
    change = own["w_norm"][:, None] * x
    return change + own["b_norm"][:, None] if "b_norm" in own else change


Product = Callable[[Tensors, Tensor | None, BaseWeight], Tensor]


def _of_factors(product: Callable[[Tensors, Tensor | None], Tensor]) -> Product:
    """A formula of factors alone."""
    return lambda own, x, base: product(own, x)


@dataclass(frozen=True)
class Formula:
    """A kind of adapters: which suffixes make it one, which others belong to it, and its formula."""

    needs: tuple[frozenset[str], ...]  # one of these sets
    may: frozenset[str]
    product: Product
    axes: int | None = None  # of oft_blocks

    def claims(self, own: Tensors) -> bool:
        return any(need <= own.keys() for need in self.needs) and (
            self.axes is None or own["oft_blocks"].dim() == self.axes
        )

    def suffixes(self) -> frozenset[str]:
        return self.may.union(*self.needs)


SMALL = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
LARGE = (frozenset({"lokr_w2"}), frozenset({"lokr_w2_a", "lokr_w2_b"}))
ROTATED = (frozenset({"oft_blocks"}),)
WITH_ALPHA = frozenset({ALPHA, DORA})
FORMULAS = {
    "LoRA": Formula((frozenset({DOWN, UP}),), WITH_ALPHA | {MID}, _of_factors(lora)),
    "LoHa": Formula((frozenset(LOHA),), WITH_ALPHA | {"hada_t1", "hada_t2"}, _of_factors(loha)),
    "LoKr": Formula(tuple(one | two for one in SMALL for two in LARGE), WITH_ALPHA | {"lokr_t2"}, _of_factors(lokr)),
    "GLoRA": Formula((frozenset(GLORA),), WITH_ALPHA, glora),
    "OFT": Formula(ROTATED, WITH_ALPHA | {"rescale"}, oft, axes=3),
    "BOFT": Formula(ROTATED, WITH_ALPHA | {"rescale"}, boft, axes=4),
    "norm": Formula((frozenset({"w_norm"}),), frozenset({"b_norm"}), norm),
    "full": Formula((frozenset({"diff"}),), frozenset({"diff_b"}), full),
}
ON_WEIGHT = ("GLoRA", "OFT", "BOFT")  # kinds whose change is made of W


# ---- DoRA ---------------------------------------------------------------------------------------------------------


def change_of(kind: Formula, own: Tensors, x: Tensor, base: BaseWeight, decompose: str) -> Tensor:
    """What is added to W x. decompose: how DoRA magnitudes are used: "comfy", "peft" or "forge"."""
    change = kind.product(own, x, base)
    if DORA not in own:
        return change
    magnitude, plain = own[DORA], base.times(x)
    rows = base.shape[0]
    by_rows = magnitude.shape[0] == rows if decompose != "peft" else True
    if decompose == "peft" or (decompose == "comfy" and by_rows):
        weight = base.matrix()
        divided = weight if decompose == "comfy" else weight + kind.product(own, None, base)
        return (plain + change) * (magnitude.flatten() / (divided.norm(dim=1) + EPS)) - plain
    changed = (base.matrix() + kind.product(own, None, base)).reshape(base.shape)
    columns = changed.transpose(0, 1).flatten(1).norm(dim=1) + EPS  # one per input
    places = math.prod(base.shape[2:])
    if by_rows:  # Forge divides by the norms of the inputs all the same
        return (changed.flatten(1) @ (x / columns.repeat_interleave(places))) * magnitude.flatten() - plain
    return changed.flatten(1) @ (x * (magnitude.flatten() / columns).repeat_interleave(places)) - plain
