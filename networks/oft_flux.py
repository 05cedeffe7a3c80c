# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.oft_flux: OFT for FLUX.1 and Chroma.

The attention layers of the double blocks; with enable_all_linear all Linear layers of all blocks. q, k, v and the MLP
of a fused layer are rotated apart, each by blocks of its own: `oft_blocks.0`, `oft_blocks.1` and so on in a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.adapters.adapter_network import AdapterNetwork
from library.adapters.oft_build import OFT_ARGUMENTS, new_oft, oft_from_weights, renamed
from library.adapters.options import read_network_args
from library.adapters.table_targets import require_class
from library.adapters.target_spec import TargetSpec
from library.adapters.targets import TextEncoders
from library.adapters.type_dims import short_name
from networks.lora_flux import DOUBLE, MODELS, SINGLE, denoiser_targets

ARGUMENTS: dict[str, type] = OFT_ARGUMENTS
ATTENTION = re.compile(rf"{DOUBLE}\d+_(img|txt)_attn_")


def chosen_targets(unet: nn.Module | None, options: Mapping[str, Any]) -> list[TargetSpec]:
    """What the options ask for. Raises UserError when the model is another architecture's."""
    require_class(unet, MODELS, "networks.oft_flux")
    everything = options["layers"].enable_all_linear
    return renamed(
        target
        for target in ([] if unet is None else denoiser_targets(unet))
        if (short_name(target).startswith((DOUBLE, SINGLE)) if everything else ATTENTION.match(short_name(target)))
    )


def every_oft_target(unet: nn.Module | None) -> list[TargetSpec]:
    """Every layer that a file may name. Raises UserError when the model is another architecture's."""
    require_class(unet, MODELS, "networks.oft_flux")
    return renamed([] if unet is None else denoiser_targets(unet))


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
    """A new OFT of `network_dim` (4) blocks per layer, not yet attached; text encoders get none.

    network_alpha: the constraint (1e-3). `kwargs` are --network_args. Raises UserError listing every mistake in them.
    """
    options = read_network_args(ARGUMENTS, kwargs)
    return new_oft(
        options, chosen_targets(unet, options), network_dim, network_alpha, neuron_dropout, multiplier, numbered=True
    )


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
    """An OFT with the layers, blocks and constraints of a file (or of `weights_sd`), and its tensors.

    Raises UserError.
    """
    options = read_network_args(ARGUMENTS, kwargs)
    return oft_from_weights(
        options, every_oft_target(unet), file, weights_sd, for_inference, neuron_dropout, multiplier
    )
