# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.lora_anima: LoRA for Anima.

Attention and MLP of all blocks; with train_llm_adapter also those of the LLM adapter, with include_patterns any layer.
"""

from __future__ import annotations

from library.adapters.build import NetworkBuilder
from library.adapters.layers.lora import LORA
from library.families.adapters import adapter_tables
from library.families.anima.targets import TARGETS

BUILDER = NetworkBuilder("networks.lora_anima", LORA, TARGETS, adapter_tables())
create_network = BUILDER.create_network
create_network_from_weights = BUILDER.create_network_from_weights
