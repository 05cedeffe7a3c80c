# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.lora: LoRA for Stable Diffusion 1.x, 2.x and XL.

Linear layers and 1x1 convolutions of attention and of the text encoder; with conv_dim also the 3x3 convolutions.
"""

from __future__ import annotations

from library.adapters.build import NetworkBuilder
from library.adapters.layers.lora import LORA
from library.families.adapters import adapter_tables, unets

BUILDER = NetworkBuilder("networks.lora", LORA, unets(), adapter_tables())
create_network = BUILDER.create_network
create_network_from_weights = BUILDER.create_network_from_weights
