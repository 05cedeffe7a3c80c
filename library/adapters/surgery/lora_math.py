# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the LoRA tools: ΔW as two thin matrices, its singular values, new ranks, sums.

ΔW of a LoRA is never formed to decompose it. With up = Q₁ R₁ and downᵀ = Q₂ R₂ its singular values are those of the
small R₁ R₂ᵀ, so the exact decomposition of a layer of FLUX.1 takes milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.adapters.formats.damage import damaged_if_broken
from library.adapters.formats.layer_tensors import ALPHA, BIAS_ADDED, COMFY_DORA, DORA, DOWN, MID, UP, Tensors, scale_of
from library.errors import UserError

SMALLEST = 1e-6  # a matrix whose largest singular value is not above this counts as zero
FACTORS = {DOWN, UP, MID, ALPHA}
ADDED = {"w_norm", "b_norm", "diff", BIAS_ADDED}  # what is added to scale and shift of a norm, to a weight, to a bias


# ---- ΔW -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """ΔW as up (rows, r) times down (r, columns), float32, alpha / rank inside."""

    up: Tensor
    down: Tensor
    shape: tuple[int, ...]  # of the weight: (rows, inputs) or (rows, inputs, kh, kw)

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def is_3x3(self) -> bool:
        """Whether it is a convolution with a kernel: those have ranks of their own."""
        return has_kernel(self.shape)

    def weight(self) -> Tensor:
        return (self.up @ self.down).reshape(self.shape)

    def times(self, factor: float) -> Change:
        return Change(self.up * factor, self.down, self.shape)


def has_kernel(shape: Sequence[int]) -> bool:
    return len(shape) == 4 and tuple(shape[2:]) != (1, 1)


def is_lora(own: Tensors) -> bool:
    """Whether a layer is a plain LoRA: up times down, perhaps in Tucker form."""
    return {DOWN, UP} <= set(own) <= FACTORS


def change_of(name: str, own: Tensors, device: torch.device | str = "cpu") -> Change:
    """ΔW of a layer of a file. Raises UserError for tensors that are no plain LoRA."""
    if not is_lora(own):
        raise UserError(not_lora(name, own))
    with damaged_if_broken(name):
        up, down = own[UP].to(device, torch.float32).flatten(1), own[DOWN].to(device, torch.float32)
        if MID in own:  # 1x1, kernel, 1x1
            down = torch.einsum("rskl,si->rikl", own[MID].to(device, torch.float32), down.flatten(1))
        return Change(up * scale_of(own), down.flatten(1), (len(up), *down.shape[1:]))


def not_lora(name: str, own: Tensors) -> str:
    """Error message for a layer that can be neither summed nor decomposed without the model."""
    why = "a DoRA scales the model's weights" if {DORA, COMFY_DORA} & set(own) else f"it has {', '.join(sorted(own))}"
    return f"{name} is no plain LoRA ({why}): merge the file into a model (merge_lora.py --sd_model)"


# ---- singular values ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """U diag(S) Vᵀ of a matrix: U (rows, n), S (n) from large to small, Vᵀ (n, columns)."""

    u: Tensor
    s: Tensor
    vt: Tensor

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best approximation of that rank (Eckart-Young): up = U diag(S), down = Vᵀ."""
        return self.u[:, :rank] * self.s[:rank], self.vt[:rank]


def spectrum_of_change(change: Change) -> Spectrum:
    """The exact singular values of ΔW, at most `rank`, from its two thin matrices."""
    up_q, up_r = torch.linalg.qr(change.up)
    down_q, down_r = torch.linalg.qr(change.down.T)
    found = spectrum(up_r @ down_r.T)
    return Spectrum(up_q @ found.u, found.s, found.vt @ down_q.T)


def spectrum(matrix: Tensor) -> Spectrum:
    """The decomposition of a matrix (rows, columns)."""
    return Spectrum(*torch.linalg.svd(matrix, full_matrices=False))


def clamped(up: Tensor, down: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Both matrices limited to plus and minus the `quantile` of all their numbers; 1 limits nothing.

    A few large numbers make a LoRA sensitive to the strength at which it is used.
    """
    if quantile >= 1:
        return up, down
    numbers = torch.cat([up.flatten(), down.flatten()])
    place = quantile * (len(numbers) - 1)  # torch.quantile refuses more than 16 million numbers
    low = numbers.kthvalue(math.floor(place) + 1).values
    high = numbers.kthvalue(math.ceil(place) + 1).values
    limit = torch.lerp(low, high, place - math.floor(place)).abs()
    return up.clamp(-limit, limit), down.clamp(-limit, limit)


# ---- how many singular values are kept ----------------------------------------------------------------------------


