# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.lora_sana: LoRA for SANA.

Queries, keys and values of all blocks; with out_dim, mlp_dim and embedder_dims also other layers.
"""

from __future__ import annotations

from library.adapters.build import NetworkBuilder
from library.adapters.layers.lora import LORA
from library.families.adapters import adapter_tables
from library.families.sana.targets import TARGETS

BUILDER = NetworkBuilder("networks.lora_sana", LORA, TARGETS, adapter_tables())
create_network = BUILDER.create_network
create_network_from_weights = BUILDER.create_network_from_weights
