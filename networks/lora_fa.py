# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.lora_fa: LoRA-FA, a LoRA whose down matrices are not trained.

For Stable Diffusion 1.x, 2.x, XL, FLUX.1, SD3 and Lumina; the layers are those of networks.lora, files are plain LoRAs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from library.adapters.adapter_kind import AdapterKind
from library.adapters.layers.lora import LoraSettings
from library.adapters.layers.lora_fa import LoRAFALayer
from library.adapters.layers.norm import NormLayer
from library.adapters.lora_build import lora_settings
from library.adapters.options import BlockOptions, DropoutOptions, LoraLayerOptions


def settings(options: Mapping[str, Any], neuron_dropout: float | None) -> LoraSettings:
    """What a layer needs to know of the options."""
    return lora_settings({"layer": LoraLayerOptions(), "dropout": options["dropout"]}, neuron_dropout)


KIND = AdapterKind(
    options={"blocks": BlockOptions, "dropout": DropoutOptions},
    layers=(LoRAFALayer, NormLayer),
    settings=settings,
    make=lambda target, rank, alpha, own: LoRAFALayer(target, rank=rank, alpha=alpha, settings=own),
)
ARGUMENTS = KIND.arguments
create_network = KIND.create_network
create_network_from_weights = KIND.create_network_from_weights
