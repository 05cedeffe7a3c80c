# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.lora_fa: LoRA-FA, a LoRA whose down matrices are not trained.

For every architecture; the layers are those of networks.lora, files are plain LoRAs.
"""

from __future__ import annotations

from library.adapters.build import NetworkBuilder
from library.adapters.layers.lora_fa import LORA_FA
from library.families.adapters import adapter_tables, every_family

BUILDER = NetworkBuilder("networks.lora_fa", LORA_FA, every_family(), adapter_tables())
create_network = BUILDER.create_network
create_network_from_weights = BUILDER.create_network_from_weights
