# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.lora_flux: LoRA for FLUX.1 and Chroma.

The Linear layers of the double and single blocks; with in_dims also those that read the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from library.adapters.lora_family import LoraFamily
from library.adapters.options import T5Options, block_ranges, rank_list
from library.adapters.table_targets import count, table_targets
from library.adapters.target_spec import TargetSpec
from library.adapters.type_dims import TypeDims, check_blocks, raise_problems
from library.families.flux.names import flux_names
from library.options import at_least, option

MODELS = ("FluxTransformer2DModel", "ChromaTransformer2DModel")
DOUBLE, SINGLE = "double_blocks_", "single_blocks_"
KINDS = {"all": (DOUBLE, SINGLE), "double": (DOUBLE,), "single": (SINGLE,)}
INPUTS = ("img_in", "time_in", "vector_in", "guidance_in", "txt_in")
TYPES = {
    "img_attn_dim": ("img_attn",),
    "txt_attn_dim": ("txt_attn",),
    "img_mlp_dim": ("img_mlp",),
    "txt_mlp_dim": ("txt_mlp",),
    "img_mod_dim": ("img_mod",),
    "txt_mod_dim": ("txt_mod",),
    "single_dim": (SINGLE, "linear"),
    "single_mod_dim": ("modulation",),
}


@dataclass(frozen=True)
class FluxOptions:
    """Ranks by the kind of a layer, and which blocks learn. A rank of 0 is no adapter."""

    img_attn_dim: int | None = option(None, help="Rank of the picture's attention in double blocks.", check=at_least(0))
    txt_attn_dim: int | None = option(None, help="Rank of the text's attention in double blocks.", check=at_least(0))
    img_mlp_dim: int | None = option(None, help="Rank of the picture's MLP in double blocks.", check=at_least(0))
    txt_mlp_dim: int | None = option(None, help="Rank of the text's MLP in double blocks.", check=at_least(0))
    img_mod_dim: int | None = option(None, help="Rank of the picture's modulation in double blocks.", check=at_least(0))
    txt_mod_dim: int | None = option(None, help="Rank of the text's modulation in double blocks.", check=at_least(0))
    single_dim: int | None = option(None, help="Rank of linear1 and linear2 in single blocks.", check=at_least(0))
    single_mod_dim: int | None = option(None, help="Rank of the modulation in single blocks.", check=at_least(0))
    in_dims: tuple[int, ...] | None = option(
        None, help="Ranks of img_in, time_in, vector_in, guidance_in, txt_in, with commas.",
        parse=rank_list(len(INPUTS)), check=at_least(0),
    )  # fmt: skip
    train_double_block_indices: tuple[tuple[int, int], ...] | None = option(
        None, help="Double blocks that learn: all, none, or numbers and ranges such as 0-3,7.", parse=block_ranges
    )
    train_single_block_indices: tuple[tuple[int, int], ...] | None = option(
        None, help="Single blocks that learn, written as for double blocks.", parse=block_ranges
    )
    train_blocks: str | None = option(None, help="The kind of blocks that gets adapters.", choices=tuple(KINDS))


def denoiser_targets(model: nn.Module) -> list[TargetSpec]:
    """Every layer that an adapter file may name."""
    names = flux_names(
        count(model, "transformer_blocks"),
        count(model, "single_transformer_blocks"),
        count(model, "distilled_guidance_layer.layers"),
    )
    return table_targets(names, model)


def type_dims(options: FluxOptions, dim: int, targets: list[TargetSpec]) -> TypeDims:
    """The ranks that the options ask for. Raises UserError for blocks that the model does not have."""
    blocks = {DOUBLE: options.train_double_block_indices, SINGLE: options.train_single_block_indices}
    raise_problems(
        line
        for start, ranges in blocks.items()
        for line in check_blocks(f"train_{start.removesuffix('s_')}_indices", ranges, start, targets)
    )
    return TypeDims(
        dim,
        KINDS[options.train_blocks or "all"],
        types=tuple((words, getattr(options, name)) for name, words in TYPES.items()),
        outside=dict(zip(INPUTS, options.in_dims or ())),
        blocks=blocks,
    )


FAMILY = LoraFamily("networks.lora_flux", MODELS, FluxOptions, denoiser_targets, type_dims, {"t5": T5Options})
ARGUMENTS = FAMILY.arguments
create_network = FAMILY.create_network
create_network_from_weights = FAMILY.create_network_from_weights
