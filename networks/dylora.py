# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.dylora: DyLoRA, a LoRA that can be cut to every smaller rank.

For every architecture; the layers are those of networks.lora, files are plain LoRAs
of the full rank. extract_lora_from_dylora.py cuts them.
"""

from __future__ import annotations

from library.adapters.build import NetworkBuilder
from library.adapters.layers.dylora import DYLORA
from library.families.adapters import adapter_tables, every_family

BUILDER = NetworkBuilder("networks.dylora", DYLORA, every_family(), adapter_tables())
create_network = BUILDER.create_network
create_network_from_weights = BUILDER.create_network_from_weights
