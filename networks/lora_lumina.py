# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.lora_lumina: LoRA for Lumina-Image 2.0.

The Linear layers of all blocks and of the final layer; with embedder_dims also the embedders.
"""

from __future__ import annotations

from library.adapters.build import NetworkBuilder
from library.adapters.layers.lora import LORA
from library.families.adapters import adapter_tables
from library.families.lumina.targets import TARGETS

BUILDER = NetworkBuilder("networks.lora_lumina", LORA, TARGETS, adapter_tables())
create_network = BUILDER.create_network
create_network_from_weights = BUILDER.create_network_from_weights
