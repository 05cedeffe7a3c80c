# SPDX-License-Identifier: Apache-2.0
"""Targets of adapters in Stable Diffusion 3 and 3.5, and the --network_args that choose them and their ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from library.adapters.foreign.published_classes import class_names
from library.adapters.options import block_ranges, rank_list
from library.adapters.table_targets import TableTargets, count, table_targets
from library.adapters.target_spec import TargetSpec
from library.adapters.type_ranks import TypeRanks, check_blocks
from library.errors import raise_problems
from library.families.sd3.adapter_names import BLOCKS
from library.families.sd3.names import sd3_names
from library.options import at_least, option

CLASSES = ("SD3Transformer2DModel",)
EMBEDDERS = (
    "context_embedder", "t_embedder", "x_embedder", "y_embedder", "final_layer_adaLN_modulation", "final_layer_linear",
)  # fmt: skip
TYPES = {
    "context_attn_dim": ("context_block", "attn"),
    "context_mlp_dim": ("context_block", "mlp"),
    "context_mod_dim": ("context_block", "adaLN_modulation"),
    "x_attn_dim": ("x_block", "attn"),
    "x_mlp_dim": ("x_block", "mlp"),
    "x_mod_dim": ("x_block", "adaLN_modulation"),
}
CLASS_NAMES = class_names(
    "MMDiT",
    (r"(joint_blocks\.\d+)\.", "MMDiTBlock"),
    (r"(joint_blocks\.\d+\.(?:x|context)_block)\.", "SingleDiTBlock"),
    (r"(joint_blocks\.\d+\.\w+\.attn2?)\.", "AttentionLinears", "SelfAttention"),
    (r"(joint_blocks\.\d+\.\w+\.mlp)\.", "MLP"),
    (r"(x_embedder)\.", "PatchEmbed"),
    (r"(t_embedder)\.", "TimestepEmbedding"),
    (r"(y_embedder)\.", "Embedder"),
    (r"(final_layer)\.", "UnPatch"),
)


@dataclass(frozen=True)
class SD3RankOptions:
    """Ranks by the type of a layer, and which blocks learn. Rank 0: no adapter."""

    context_attn_dim: int | None = option(None, help="Rank of the text's attention.", check=at_least(0))
    context_mlp_dim: int | None = option(None, help="Rank of the text's MLP.", check=at_least(0))
    context_mod_dim: int | None = option(None, help="Rank of the text's modulation.", check=at_least(0))
    x_attn_dim: int | None = option(None, help="Rank of the picture's attention.", check=at_least(0))
    x_mlp_dim: int | None = option(None, help="Rank of the picture's MLP.", check=at_least(0))
    x_mod_dim: int | None = option(None, help="Rank of the picture's modulation.", check=at_least(0))
    emb_dims: tuple[int, ...] | None = option(
        None,
        help="Ranks of context_embedder, t_embedder, x_embedder, y_embedder, final modulation, final linear.",
        parse=rank_list(len(EMBEDDERS)), check=at_least(0),
    )  # fmt: skip
    train_block_indices: tuple[tuple[int, int], ...] | None = option(
        None, help="Blocks that learn: all, none, or numbers and ranges such as 0-3,7.", parse=block_ranges
    )


def denoiser_targets(model: nn.Module) -> list[TargetSpec]:
    """Every layer that an adapter file may name."""
    return table_targets(sd3_names(count(model, "transformer_blocks")), model)


def rank_rules(options: SD3RankOptions, dim: int, targets: list[TargetSpec]) -> TypeRanks:
    """The ranks that the options ask for. Raises UserError for blocks that the model does not have."""
    raise_problems(check_blocks("train_block_indices", options.train_block_indices, BLOCKS, targets))
    return TypeRanks(
        dim,
        (BLOCKS,),
        types=tuple((words, getattr(options, name)) for name, words in TYPES.items()),
        outside=dict(zip(EMBEDDERS, options.emb_dims or ())),
        blocks={BLOCKS: options.train_block_indices},
    )


TARGETS = TableTargets(CLASSES, CLASS_NAMES, SD3RankOptions, denoiser_targets, rank_rules, has_t5=True)
