# SPDX-License-Identifier: Apache-2.0
"""Targets of adapters in HunyuanImage-2.1: the Linear layers of the double and single blocks, all of one rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from library.adapters.foreign.published_classes import class_names
from library.adapters.table_targets import TableTargets, count, table_targets
from library.adapters.target_spec import TargetSpec
from library.adapters.type_ranks import TypeRanks
from library.families.hunyuan_image.adapter_names import DOUBLE, SINGLE
from library.families.hunyuan_image.names import hunyuan_names

CLASSES = ("HunyuanImageTransformer2DModel",)
CLASS_NAMES = class_names(
    "HYImageDiffusionTransformer",
    (r"(double_blocks\.\d+)\.", "MMDoubleStreamBlock"),
    (r"(double_blocks\.\d+\.(?:img|txt)_mod)\.", "ModulateDiT"),
    (r"(double_blocks\.\d+\.(?:img|txt)_mlp)\.", "MLP"),
    (r"(single_blocks\.\d+)\.", "MMSingleStreamBlock"),
    (r"(single_blocks\.\d+\.modulation)\.", "ModulateDiT"),
    (r"(txt_in)\.", "SingleTokenRefiner"),
    (r"(byt5_in)\.", "ByT5Mapper"),
    (r"(final_layer)\.", "FinalLayer"),
)


@dataclass(frozen=True)
class HunyuanImageRankOptions:
    """No options: network_reg_dims and network_reg_lrs set ranks and learning rates by name."""


def denoiser_targets(model: nn.Module) -> list[TargetSpec]:
    """Every layer that an adapter file may name."""
    refiners = count(model, "context_embedder.token_refiner.refiner_blocks")
    names = hunyuan_names(count(model, "transformer_blocks"), count(model, "single_transformer_blocks"), refiners)
    return table_targets(names, model)


def rank_rules(options: HunyuanImageRankOptions, dim: int, targets: list[TargetSpec]) -> TypeRanks:
    return TypeRanks(dim, (DOUBLE, SINGLE))


TARGETS = TableTargets(CLASSES, CLASS_NAMES, HunyuanImageRankOptions, denoiser_targets, rank_rules)
