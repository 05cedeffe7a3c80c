# SPDX-License-Identifier: Apache-2.0
"""Targets of adapters in SANA, and the --network_args that choose them and their ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from library.adapters.foreign.published_classes import class_names
from library.adapters.options import block_ranges, rank_list
from library.adapters.table_targets import TableTargets, count, table_targets
from library.adapters.target_spec import TargetSpec
from library.adapters.type_ranks import TypeRanks, check_blocks, raise_problems
from library.families.sana.adapter_names import BLOCKS
from library.families.sana.names import sana_names
from library.options import at_least, option

CLASSES = ("SanaTransformer2DModel",)
EMBEDDERS = ("x_embedder", "t_embedder", "t_block", "y_embedder")
DEPTHWISE = "depth_conv"  # one filter per channel: nothing there has a low rank
CLASS_NAMES = class_names(
    "SanaMS",
    (r"(blocks\.\d+)\.", "SanaMSBlock"),
    (r"(blocks\.\d+\.attn)\.", "LiteLA", "SelfAttention"),
    (r"(blocks\.\d+\.cross_attn)\.", "MultiHeadCrossAttention", "CrossAttention"),
    (r"(blocks\.\d+\.mlp)\.", "GLUMBConv", "MLP"),
    (r"(x_embedder)\.", "PatchEmbedMS"),
    (r"(t_embedder)\.", "TimestepEmbedder"),
    (r"(y_embedder)\.", "CaptionEmbedder"),
    (r"(final_layer)\.", "T2IFinalLayer"),
)


@dataclass(frozen=True)
class SanaRankOptions:
    """Ranks by the type of a layer, and which blocks learn. Rank 0: no adapter."""

    attn_dim: int | None = option(None, help="Rank of queries, keys and values.", check=at_least(0))
    out_dim: int = option(0, help="Rank of the attentions' output layers.", check=at_least(0))
    mlp_dim: int = option(0, help="Rank of the 1x1 convolutions of the Mix-FFN.", check=at_least(0))
    embedder_dims: tuple[int, ...] | None = option(
        None, help="Ranks of x_embedder, t_embedder, t_block, y_embedder, with commas.",
        parse=rank_list(len(EMBEDDERS)), check=at_least(0),
    )  # fmt: skip
    train_block_indices: tuple[tuple[int, int], ...] | None = option(
        None, help="Blocks that learn: all, none, or numbers and ranges such as 0-3,7.", parse=block_ranges
    )


def denoiser_targets(model: nn.Module) -> list[TargetSpec]:
    """Every layer that an adapter file may name."""
    targets = table_targets(sana_names(count(model, "transformer_blocks")), model)
    return [target for target in targets if DEPTHWISE not in target.name]


def rank_rules(options: SanaRankOptions, dim: int, targets: list[TargetSpec]) -> TypeRanks:
    """The ranks that the options ask for. Raises UserError for blocks that the model does not have."""
    raise_problems(check_blocks("train_block_indices", options.train_block_indices, BLOCKS, targets))
    return TypeRanks(
        dim,
        (BLOCKS,),
        types=(
            ((BLOCKS, "attn_qkv"), options.attn_dim),
            ((BLOCKS, "_linear"), options.attn_dim),
            ((BLOCKS, "attn_proj"), options.out_dim),
            ((BLOCKS, "_mlp_"), options.mlp_dim),
        ),
        outside=dict(zip(EMBEDDERS, options.embedder_dims or ())),
        blocks={BLOCKS: options.train_block_indices},
    )


TARGETS = TableTargets(CLASSES, CLASS_NAMES, SanaRankOptions, denoiser_targets, rank_rules)
