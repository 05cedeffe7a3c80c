# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.lora_fa: LoRA-FA, a LoRA whose down matrices are not trained.

For Stable Diffusion 1.x, 2.x, XL, FLUX.1, SD3 and Lumina; the layers are those of networks.lora, files are plain LoRAs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from networks.adapter_kind import AdapterKind
from networks.base import AdapterNetwork
from networks.lora_build import lora_settings
from networks.lora_fa_layer import LoRAFALayer
from networks.lora_layer import LoraSettings
from networks.norm_layer import NormLayer
from networks.options import BlockOptions, DropoutOptions, LoraLayerOptions
from networks.targets import TextEncoders


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


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: TextEncoders,
    unet: nn.Module | None,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> AdapterNetwork:
    """A new LoRA-FA, not yet attached. `kwargs` are --network_args. Raises UserError listing every mistake in them."""
    return KIND.create(multiplier, network_dim, network_alpha, text_encoder, unet, neuron_dropout, kwargs)


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: nn.Module | None,
    text_encoder: TextEncoders,
    unet: nn.Module | None,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> tuple[AdapterNetwork, dict[str, Tensor]]:
    """As `AdapterKind.from_weights`."""
    return KIND.from_weights(multiplier, file, text_encoder, unet, weights_sd, for_inference, neuron_dropout, kwargs)
