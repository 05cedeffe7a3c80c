# SPDX-License-Identifier: Apache-2.0
"""Targets of adapters in SANA, and the --network_args that choose them and their ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from library.adapters.foreign.published_classes import class_names
from library.adapters.options import block_ranges, rank_list
from library.adapters.table_targets import TableTargets, count, table_targets
from library.adapters.target_spec import TargetSpec
from library.adapters.type_ranks import TypeRanks, check_blocks
from library.errors import raise_problems
from library.families.sana.adapter_names import BLOCKS, sana_layers
from library.options import at_least, option

CLASSES = ("SanaTransformer2DModel",)
EMBEDDERS = ("patch_embed", "time_embed", "caption_projection")
DEPTHWISE = "conv_depth"  # one filter per channel: nothing there has a low rank
CLASS_NAMES = class_names(
    "SanaTransformer2DModel",
    (r"(transformer_blocks\.\d+)\.", "SanaTransformerBlock", "SingleDiTBlock"),
    (r"(transformer_blocks\.\d+\.attn[12])\.", "Attention", "SelfAttention"),
    (r"(transformer_blocks\.\d+\.ff)\.", "GLUMBConv", "FeedForward"),
)


@dataclass(frozen=True)
class SanaRankOptions:
    """Ranks by the type of a layer, and which blocks learn. Rank 0: no adapter."""

    attn_dim: int | None = option(None, help="Rank of queries, keys and values.", check=at_least(0))
    out_dim: int = option(0, help="Rank of the attentions' output layers.", check=at_least(0))
    mlp_dim: int = option(0, help="Rank of the 1x1 convolutions of the Mix-FFN.", check=at_least(0))
    embedder_dims: tuple[int, ...] | None = option(
        None, help="Ranks of patch_embed, time_embed, caption_projection, with commas.",
        parse=rank_list(len(EMBEDDERS)), check=at_least(0),
    )  # fmt: skip
    train_block_indices: tuple[tuple[int, int], ...] | None = option(
        None, help="Blocks that learn: all, none, or numbers and ranges such as 0-3,7.", parse=block_ranges
    )


def denoiser_targets(model: nn.Module) -> list[TargetSpec]:
    """Every layer that an adapter file may name."""
    targets = table_targets(sana_layers(count(model, "transformer_blocks")), model)
    return [target for target in targets if DEPTHWISE not in target.name]


def rank_rules(options: SanaRankOptions, dim: int, targets: list[TargetSpec]) -> TypeRanks:
    """The ranks that the options ask for. Raises UserError for blocks that the model does not have."""
    raise_problems(check_blocks("train_block_indices", options.train_block_indices, BLOCKS, targets))
    return TypeRanks(
        dim,
        (BLOCKS,),
        types=(
            ((BLOCKS, "_to_out_"), options.out_dim),
            ((BLOCKS, "_ff_"), options.mlp_dim),
            ((BLOCKS,), options.attn_dim),
        ),
        outside=dict(zip(EMBEDDERS, options.embedder_dims or ())),
        blocks={BLOCKS: options.train_block_indices},
    )


TARGETS = TableTargets(CLASSES, CLASS_NAMES, SanaRankOptions, denoiser_targets, rank_rules, fused=False)
