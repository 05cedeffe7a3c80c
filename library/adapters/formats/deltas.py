# SPDX-License-Identifier: Apache-2.0
"""ΔW of one layer of an adapter file, from its tensors and the base model's weight: every kind that files hold.

LoRA, LoHa and LoKr are sums of factors alone. The others (networks of LyCORIS) change the weight they are put on:
GLoRA (arXiv:2306.07967) W A + B, IA3 (arXiv:2205.05638) rows or columns times a number, OFT (arXiv:2306.07280) and BOFT
(arXiv:2311.06243) rotations of the rows. All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from library.adapters.formats.layer_tensors import ALPHA, COMFY_DORA, DORA, DOWN, MID, UP, Tensors, scale_of

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
TINY = 1e-8  # LyCORIS: keeps the norm of a rotation by nothing from being 0


# ---- sums of factors ----------------------------------------------------------------------------------------------


def added(own: Tensors, shape: torch.Size) -> Tensor | None:
    """scale * ΔW of a LoRA, LoHa or LoKr in the shape of its weight; None for other kinds."""
    own = {name: value.float() for name, value in own.items()}
    if {DOWN, UP} <= set(own):
        return (_lora(own) * scale_of(own)).reshape(shape)
    if set(LOHA) <= set(own):
        first, second = (_tucker(own, f"hada_{w}_a", f"hada_{w}_b", f"hada_t{w[1]}") for w in ("w1", "w2"))
        return (first.reshape(shape) * second.reshape(shape)) * _scale(own, len(own["hada_w1_b"]))
    if any(name.startswith("lokr_") for name in own):
        return _lokr(own, shape)
    return None


def _lora(own: Tensors) -> Tensor:
    down = own[DOWN]
    if MID in own:  # 1x1, kernel, 1x1
        down = torch.einsum("rskl,si->rikl", own[MID], down.flatten(1))
    return own[UP].flatten(1) @ down.flatten(1)


def _tucker(own: Tensors, a: str, b: str, core: str) -> Tensor:
    """a · b, or in Tucker form the core between them."""
    if core not in own:
        return own[a] @ own[b]
    return torch.einsum("rshw,ro,si->oihw", own[core], own[a], own[b])


def _lokr(own: Tensors, shape: torch.Size) -> Tensor:
    small = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    large = own["lokr_w2"] if "lokr_w2" in own else _tucker(own, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    rank = next((len(own[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in own), None)
    scale = 1.0 if rank is None else _scale(own, rank)  # of full matrices no reader knows a rank
    large = large.reshape(shape[0] // small.shape[0], shape[1] // small.shape[1], *shape[2:])
    return torch.kron(small.reshape(*small.shape, *[1] * (len(shape) - 2)), large.contiguous()) * scale


def _scale(own: Tensors, rank: int) -> float:
    return float(own[ALPHA]) / rank if ALPHA in own else 1.0


def adapted_weight(own: Tensors, weight: Tensor) -> Tensor:
    """W + ΔW in float32: the V of DoRA (arXiv:2402.09353, equation 5)."""
    change = added(own, weight.shape)
    if change is None:
        raise ValueError(f"no DoRA has {', '.join(sorted(own))}")
    return weight.float() + change


def row_norms(weight: Tensor) -> Tensor:
    return weight.float().flatten(1).norm(dim=1)


# ---- DoRA: ComfyUI divides by ‖W‖ where all others divide by ‖V‖ --------------------------------------------------


class HasWeight(Protocol):
    """Anything with the weight that an adapter is on; reading it may be expensive."""

    @property
    def weight(self) -> Tensor: ...


def kohya_dora(own: Tensors, target: HasWeight) -> dict[str, Tensor]:
    """The tensors with DoRA magnitudes as trained, in place of ComfyUI's."""
    if COMFY_DORA not in own:
        return dict(own)
    weight = target.weight
    beside = {name: value.to(weight.device) for name, value in own.items()}
    factor = (row_norms(adapted_weight(beside, weight)) / row_norms(weight)).cpu()
    magnitude = own[COMFY_DORA]
    rest = {name: value for name, value in own.items() if name != COMFY_DORA}
    return {**rest, DORA: scaled_rows(magnitude, factor)}


