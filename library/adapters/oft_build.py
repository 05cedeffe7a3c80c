# SPDX-License-Identifier: Apache-2.0
"""What networks.oft and networks.oft_flux do alike with their targets and --network_args."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from library.adapters.adapter_network import AdapterNetwork
from library.adapters.build import build_network, default_sizes, network_from_weights, rate_rules, weights_of
from library.adapters.layers.oft import OFTLayer, OftSettings
from library.adapters.options import LoraPlusOptions, NoDropoutOptions, OftOptions, PatternOptions, warn_dropout
from library.adapters.target_spec import TargetSpec
from library.adapters.targets import DENOISER_PREFIX
from library.errors import UserError
from library.log import get_logger

OFT_ARGUMENTS: dict[str, type] = {"layers": OftOptions, "dropout": NoDropoutOptions, "patterns": PatternOptions}
PREFIX = "oft_unet"
ALPHA = 1e-3  # when none is given


def renamed(targets: Iterable[TargetSpec]) -> list[TargetSpec]:
    """The targets under the names that OFT files have."""
    return [replace(target, name=PREFIX + target.name.removeprefix(DENOISER_PREFIX)) for target in targets]


def new_oft(
    options: Mapping[str, Any],
    targets: Sequence[TargetSpec],
    count: int | None,
    alpha: float | None,
    neuron_dropout: float | None,
    multiplier: float,
    *,
    numbered: bool,
) -> AdapterNetwork:
    """A new network of `count` blocks per layer. Raises UserError."""
    count, alpha = default_sizes(count, ALPHA if alpha is None else alpha)
    if alpha <= 0:
        raise UserError("--network_alpha 0: nothing can rotate; for OFT alpha is how far a layer may rotate, e.g. 1e-3")
    if alpha >= 1:
        get_logger().warning(
            "--network_alpha %g: for OFT alpha is how far a layer may rotate, times its rows; this is no limit, "
            "1e-3 is usual", alpha,
        )  # fmt: skip
    settings = _settings(options, neuron_dropout, numbered)
    return build_network(
        targets,
        lambda target: (count, alpha),
        lambda target, own, own_alpha: OFTLayer(target, count=own, alpha=own_alpha, settings=settings),
        patterns=options["patterns"],
        alpha=alpha,
        rates=rate_rules(LoraPlusOptions(), options["patterns"], None),
        multiplier=multiplier,
    )


def oft_from_weights(
    options: Mapping[str, Any],
    targets: Sequence[TargetSpec],
    file: str | Path | None,
    weights_sd: Mapping[str, Tensor] | None,
    for_inference: bool,
    neuron_dropout: float | None,
    multiplier: float,
) -> tuple[AdapterNetwork, dict[str, Tensor]]:
    """A network as a file has it, and the file's tensors. Raises UserError."""
    if options["patterns"].network_reg_dims is not None:
        raise UserError(f"--network_args: network_reg_dims: the blocks come from {file}; leave it out")
    network = network_from_weights(
        targets,
        (OFTLayer,),
        weights := weights_of(file, weights_sd),
        settings=_settings(options, neuron_dropout, False),
        rates=rate_rules(LoraPlusOptions(), options["patterns"], None),
        multiplier=multiplier,
        file=str(file or "adapter weights"),
    )
    if for_inference:
        network.requires_grad_(False).eval()
    return network, weights


def _settings(options: Mapping[str, Any], neuron_dropout: float | None, numbered: bool) -> OftSettings:
    dropout = options["dropout"]
    warn_dropout("OFT", neuron_dropout, dropout.dropout)
    return OftSettings(numbered, dropout.module_dropout or 0.0)
