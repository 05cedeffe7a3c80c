# SPDX-License-Identifier: Apache-2.0
"""Ranks, alphas and learning-rate factors per block of a U-Net, from --network_args.

The blocks of a U-Net are numbered down, middle, up; SDXL files put one more (embeddings, output) at each end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from library.adapters.options import BlockOptions
from library.adapters.target_spec import TargetSpec
from library.errors import UserError
from library.log import get_logger


@dataclass(frozen=True)
class BlockLayout:
    """Number of blocks of an architecture; `outer` is 1 where lists have one more value at each end."""

    down: int
    mid: int
    up: int
    outer: int = 0

    @property
    def total(self) -> int:
        return self.down + self.mid + self.up + 2 * self.outer


# value at block i of 0..last; the falling curves are the rising ones read backwards
CURVES: dict[str, Callable[[int, int], float]] = {
    "sine": lambda i, last: math.sin(math.pi / 2 * i / last),
    "cosine": lambda i, last: math.sin(math.pi / 2 * (last - i) / last),
    "linear": lambda i, last: i / last,
    "reverse_linear": lambda i, last: (last - i) / last,
    "zeros": lambda i, last: 0.0,
}


@dataclass(frozen=True)
class RankPlan:
    """Rank and alpha of every target, and the learning-rate factor of every block (None: one rate for all)."""

    dim: int
    alpha: float
    conv_dim: int | None
    conv_alpha: float
    dims: tuple[int, ...] | None = None
    alphas: tuple[float, ...] | None = None
    conv_dims: tuple[int, ...] | None = None
    conv_alphas: tuple[float, ...] | None = None
    lr_weights: tuple[float, ...] | None = None

    @property
    def has_conv(self) -> bool:
        return self.conv_dim is not None or self.conv_dims is not None

    def rank_alpha(self, target: TargetSpec, *, is_3x3: bool) -> tuple[int, float]:
        """Rank (0: no adapter) and alpha of a target."""
        by_block = target.part == "denoiser" and target.block is not None and self.dims is not None
        if is_3x3:
            if by_block and self.conv_dims and self.conv_alphas:
                return self.conv_dims[target.block or 0], self.conv_alphas[target.block or 0]
            return self.conv_dim or 0, self.conv_alpha
        if by_block and self.dims and self.alphas:
            return self.dims[target.block or 0], self.alphas[target.block or 0]
        return self.dim, self.alpha


def plan_ranks(options: BlockOptions, layout: BlockLayout | None, *, dim: int, alpha: float) -> RankPlan:
    """The ranks for an architecture (layout None: it has no numbered blocks).

    Raises UserError for lists of the wrong length, and for lists without a layout.
    """
    conv_alpha = 1.0 if options.conv_alpha is None else options.conv_alpha
    plain = RankPlan(dim, alpha, options.conv_dim, conv_alpha)
    lists = {"block_dims": options.block_dims, "block_alphas": options.block_alphas,
             "conv_block_dims": options.conv_block_dims, "conv_block_alphas": options.conv_block_alphas}  # fmt: skip
    given = {name: values for name, values in lists.items() if values is not None}
    if not given and not options.has_lr_weights:
        return plain
    if layout is None:
        raise UserError("--network_args: ranks, alphas and learning rates per block are not known for this model")
    wrong = [f"--network_args: {name} needs {layout.total} values, got {len(values)}" for name, values in given.items()
             if len(values) != layout.total]  # fmt: skip
    if wrong:
        raise UserError(wrong)
    weights = block_lr_weights(options, layout)
    kept = [weights is None or weight > 0 for weight in weights or [1.0] * layout.total]

    def ranks(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(value if keep else 0 for value, keep in zip(values, kept, strict=True))

    conv_dims = options.conv_block_dims or (None if options.conv_dim is None else (options.conv_dim,) * layout.total)
    return RankPlan(
        dim, alpha, options.conv_dim, conv_alpha,
        dims=ranks(options.block_dims or (dim,) * layout.total),
        alphas=options.block_alphas or (alpha,) * layout.total,
        conv_dims=None if conv_dims is None else ranks(conv_dims),
        conv_alphas=None if conv_dims is None else options.conv_block_alphas or (conv_alpha,) * layout.total,
        lr_weights=weights,
    )  # fmt: skip


def block_lr_weights(options: BlockOptions, layout: BlockLayout) -> tuple[float, ...] | None:
    """Learning-rate factor of each block, or None when no option gives any. Values up to the threshold become 0."""
    if not options.has_lr_weights:
        return None
    parts = (
        _numbers("down_lr_weight", options.down_lr_weight, layout.down),
        _numbers("mid_lr_weight", options.mid_lr_weight, layout.mid),
        _numbers("up_lr_weight", options.up_lr_weight, layout.up),
    )
    threshold = options.block_lr_zero_threshold or 0.0
    outer = [1.0] * layout.outer
    return tuple(0.0 if value <= threshold else value for value in (*outer, *parts[0], *parts[1], *parts[2], *outer))


def _numbers(name: str, given: str | tuple[float, ...] | None, count: int) -> list[float]:
    """`count` factors, from a list (truncated, or padded with 1) or a curve with its base."""
    if given is None:
        return [1.0] * count
    if isinstance(given, str):
        curve, _, base = given.partition("+")
        return [CURVES[curve.strip()](i, max(count - 1, 1)) + float(base or 0) for i in range(count)]
    if len(given) != count:
        done = "the others are 1" if len(given) < count else "the rest is not used"
        get_logger().warning("--network_args: %s has %d values of %d; %s", name, len(given), count, done)
    return [*given[:count], *[1.0] * (count - len(given))]
