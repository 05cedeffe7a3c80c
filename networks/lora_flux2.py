# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.lora_flux2: LoRA for FLUX.2 klein and dev.

The Linear layers of the double and single blocks; with in_dims also those that read the inputs.
"""

from __future__ import annotations

from library.adapters.build import NetworkBuilder
from library.adapters.layers.lora import LORA
from library.families.adapters import adapter_tables
from library.families.flux2.targets import TARGETS

BUILDER = NetworkBuilder("networks.lora_flux2", LORA, TARGETS, adapter_tables())
create_network = BUILDER.create_network
create_network_from_weights = BUILDER.create_network_from_weights
