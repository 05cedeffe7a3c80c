# SPDX-License-Identifier: Apache-2.0
"""Targets of adapters in the example."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from library.adapters.foreign.published_classes import class_names
from library.adapters.table_targets import TableTargets, count, table_targets
from library.adapters.target_spec import TargetSpec
from library.adapters.type_ranks import TypeRanks
from tests.families.example_family.names import example_names


@dataclass(frozen=True)
class ExampleRankOptions:
    """Ranks by the kind of a layer: there are none."""


def denoiser_targets(model: nn.Module) -> list[TargetSpec]:
    """Every layer that an adapter file may name."""
    return table_targets(example_names(count(model, "blocks")), model)


def rank_rules(options: ExampleRankOptions, dim: int, targets: list[TargetSpec]) -> TypeRanks:
    """--network_dim in all blocks."""
    return TypeRanks(dim, ("blocks_",))


CLASS_NAMES = class_names("ExampleTransformer", (r"(blocks\.\d+)\.", "ExampleBlock"))
TARGETS = TableTargets(("ExampleTransformer",), CLASS_NAMES, ExampleRankOptions, denoiser_targets, rank_rules)
