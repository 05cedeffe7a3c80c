# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.lora_sd3: LoRA for SD3 and SD3.5.

The Linear layers of the joint blocks; with emb_dims also the embedders and the final layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from library.adapters.lora_family import LoraFamily
from library.adapters.options import T5Options, block_ranges, rank_list
from library.adapters.table_targets import count, table_targets
from library.adapters.target_spec import TargetSpec
from library.adapters.type_dims import TypeDims, check_blocks, raise_problems
from library.families.sd3.names import sd3_names
from library.options import at_least, option

MODELS = ("SD3Transformer2DModel",)
BLOCKS = "joint_blocks_"
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


@dataclass(frozen=True)
class Sd3Options:
    """Ranks by the kind of a layer, and which blocks learn. A rank of 0 is no adapter."""

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


def type_dims(options: Sd3Options, dim: int, targets: list[TargetSpec]) -> TypeDims:
    """The ranks that the options ask for. Raises UserError for blocks that the model does not have."""
    raise_problems(check_blocks("train_block_indices", options.train_block_indices, BLOCKS, targets))
    return TypeDims(
        dim,
        (BLOCKS,),
        types=tuple((words, getattr(options, name)) for name, words in TYPES.items()),
        outside=dict(zip(EMBEDDERS, options.emb_dims or ())),
        blocks={BLOCKS: options.train_block_indices},
    )


FAMILY = LoraFamily("networks.lora_sd3", MODELS, Sd3Options, denoiser_targets, type_dims, {"t5": T5Options})
ARGUMENTS = FAMILY.arguments
create_network = FAMILY.create_network
create_network_from_weights = FAMILY.create_network_from_weights
