# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.oft: OFT for the U-Nets of Stable Diffusion 1.x, 2.x and XL.

The Linear layers of attention; with enable_all_linear all Linear layers and 1x1 convolutions of the transformer blocks,
with enable_conv also those of the residual blocks. `--network_dim` is the number of blocks per layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.adapters.adapter_network import AdapterNetwork
from library.adapters.oft_build import OFT_ARGUMENTS, new_oft, oft_from_weights, renamed
from library.adapters.options import OftConvOptions, read_network_args
from library.adapters.table_targets import require_class
from library.adapters.target_spec import TargetSpec
from library.adapters.targets import TextEncoders, every_target, sd_targets

ARGUMENTS: dict[str, type] = {**OFT_ARGUMENTS, "conv": OftConvOptions}
MODELS = ("UNet2DConditionModel",)
ATTENTION = re.compile(r"_attn[12]_")


def chosen_targets(unet: nn.Module | None, options: Mapping[str, Any]) -> list[TargetSpec]:
    """What the options ask for. Raises UserError when the model is no U-Net."""
    require_class(unet, MODELS, "networks.oft")
    inside = {target.name for target in sd_targets(None, unet)}  # of the transformer blocks
    everything = options["layers"].enable_all_linear
    return renamed(
        target
        for target in sd_targets(None, unet, conv=options["conv"].enable_conv)
        if everything or target.name not in inside or ATTENTION.search(target.name)
    )


def every_oft_target(unet: nn.Module | None) -> list[TargetSpec]:
    """Every layer that a file may name. Raises UserError when the model is no U-Net."""
    require_class(unet, MODELS, "networks.oft")
    found = every_target(None, unet)
    return renamed(target for target in found if isinstance(target.modules[0].module, (nn.Linear, nn.Conv2d)))


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
        options, chosen_targets(unet, options), network_dim, network_alpha, neuron_dropout, multiplier, numbered=False
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