def rank_by_ratio(s: Tensor, target: float) -> int:
    """sv_ratio: the values that are above the largest one divided by `target`: #{i: S_i > S_1 / target}."""
    return int((s > s[0] / target).sum())


def rank_by_sum(s: Tensor, target: float) -> int:
    """sv_cumulative: the fewest values whose sum is `target` of all: min {n: Σ_{i≤n} S_i / Σ S_i ≥ target}."""
    return 1 + int((s.cumsum(0) / s.sum() < target).sum())


def rank_by_norm(s: Tensor, target: float) -> int:
    """sv_fro: the fewest values that keep `target` of ‖ΔW‖: min {n: Σ_{i≤n} S_i² / Σ S_i² ≥ target²}."""
    return 1 + int((s.square().cumsum(0) / s.square().sum() < target**2).sum())


DYNAMIC: dict[str, Callable[[Tensor, float], int]] = {
    "sv_ratio": rank_by_ratio,
    "sv_fro": rank_by_norm,
    "sv_cumulative": rank_by_sum,
}


def choose_rank(s: Tensor, largest: int, method: str | None, target: float) -> int:
    """Number of singular values to keep by a method: at least 1, at most `largest` and all that there are.

    A matrix of zeros gets rank 1.
    """
    if not len(s) or s[0] <= SMALLEST:
        return 1
    wanted = largest if method is None else DYNAMIC[method](s, target)
    return max(1, min(wanted, largest, len(s)))


@dataclass(frozen=True)
class RankStatistics:
    """How much of a layer is kept with `rank` of its singular values."""

    rank: int
    of_sum: float  # Σ kept / Σ all
    of_norm: float  # ‖kept‖ / ‖all‖
    ratio: float  # largest / smallest of those that are kept

    @classmethod
    def of(cls, s: Tensor, rank: int) -> RankStatistics:
        if not len(s) or float(s[0]) == 0:
            return cls(rank, 1.0, 1.0, 1.0)
        kept = s[:rank]
        smallest = float(kept[-1])
        ratio = float(s[0]) / smallest if smallest else math.inf
        return cls(rank, float(kept.sum() / s.sum()), float(kept.norm() / s.norm()), ratio)


# ---- several into one ---------------------------------------------------------------------------------------------


def joined(changes: Sequence[tuple[Change, float]]) -> Change:
    """Σ factor · ΔW as one change whose rank is the sum of the ranks. Raises ValueError when the shapes differ.

    The factor is shared by both matrices, so that neither leaves the range of half precision.
    """
    if len({change.shape for change, _ in changes}) > 1:
        raise ValueError("different shapes: " + " and ".join(str(c.shape) for c, _ in changes))
    ups = [change.up * math.sqrt(abs(factor)) for change, factor in changes]
    downs = [change.down * math.copysign(math.sqrt(abs(factor)), factor) for change, factor in changes]
    return Change(torch.cat(ups, 1), torch.cat(downs), changes[0][0].shape)


def summed(layers: Sequence[tuple[Tensors, float]]) -> dict[str, Tensor]:
    """Matrices of one rank, each sum on its own: up = Σ |f| √(α/α₁) up, down = Σ f √(α/α₁) down, alpha = α₁.

    This is how sd-scripts merges files. It is not the sum of the changes: up and down of different files are multiplied
    too, and a ratio counts twice. Raises ValueError when ranks or shapes differ.
    """
    first = layers[0][0]
    if any(own[name].shape != first[name].shape for own, _ in layers for name in (UP, DOWN)):
        raise ValueError("different ranks: " + " and ".join(str(len(own[DOWN])) for own, _ in layers))
    alphas = [scale_of(own) * len(own[DOWN]) for own, _ in layers]
    base = alphas[0]
    factors = [factor * math.sqrt(alpha / base) for (_, factor), alpha in zip(layers, alphas)]
    up = sum(abs(f) * own[UP].float() for f, (own, _) in zip(factors, layers))
    down = sum(f * own[DOWN].float() for f, (own, _) in zip(factors, layers))
    assert isinstance(up, Tensor) and isinstance(down, Tensor)
    return {ALPHA: torch.tensor(base), DOWN: down, UP: up}


def as_tensors(up: Tensor, down: Tensor, shape: Sequence[int], alpha: float) -> dict[str, Tensor]:
    """Two matrices as a file has them. `shape` is that of the weight; up is 1x1 where it is a convolution."""
    rank, kernel = len(down), tuple(shape[2:])
    return {
        ALPHA: torch.tensor(float(alpha)),
        DOWN: down.reshape(rank, shape[1], *kernel).cpu().contiguous(),
        UP: up.reshape(len(up), rank, *(1 for _ in kernel)).cpu().contiguous(),
    }
