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

from library.adapters.formats.layer_tensors import ALPHA, DORA, DOWN, MID, UP, Tensors

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class BaseWeight:
    """The layer that is changed, as a matrix (rows, columns), when a formula needs it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def matrix(self) -> Tensor:
        return self.read().flatten(1)

    def times(self, x: Tensor | None) -> Tensor:
        return _times(self.matrix(), x)


def _times(matrix: Tensor, x: Tensor | None) -> Tensor:
    return matrix if x is None else matrix @ x


def _scale(own: Tensors, rank: int) -> float:
    return float(own[ALPHA]) / rank if ALPHA in own else 1.0


def lora(own: Tensors, x: Tensor | None, base: BaseWeight) -> Tensor:
    down = own[DOWN]
    if MID in own:
        down = torch.einsum("rs...,si->ri...", own[MID], down.flatten(1))
    return _scale(own, len(own[DOWN])) * (own[UP].flatten(1) @ _times(down.flatten(1), x))


def loha(own: Tensors, x: Tensor | None, base: BaseWeight) -> Tensor:
    scale = _scale(own, len(own["hada_w1_b"]))
    if x is not None and "hada_t1" not in own:  # row by row a1 (b1 * x) b2ᵀ a2ᵀ, without a matrix as large as W
        (a1, b1), (a2, b2) = ((own[f"hada_w{i}_a"], own[f"hada_w{i}_b"]) for i in ("1", "2"))
        return scale * ((a1 @ ((b1 * x) @ b2.T)) * a2).sum(1)
    halves = []
    for i in ("1", "2"):
        a, b, core = own[f"hada_w{i}_a"], own[f"hada_w{i}_b"], own.get(f"hada_t{i}")
        halves.append(a @ b if core is None else torch.einsum("rs...,ro,si->oi...", core, a, b).flatten(1))
    return scale * _times(halves[0] * halves[1], x)


def lokr(own: Tensors, x: Tensor | None, base: BaseWeight) -> Tensor:
    small, large, rank = own.get("lokr_w1"), own.get("lokr_w2"), 0
    if small is None:
        small, rank = own["lokr_w1_a"] @ own["lokr_w1_b"], len(own["lokr_w1_b"])
    if large is None:
        a, b, core = own["lokr_w2_a"], own["lokr_w2_b"], own.get("lokr_t2")
        large, rank = a @ b if core is None else torch.einsum("rs...,ro,si->oi...", core, a, b), len(b)
    scale = _scale(own, rank) if rank else 1.0
    large = large.flatten(1)
    if x is None:
        return scale * torch.kron(small, large)
    return scale * (small @ (x.reshape(small.shape[1], -1) @ large.T)).flatten()


def glora(own: Tensors, x: Tensor | None, base: BaseWeight) -> Tensor:
    a1, a2, b1, b2 = (own[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    inner = a1 @ a2  # W A1 A2: over the inputs, at each place of the kernel alike
    if x is None:
        moved = torch.einsum("oi...,ij->oj...", base.read(), inner).flatten(1)
    else:
        moved = base.times((inner @ x.reshape(inner.shape[1], -1)).flatten())
    return _scale(own, len(a2)) * (moved + b1 @ _times(b2, x))


def full(own: Tensors, x: Tensor | None, base: BaseWeight) -> Tensor:
    change = _times(own["diff"].flatten(1), x)
    return change if x is None or "diff_b" not in own else change + own["diff_b"]


def _rotations(own: Tensors) -> Tensor:
    """R of every block, by Cayley's formula; alpha bounds the norm of Q over all blocks, 0: no bound."""
    blocks = own["oft_blocks"]
    skew = blocks - blocks.transpose(-1, -2)
    bound, norm = float(own[ALPHA]) if ALPHA in own else 0.0, float(skew.norm()) + 1e-8
    if 0 < bound < norm:
        skew = skew * (bound / norm)
    unit = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    return (unit + skew) @ torch.linalg.inv(unit - skew)


def oft(own: Tensors, x: Tensor | None, base: BaseWeight) -> Tensor:
    """ComfyUI reads `rescale` and does not use it here."""
    plain, turn = base.times(x), _rotations(own)
    blocks = plain.unflatten(0, turn.shape[:2])
    return torch.einsum("knm,kn...->km...", turn, blocks).flatten(0, 1) - plain


def boft(own: Tensors, x: Tensor | None, base: BaseWeight) -> Tensor:
    """Rotations of pairs of halves, further apart from factor to factor."""
    plain, turns = base.times(x), _rotations(own)
    size, found = turns.shape[-1], plain
    for i, turn in enumerate(turns):
        apart = 2**i * (size // 2)
        mixed = found.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        mixed = torch.einsum("bij,bj...->bi...", turn, mixed)
        found = mixed.flatten(0, 1).unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    if "rescale" in own:  # one learned factor per row
        found = found * own["rescale"].reshape(-1, *[1] * (found.dim() - 1))
    return found - plain


def norm(own: Tensors, x: Tensor | None, base: BaseWeight) -> Tensor:
    """Scale and shift of a norm, for its normalised input (rows, positions)."""
    assert x is not None
    change = own["w_norm"][:, None] * x
    return change + own["b_norm"][:, None] if "b_norm" in own else change


@dataclass(frozen=True)
class Formula:
    """A kind of adapters: which suffixes make it one, which others belong to it, and its formula."""

    needs: tuple[frozenset[str], ...]  # one of these sets
    may: frozenset[str]
    product: Callable[[Tensors, Tensor | None, BaseWeight], Tensor]
    axes: int | None = None  # of oft_blocks

    def claims(self, own: Tensors) -> bool:
        return any(need <= own.keys() for need in self.needs) and (
            self.axes is None or own["oft_blocks"].dim() == self.axes
        )

    def suffixes(self) -> frozenset[str]:
        return self.may.union(*self.needs)


HADA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
SMALL = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
LARGE = (frozenset({"lokr_w2"}), frozenset({"lokr_w2_a", "lokr_w2_b"}))
ROTATED = (frozenset({"oft_blocks"}),)
WITH_ALPHA = frozenset({ALPHA, DORA})
FORMULAS = {
    "LoRA": Formula((frozenset({DOWN, UP}),), WITH_ALPHA | {MID}, lora),
    "LoHa": Formula((HADA,), WITH_ALPHA | {"hada_t1", "hada_t2"}, loha),
    "LoKr": Formula(tuple(one | two for one in SMALL for two in LARGE), WITH_ALPHA | {"lokr_t2"}, lokr),
    "GLoRA": Formula((frozenset({"a1.weight", "a2.weight", "b1.weight", "b2.weight"}),), WITH_ALPHA, glora),
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
