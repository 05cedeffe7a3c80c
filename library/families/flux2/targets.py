# SPDX-License-Identifier: Apache-2.0
"""Targets of adapters in FLUX.2, and the --network_args that choose them and their ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from library.adapters.foreign.published_classes import class_names
from library.adapters.options import block_ranges, rank_list
from library.adapters.table_targets import TableTargets, count, table_targets
from library.adapters.target_spec import TargetSpec
from library.families.flux.adapter_names import SINGLE
from library.families.flux.targets import KINDS, rank_rules
from library.families.flux2.names import flux2_names
from library.options import at_least, option

CLASSES = ("Flux2Transformer2DModel",)
INPUTS = ("img_in", "time_in", "txt_in")
TYPES = {
    "img_attn_dim": ("img_attn",),
    "txt_attn_dim": ("txt_attn",),
    "img_mlp_dim": ("img_mlp",),
    "txt_mlp_dim": ("txt_mlp",),
    "single_dim": (SINGLE, "linear"),
}
CLASS_NAMES = class_names(
    "Flux2",
    (r"(double_blocks\.\d+)\.", "DoubleStreamBlock"),
    (r"(double_blocks\.\d+\.(?:img|txt)_attn)\.", "SelfAttention"),
    (r"(single_blocks\.\d+)\.", "SingleStreamBlock"),
    (r"((?:time|guidance)_in)\.", "MLPEmbedder"),
    (r"((?:double_stream_modulation_(?:img|txt)|single_stream_modulation))\.", "Modulation"),
    (r"(final_layer)\.", "LastLayer"),
)


@dataclass(frozen=True)
class Flux2RankOptions:
    """Ranks by the type of a layer, and which blocks learn. Rank 0: no adapter."""

    img_attn_dim: int | None = option(None, help="Rank of the picture's attention in double blocks.", check=at_least(0))
    txt_attn_dim: int | None = option(None, help="Rank of the text's attention in double blocks.", check=at_least(0))
    img_mlp_dim: int | None = option(None, help="Rank of the picture's MLP in double blocks.", check=at_least(0))
    txt_mlp_dim: int | None = option(None, help="Rank of the text's MLP in double blocks.", check=at_least(0))
    single_dim: int | None = option(None, help="Rank of linear1 and linear2 in single blocks.", check=at_least(0))
    in_dims: tuple[int, ...] | None = option(
        None, help="Ranks of img_in, time_in, txt_in, with commas.", parse=rank_list(len(INPUTS)), check=at_least(0)
    )
    train_double_block_indices: tuple[tuple[int, int], ...] | None = option(
        None, help="Double blocks that learn: all, none, or numbers and ranges such as 0-3,7.", parse=block_ranges
    )
    train_single_block_indices: tuple[tuple[int, int], ...] | None = option(
        None, help="Single blocks that learn, written as for double blocks.", parse=block_ranges
    )
    train_blocks: str | None = option(None, help="The kind of blocks that gets adapters.", choices=tuple(KINDS))


def denoiser_targets(model: nn.Module) -> list[TargetSpec]:
    """Every layer that an adapter file may name."""
    names = flux2_names(count(model, "transformer_blocks"), count(model, "single_transformer_blocks"))
    return table_targets(names, model)


TARGETS = TableTargets(
    CLASSES, CLASS_NAMES, Flux2RankOptions, denoiser_targets, partial(rank_rules, types=TYPES, inputs=INPUTS)
)
