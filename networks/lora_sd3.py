# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.lora_sd3: LoRA for SD3 and SD3.5.

The Linear layers of the joint blocks; with emb_dims also the embedders and the final layer.
"""

from __future__ import annotations

from library.adapters.build import NetworkBuilder
from library.adapters.layers.lora import LORA
from library.families.adapters import adapter_tables
from library.families.sd3.targets import TARGETS

BUILDER = NetworkBuilder("networks.lora_sd3", LORA, TARGETS, adapter_tables())
create_network = BUILDER.create_network
create_network_from_weights = BUILDER.create_network_from_weights
