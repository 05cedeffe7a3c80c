# SPDX-License-Identifier: Apache-2.0
"""ΔW of one layer of an adapter file, from its tensors and the base model's weight: every kind that files hold.

LoRA, LoHa and LoKr are sums of factors alone. The others (networks of LyCORIS) change the weight they are put on:
GLoRA (arXiv:2306.07967) W A + B, IA3 (arXiv:2205.05638) rows or columns times a number, OFT (arXiv:2306.07280) and BOFT
(arXiv:2311.06243) rotations of the rows. All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from einops import rearrange
from torch import Tensor

from library.adapters.formats.layer_tensors import ALPHA, COMFY_DORA, DORA, DOWN, MID, UP, Tensors, scale_of
from library.adapters.target_spec import TargetSpec

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
TINY = 1e-8  # LyCORIS: keeps the norm of a rotation by nothing from being 0


# ---- sums of factors: scale * ΔW x; without x scale * ΔW as a matrix (rows, columns) --------------------------------


def lora(own: Tensors, x: Tensor | None = None) -> Tensor:
    down = own[DOWN]
    if MID in own:  # 1x1, kernel, 1x1
        down = torch.einsum("rs...,si->ri...", own[MID], down.flatten(1))
    return scale_of(own) * (own[UP].flatten(1) @ times(down.flatten(1), x))


def loha(own: Tensors, x: Tensor | None = None) -> Tensor:
    scale = scale_of(own, len(own["hada_w1_b"]))
    if x is not None and "hada_t1" not in own:  # row by row a1 (b1 * x) b2ᵀ a2ᵀ, without a matrix as large as W
        a1, b1, a2, b2 = (own[name] for name in LOHA)
        return scale * ((a1 @ ((b1 * x) @ b2.T)) * a2).sum(1)
    first, second = (_tucker(own, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
    return scale * times(first * second, x)


def lokr(own: Tensors, x: Tensor | None = None) -> Tensor:
    small = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    large = own["lokr_w2"].flatten(1) if "lokr_w2" in own else _tucker(own, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    rank = next((len(own[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in own), None)
    scale = 1.0 if rank is None else scale_of(own, rank)  # of full matrices no reader knows a rank
    if x is None:
        return scale * torch.kron(small, large)
    return scale * (small @ (x.reshape(small.shape[1], -1) @ large.T)).flatten()


def times(matrix: Tensor, x: Tensor | None) -> Tensor:
    return matrix if x is None else matrix @ x


def _tucker(own: Tensors, a: str, b: str, core: str) -> Tensor:
    """a · b, or in Tucker form the core between them, as a matrix."""
    if core not in own:
        return own[a] @ own[b]
    return torch.einsum("rs...,ro,si->oi...", own[core], own[a], own[b]).flatten(1)


def added(own: Tensors, shape: torch.Size) -> Tensor | None:
    """scale * ΔW of a LoRA, LoHa or LoKr in the shape of its weight, float32; None for other kinds."""
    own = {name: value.float() for name, value in own.items()}
    if {DOWN, UP} <= set(own):
        return lora(own).reshape(shape)
    if set(LOHA) <= set(own):
        return loha(own).reshape(shape)
    return lokr(own).reshape(shape) if any(name.startswith("lokr_") for name in own) else None


def adapted_weight(own: Tensors, weight: Tensor) -> Tensor:
    """W + ΔW in float32: the V of DoRA (arXiv:2402.09353, equation 5)."""
    change = added(own, weight.shape)
    if change is None:
        raise ValueError(f"no DoRA has {', '.join(sorted(own))}")
    return weight.float() + change


def row_norms(weight: Tensor) -> Tensor:
    return weight.float().flatten(1).norm(dim=1)


# ---- DoRA: ComfyUI divides by ‖W‖ where all others divide by ‖V‖ --------------------------------------------------


def kohya_dora(own: Tensors, target: TargetSpec) -> dict[str, Tensor]:
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
    scale = strength * scale_of(own, len(a2))
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
    return butterfly(turns, weight) * _rescale(own, weight, strength)


def butterfly(turns: Tensor, rows: Tensor) -> Tensor:
    """`rows` after each of `turns` (factors, blocks, size, size)."""
    half = turns.shape[-1] // 2
    for stage, turn in enumerate(turns):
        apart = 2**stage * half
        mixed = rearrange(rows, "(b two apart) ... -> (b apart two) ...", two=2, apart=apart)
        mixed = torch.einsum("bij,bj...->bi...", turn, mixed.unflatten(0, (-1, 2 * half))).flatten(0, 1)
        rows = rearrange(mixed, "(b apart two) ... -> (b two apart) ...", two=2, apart=apart)
    return rows


def _turns(own: Tensors, rows: int, strength: float) -> Tensor:
    """1 + strength (R - 1), where the bound is alpha times the rows."""
    turns = rotations(own["oft_blocks"].float(), float(own.get(ALPHA, torch.zeros(()))) * rows)
    one = torch.eye(turns.shape[-1], device=turns.device)
    return one + strength * (turns - one)


def rotations(free: Tensor, bound: float) -> Tensor:
    """R = (1 + Q)(1 - Q)⁻¹ with Q = A - Aᵀ, whose norm over all blocks is at most `bound`; 0 means no bound."""
    skew = free - free.transpose(-1, -2)
    norm = float(skew.norm()) + TINY
    if 0 < bound < norm:
        skew = skew * (bound / norm)
    one = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device)
    return (one + skew) @ torch.linalg.inv(one - skew)


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
