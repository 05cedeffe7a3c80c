# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.lora: LoRA for Stable Diffusion 1.x and 2.x.

Linear layers and 1x1 convolutions of attention and of the text encoder; with conv_dim also the 3x3 convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.errors import UserError
from library.log import get_logger
from networks.base import AdapterNetwork
from networks.build import build_network, network_from_weights, rate_rules, weights_of
from networks.lora_layer import LoRALayer, LoraSettings, lora_layer
from networks.lr_weights import block_lr_weights
from networks.norm_layer import NormLayer
from networks.options import BlockOptions, DropoutOptions, LoraLayerOptions, LoraPlusOptions, read_network_args
from networks.targets import SD_BLOCKS, TextEncoders, every_target, sd_targets

ARGUMENTS: dict[str, type] = {
    "blocks": BlockOptions,
    "layer": LoraLayerOptions,
    "dropout": DropoutOptions,
    "plus": LoraPlusOptions,
}
FILE_LAYERS = (LoRALayer, NormLayer)


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
    """A new LoRA, not yet attached. `kwargs` are --network_args. Raises UserError listing every mistake in them."""
    options = read_network_args(ARGUMENTS, kwargs)
    settings = lora_settings(options["layer"], options["dropout"], neuron_dropout)
    return build_network(
        lambda conv, norm: sd_targets(text_encoder, unet, conv=conv, norm=norm),
        lambda target, rank, alpha: lora_layer(target, rank=rank, alpha=alpha, settings=settings),
        layout=SD_BLOCKS,
        blocks=options["blocks"],
        plus=options["plus"],
        multiplier=multiplier,
        dim=network_dim,
        alpha=network_alpha,
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
    """A LoRA with the layers, ranks, alphas and values of a file (or of `weights_sd`), and its tensors.

    Options that the file decides (ranks, form) must not be in `kwargs`. Raises UserError.
    """
    options = read_network_args(ARGUMENTS, kwargs)
    blocks: BlockOptions = options["blocks"]
    decided = ("conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
    given = [name for name in decided if getattr(blocks, name) is not None]
    if given:
        raise UserError(f"--network_args: {', '.join(given)}: ranks and alphas come from {file}; leave them out")
    forms = [name for name, value in vars(options["layer"]).items() if value and name != "wd_on_output"]
    forms += ["train_norm"] if blocks.train_norm else []
    if forms:
        get_logger().warning("--network_args: %s: no effect, %s decides the form of its layers", ", ".join(forms), file)
    network = network_from_weights(
        every_target(text_encoder, unet),
        FILE_LAYERS,
        weights := weights_of(file, weights_sd),
        settings=lora_settings(options["layer"], options["dropout"], neuron_dropout),
        rates=rate_rules(options["plus"], block_lr_weights(blocks, SD_BLOCKS)),
        multiplier=multiplier,
        file=str(file or "adapter weights"),
    )
    if for_inference:
        network.requires_grad_(False).eval()
    return network, weights


def lora_settings(layer: LoraLayerOptions, dropout: DropoutOptions, neuron_dropout: float | None) -> LoraSettings:
    """The options of a LoRA layer. Raises UserError when --network_dropout is given twice with two values."""
    if neuron_dropout is not None and dropout.dropout is not None and neuron_dropout != dropout.dropout:
        raise UserError(f"--network_args: dropout={dropout.dropout} is --network_dropout, which is {neuron_dropout}")
    return LoraSettings(
        tucker=layer.use_tucker,
        scalar=layer.use_scalar,
        dora=("output" if layer.wd_on_output else "input") if layer.dora_wd else None,
        rs_lora=layer.rs_lora,
        neuron_dropout=neuron_dropout or dropout.dropout or 0.0,
        rank_dropout=dropout.rank_dropout or 0.0,
        module_dropout=dropout.module_dropout or 0.0,
    )
