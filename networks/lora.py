# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.lora: LoRA for Stable Diffusion 1.x, 2.x and XL.

Linear layers and 1x1 convolutions of attention and of the text encoder; with conv_dim also the 3x3 convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.adapters.adapter_network import AdapterNetwork
from library.adapters.block_ranks import block_lr_weights, plan_ranks
from library.adapters.build import default_sizes
from library.adapters.lora_build import LORA_ARGUMENTS, lora_from_weights, new_lora
from library.adapters.options import BlockOptions, read_network_args
from library.adapters.target_spec import TargetSpec
from library.adapters.targets import TextEncoders, block_layout, every_target, sd_targets

ARGUMENTS: dict[str, type] = {"blocks": BlockOptions, **LORA_ARGUMENTS}
FILE_DECIDES = ("conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")


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
    dim, alpha = default_sizes(network_dim, network_alpha)
    plan = plan_ranks(options["blocks"], block_layout(text_encoder, unet), dim=dim, alpha=alpha)

    def ranks(target: TargetSpec) -> tuple[int, float]:
        module = target.modules[0].module
        return plan.rank_alpha(target, is_3x3=isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1))

    return new_lora(
        options,
        sd_targets(text_encoder, unet, conv=plan.has_conv, norm=options["blocks"].train_norm),
        ranks,
        alpha=alpha,
        neuron_dropout=neuron_dropout,
        multiplier=multiplier,
        block_weights=plan.lr_weights,
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
    return lora_from_weights(
        options,
        every_target(text_encoder, unet),
        decided=[name for name in FILE_DECIDES if getattr(blocks, name) is not None],
        more_forms=["train_norm"] if blocks.train_norm else [],
        file=file,
        weights_sd=weights_sd,
        for_inference=for_inference,
        neuron_dropout=neuron_dropout,
        multiplier=multiplier,
        block_weights=block_lr_weights(blocks, block_layout(text_encoder, unet)),
    )
