# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.loha: LoHa for Stable Diffusion 1.x, 2.x, XL, FLUX.1, SD3 and Lumina.

Files are those of LyCORIS (--network_module lycoris.kohya with algo=loha); the layers are those of networks.lora.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from library.adapters.adapter_kind import AdapterKind
from library.adapters.layers.factor import FactorSettings
from library.adapters.layers.loha import LoHaLayer
from library.adapters.layers.norm import NormLayer
from library.adapters.options import BlockOptions, DropoutOptions, FactorOptions, warn_dropout


def settings(options: Mapping[str, Any], neuron_dropout: float | None) -> FactorSettings:
    """What a layer needs to know of the options."""
    layer, dropout = options["layer"], options["dropout"]
    warn_dropout("networks.loha", neuron_dropout, dropout.dropout)
    return FactorSettings(
        tucker=layer.use_tucker,
        scalar=layer.use_scalar,
        dora=("output" if layer.wd_on_output else "input") if layer.dora_wd else None,
        rs_lora=layer.rs_lora,
        rank_dropout=dropout.rank_dropout or 0.0,
        rank_dropout_scale=layer.rank_dropout_scale,
        module_dropout=dropout.module_dropout or 0.0,
    )


KIND = AdapterKind(
    options={"blocks": BlockOptions, "layer": FactorOptions, "dropout": DropoutOptions},
    layers=(LoHaLayer, NormLayer),
    settings=settings,
    make=lambda target, rank, alpha, own: LoHaLayer(target, rank=rank, alpha=alpha, settings=own),
    forms=lambda options: options["layer"].form,
)
ARGUMENTS = KIND.arguments
create_network = KIND.create_network
create_network_from_weights = KIND.create_network_from_weights
