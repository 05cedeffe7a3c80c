# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.dylora: DyLoRA, a LoRA that can be cut to every smaller rank.

For Stable Diffusion 1.x, 2.x, XL, FLUX.1, SD3 and Lumina; the layers are those of networks.lora, files are plain LoRAs
of the full rank. extract_lora_from_dylora.py cuts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from library.adapters.adapter_kind import AdapterKind
from library.adapters.layers.dylora import DyLoRALayer, DyloraSettings
from library.adapters.options import BlockOptions, DyloraOptions, LoraPlusOptions, NoDropoutOptions, warn_dropout
from library.errors import UserError
from library.log import get_logger


def settings(options: Mapping[str, Any], neuron_dropout: float | None) -> DyloraSettings:
    """What a layer needs to know of the options."""
    dropout = options["dropout"]
    warn_dropout("networks.dylora", neuron_dropout, dropout.dropout)
    return DyloraSettings(options["ranks"].ranks_per_block, dropout.module_dropout or 0.0)


def blocks(options: Mapping[str, Any], dim: int, alpha: float) -> BlockOptions:
    """Convolutions have the rank and alpha of the rest. Raises UserError when another rank is asked for."""
    ranks: DyloraOptions = options["ranks"]
    if ranks.conv_dim not in (None, dim):
        raise UserError(f"--network_args: conv_dim must equal --network_dim, which is {dim}; got {ranks.conv_dim}")
    if ranks.conv_alpha not in (None, alpha):
        get_logger().warning("--network_args: conv_alpha: no effect, convolutions have --network_alpha")
    return BlockOptions(conv_dim=ranks.conv_dim, conv_alpha=None if ranks.conv_dim is None else alpha)


KIND = AdapterKind(
    options={"ranks": DyloraOptions, "dropout": NoDropoutOptions, "plus": LoraPlusOptions},
    layers=(DyLoRALayer,),
    settings=settings,
    make=lambda target, rank, alpha, own: DyLoRALayer(target, rank=rank, alpha=alpha, settings=own),
    blocks=blocks,
)
ARGUMENTS = KIND.arguments
create_network = KIND.create_network
create_network_from_weights = KIND.create_network_from_weights
