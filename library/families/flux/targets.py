# SPDX-License-Identifier: Apache-2.0
"""Targets of adapters in FLUX.1 and Chroma, and the --network_args that choose them and their ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from library.adapters.foreign.published_classes import class_names
from library.adapters.layers.oft import PREFIX as OFT_PREFIX
from library.adapters.layers.oft import OftOptions, renamed_for_oft
from library.adapters.options import block_ranges, rank_list
from library.adapters.table_targets import TableTargets, count, table_targets
from library.adapters.target_spec import TargetSpec
from library.adapters.targets import AdaptedModels, Selection, Targets
from library.adapters.type_ranks import TypeRanks, check_blocks, short_name
from library.errors import raise_problems
from library.families.flux.adapter_names import DOUBLE, SINGLE
from library.families.flux.names import flux_names
from library.options import at_least, option

CLASSES = ("FluxTransformer2DModel", "ChromaTransformer2DModel")
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
ATTENTION = re.compile(rf"{DOUBLE}\d+_(img|txt)_attn_")
CLASS_NAMES = class_names(
    "Flux",
    (r"(double_blocks\.\d+)\.", "DoubleStreamBlock"),
    (r"(double_blocks\.\d+\.(?:img|txt)_attn)\.", "SelfAttention"),
    (r"(double_blocks\.\d+\.(?:img|txt)_mod)\.", "Modulation"),
    (r"(single_blocks\.\d+)\.", "SingleStreamBlock"),
    (r"(single_blocks\.\d+\.modulation)\.", "Modulation"),
    (r"((?:time|vector|guidance)_in)\.", "MLPEmbedder"),
    (r"(distilled_guidance_layer)\.", "Approximator"),
    (r"(distilled_guidance_layer\.layers\.\d+)\.", "MLPEmbedder"),
    (r"(final_layer)\.", "LastLayer"),
)


@dataclass(frozen=True)
class FluxRankOptions:
    """Ranks by the type of a layer, and which blocks learn. Rank 0: no adapter."""

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


def rank_rules(
    options: Any,
    dim: int,
    targets: list[TargetSpec],
    *,
    types: Mapping[str, tuple[str, ...]] = TYPES,
    inputs: tuple[str, ...] = INPUTS,
) -> TypeRanks:
    """The ranks that the options ask for. Raises UserError for blocks that the model does not have.

    options: FluxRankOptions or alike. types: those among them that are ranks by words of a name. inputs: those of
    in_dims.
    """
    blocks = {DOUBLE: options.train_double_block_indices, SINGLE: options.train_single_block_indices}
    raise_problems(
        line
        for start, ranges in blocks.items()
        for line in check_blocks(f"train_{start.removesuffix('s_')}_indices", ranges, start, targets)
    )
    return TypeRanks(
        dim,
        KINDS[options.train_blocks or "all"],
        types=tuple((words, getattr(options, name)) for name, words in types.items()),
        outside=dict(zip(inputs, options.in_dims or ())),
        blocks=blocks,
    )


TARGETS = TableTargets(CLASSES, CLASS_NAMES, FluxRankOptions, denoiser_targets, rank_rules, has_t5=True)


@dataclass(frozen=True)
class FluxOftTargets(Targets):
    """Rotated layers: attention of the double blocks, or all Linear layers of all blocks; text encoders have none."""

    classes = CLASSES
    prefix = OFT_PREFIX
    decided_by_file = ()

    @property
    def options(self) -> Mapping[str, type]:
        return {"layers": OftOptions}

    def select(self, options: Mapping[str, Any], dim: int, alpha: float, models: AdaptedModels) -> Selection:
        everything = options["layers"].enable_all_linear
        chosen = [
            target
            for target in self._denoiser(models)
            if (short_name(target).startswith((DOUBLE, SINGLE)) if everything else ATTENTION.match(short_name(target)))
        ]
        return Selection(renamed_for_oft(chosen), lambda target: (dim, alpha))

    def in_file(self, options: Mapping[str, Any], models: AdaptedModels) -> list[TargetSpec]:
        return renamed_for_oft(self._denoiser(models))

    def _denoiser(self, models: AdaptedModels) -> list[TargetSpec]:
        return [] if models.denoiser is None else denoiser_targets(models.denoiser)


OFT_TARGETS = FluxOftTargets()
