# SPDX-License-Identifier: Apache-2.0
"""What every LoRA module (networks.lora, networks.lora_flux ...) does with its targets and --network_args."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from library.adapters.adapter_network import AdapterNetwork
from library.adapters.build import Ranks, build_network, network_from_weights, rate_rules, weights_of
from library.adapters.file_readers import READERS
from library.adapters.layers.lora import LoRALayer, LoraSettings, lora_layer
from library.adapters.layers.norm import NormLayer
from library.adapters.options import DropoutOptions, LoraLayerOptions, LoraPlusOptions, PatternOptions
from library.adapters.target_spec import TargetSpec
from library.errors import UserError
from library.log import get_logger

LORA_ARGUMENTS: dict[str, type] = {
    "layer": LoraLayerOptions,
    "dropout": DropoutOptions,
    "plus": LoraPlusOptions,
    "patterns": PatternOptions,
}
FILE_LAYERS = (LoRALayer, NormLayer)


def new_lora(
    options: Mapping[str, Any],
    targets: Iterable[TargetSpec],
    ranks: Ranks,
    *,
    alpha: float,
    neuron_dropout: float | None,
    multiplier: float,
    block_weights: tuple[float, ...] | None = None,
) -> AdapterNetwork:
    """A new network. `options` has the groups of LORA_ARGUMENTS. Raises UserError."""
    settings = lora_settings(options, neuron_dropout)
    return build_network(
        targets,
        ranks,
        lambda target, rank, own_alpha: lora_layer(target, rank=rank, alpha=own_alpha, settings=settings),
        patterns=options["patterns"],
        alpha=alpha,
        rates=rate_rules(options["plus"], options["patterns"], block_weights),
        multiplier=multiplier,
    )


def lora_from_weights(
    options: Mapping[str, Any],
    targets: Sequence[TargetSpec],
    *,
    decided: Sequence[str],
    more_forms: Sequence[str] = (),
    file: str | Path | None,
    weights_sd: Mapping[str, Tensor] | None,
    for_inference: bool,
    neuron_dropout: float | None,
    multiplier: float,
    block_weights: tuple[float, ...] | None = None,
) -> tuple[AdapterNetwork, dict[str, Tensor]]:
    """A network as a file has it, and the file's tensors. Raises UserError.

    decided: given options that the file decides, which are refused. more_forms: further ones that have no effect.
    """
    patterns: PatternOptions = options["patterns"]
    decided = [*decided, *(["network_reg_dims"] if patterns.network_reg_dims is not None else [])]
    if decided:
        raise UserError(f"--network_args: {', '.join(decided)}: ranks and alphas come from {file}; leave them out")
    forms = [*options["layer"].form, *more_forms]
    if forms:
        get_logger().warning("--network_args: %s: no effect, %s decides the form of its layers", ", ".join(forms), file)
    network = network_from_weights(
        targets,
        READERS if for_inference else FILE_LAYERS,
        weights := weights_of(file, weights_sd),
        settings=lora_settings(options, neuron_dropout),
        rates=rate_rules(options["plus"], patterns, block_weights),
        multiplier=multiplier,
        file=str(file or "adapter weights"),
    )
    if for_inference:
        network.requires_grad_(False).eval()
    return network, weights


def given(group: Any) -> list[str]:
    """The names of the options of a group that differ from their defaults."""
    return [field.name for field in fields(group) if getattr(group, field.name) != field.default]


def lora_settings(options: Mapping[str, Any], neuron_dropout: float | None) -> LoraSettings:
    """The options of a LoRA layer. Raises UserError when --network_dropout is given twice with two values."""
    layer, dropout = options["layer"], options["dropout"]
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
        noise=layer.noise,
    )