def scaled_rows(magnitude: Tensor, factor: Tensor) -> Tensor:
    """Magnitudes of the output axis times one factor per row."""
    factor = factor.to(magnitude.device).reshape(-1, *[1] * (magnitude.dim() - 1))
    return (magnitude.float() * factor).to(magnitude.dtype)


# ---- kinds of LyCORIS that work on the weight ---------------------------------------------------------------------


def full(own: Tensors, weight: Tensor, strength: float) -> Tensor:
    return weight + strength * own["diff"].float().reshape(weight.shape)


def ia3(own: Tensors, weight: Tensor, strength: float) -> Tensor:
    """W (1 + w), on the columns or on the rows."""
    axis = 1 if int(own["on_input"]) else 0
    shape = [1] * weight.dim()
    shape[axis] = weight.shape[axis]
    return weight * (1 + strength * own["weight"].float().reshape(shape))


def glora(own: Tensors, weight: Tensor, strength: float) -> Tensor:
    """W + scale (W a1 a2 + b1 b2), b in Tucker form where bm is there."""
    a1, a2, b1, b2 = (own[name].float() for name in GLORA)
    scale = strength * _scale(own, len(a2))
    if "bm.weight" in own:
        b2 = torch.einsum("rskl,si->rikl", own["bm.weight"].float(), b2.flatten(1))
    inside = torch.einsum("oi...,ij->oj...", weight, a1.flatten(1) @ a2.flatten(1))
    return weight + scale * (inside + (b1.flatten(1) @ b2.flatten(1)).reshape(weight.shape))


def diag_oft(own: Tensors, weight: Tensor, strength: float) -> Tensor:
    """(1 + strength (R - 1))ᵀ W in blocks of rows; `rescale` multiplies the rows of the result."""
    turns = _turns(own, len(weight), strength)
    blocks = weight.reshape(turns.shape[0], turns.shape[1], *weight.shape[1:])
    turned = torch.einsum("knm,kn...->km...", turns, blocks).reshape(weight.shape)
    return turned * _rescale(own, weight, strength)


def boft(own: Tensors, weight: Tensor, strength: float) -> Tensor:
    """Rotations one after the other, each in blocks of rows that lie 2^i half blocks apart (a butterfly)."""
    turns = _turns(own, len(weight), strength)
    half = turns.shape[-1] // 2
    found = weight
    for stage, turn in enumerate(turns):
        apart = 2**stage * half
        mixed = found.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, 2 * half))
        mixed = torch.einsum("bij,bj...->bi...", turn, mixed).flatten(0, 1)
        found = mixed.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    return found * _rescale(own, weight, strength)


def _turns(own: Tensors, rows: int, strength: float) -> Tensor:
    """R = (1 + Q)(1 - Q)⁻¹ with Q = A - Aᵀ, bounded by alpha times the rows; alpha 0 means no bound."""
    free = own["oft_blocks"].float()
    skew = free - free.transpose(-1, -2)
    bound = float(own.get(ALPHA, torch.zeros(()))) * rows
    norm = float(skew.norm()) + TINY
    if 0 < bound < norm:
        skew = skew * (bound / norm)
    one = torch.eye(free.shape[-1], device=free.device)
    turn = (one + skew) @ torch.linalg.inv(one - skew)
    return one + strength * (turn - one)


def _rescale(own: Tensors, weight: Tensor, strength: float) -> Tensor | float:
    if "rescale" not in own:
        return 1.0
    return 1 + strength * (own["rescale"].float().reshape(-1, *[1] * (weight.dim() - 1)) - 1)


Rewrite = Callable[[Tensors, Tensor, float], Tensor]  # (tensors, W, strength) -> W with the adapter


def rewrite_of(own: Mapping[str, Tensor]) -> Rewrite | None:
    """The function that applies a kind of LyCORIS to a weight; None for other kinds of adapters."""
    if "oft_blocks" in own:
        return boft if own["oft_blocks"].dim() == 4 else diag_oft
    marks = (("a1.weight", glora), ("on_input", ia3), ("diff", full))
    return next((rewrite for mark, rewrite in marks if mark in own), None)
