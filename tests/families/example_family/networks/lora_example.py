# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.lora_example: LoRA for the example. A family of the product has this file in networks/."""

from __future__ import annotations

from library.adapters.build import NetworkBuilder
from library.adapters.layers.lora import LORA
from library.families.adapters import adapter_tables
from tests.families.example_family.targets import TARGETS

BUILDER = NetworkBuilder("networks.lora_example", LORA, TARGETS, adapter_tables())
create_network = BUILDER.create_network
create_network_from_weights = BUILDER.create_network_from_weights
