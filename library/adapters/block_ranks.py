# SPDX-License-Identifier: Apache-2.0
"""Ranks, alphas and learning-rate factors per block of a U-Net, from --network_args.

The blocks of a U-Net are numbered down, middle, up; SDXL files put one more (embeddings, output) at each end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from library.adapters.options import BlockOptions
from library.adapters.target_spec import TargetSpec
from library.errors import UserError, raise_problems
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


RankAlpha = tuple[int, float]  # rank 0: no adapter


@dataclass(frozen=True)
class RankPlan:
    """Rank and alpha of every target, and the learning-rate factor of every block (None: one rate for all)."""

    others: RankAlpha
    convolutions: RankAlpha  # with a 3x3 kernel
    has_conv: bool  # whether those get adapters
    blocks: tuple[RankAlpha, ...] | None = None  # in place of `others`, by block of the denoiser
    conv_blocks: tuple[RankAlpha, ...] | None = None  # in place of `convolutions`
    lr_weights: tuple[float, ...] | None = None

    def rank_alpha(self, target: TargetSpec, *, is_3x3: bool) -> RankAlpha:
        """Rank and alpha of a target."""
        blocks = self.conv_blocks if is_3x3 else self.blocks
        if blocks is None or target.part != "denoiser" or target.block is None:
            return self.convolutions if is_3x3 else self.others
        return blocks[target.block]


def plan_ranks(options: BlockOptions, layout: BlockLayout | None, *, dim: int, alpha: float) -> RankPlan:
    """The ranks for an architecture (layout None: it has no numbered blocks).

    Raises UserError for lists of the wrong length, and for lists without a layout.
    """
    conv_alpha = 1.0 if options.conv_alpha is None else options.conv_alpha
    plain = RankPlan((dim, alpha), (options.conv_dim or 0, conv_alpha), options.conv_dim is not None)
    lists = {"block_dims": options.block_dims, "block_alphas": options.block_alphas,
             "conv_block_dims": options.conv_block_dims, "conv_block_alphas": options.conv_block_alphas}  # fmt: skip
    given = {name: values for name, values in lists.items() if values is not None}
    if not given and not options.has_lr_weights:
        return plain
    if layout is None:
        raise UserError("--network_args: ranks, alphas and learning rates per block are not known for this model")
    raise_problems(
        f"--network_args: {name} needs {layout.total} values, got {len(values)}"
        for name, values in given.items()
        if len(values) != layout.total
    )
    weights = block_lr_weights(options, layout)
    kept = [weights is None or weight > 0 for weight in weights or [1.0] * layout.total]

    def by_block(ranks: tuple[int, ...], alphas: tuple[float, ...]) -> tuple[RankAlpha, ...]:
        return tuple((rank if keep else 0, own) for rank, own, keep in zip(ranks, alphas, kept, strict=True))

    total = layout.total
    blocks = by_block(options.block_dims or (dim,) * total, options.block_alphas or (alpha,) * total)
    conv_dims = options.conv_block_dims or (None if options.conv_dim is None else (options.conv_dim,) * total)
    if conv_dims is None:
        return replace(plain, blocks=blocks, lr_weights=weights)
    conv_blocks = by_block(conv_dims, options.conv_block_alphas or (conv_alpha,) * total)
    return replace(plain, has_conv=True, blocks=blocks, conv_blocks=conv_blocks, lr_weights=weights)


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
