# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.lora_hunyuan_image: LoRA for HunyuanImage-2.1.

The Linear layers of the double and single blocks.
"""

from __future__ import annotations

from library.adapters.build import NetworkBuilder
from library.adapters.layers.lora import LORA
from library.families.adapters import adapter_tables
from library.families.hunyuan_image.targets import TARGETS

BUILDER = NetworkBuilder("networks.lora_hunyuan_image", LORA, TARGETS, adapter_tables())
create_network = BUILDER.create_network
create_network_from_weights = BUILDER.create_network_from_weights
