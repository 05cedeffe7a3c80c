# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.lora_example: LoRA for the example. A family of the product has this file in networks/."""

from __future__ import annotations

from dataclasses import dataclass

from library.adapters.spec import TargetSpec
from torch import nn

from library.adapters.lora_family import LoraFamily
from library.adapters.table_targets import count, table_targets
from library.adapters.type_dims import TypeDims
from tests.families.example_family.names import example_names


@dataclass(frozen=True)
class ExampleRankOptions:
    """Ranks by the kind of a layer: there are none."""


def denoiser_targets(model: nn.Module) -> list[TargetSpec]:
    return table_targets(example_names(count(model, "blocks")), model)


def type_dims(options: ExampleRankOptions, dim: int, targets: list[TargetSpec]) -> TypeDims:
    return TypeDims(dim, kinds=("blocks_",))


FAMILY = LoraFamily(
    "networks.lora_example", ("ExampleTransformer",), ExampleRankOptions, denoiser_targets, type_dims, {}
)
ARGUMENTS = FAMILY.arguments
create_network = FAMILY.create_network
create_network_from_weights = FAMILY.create_network_from_weights
