# SPDX-License-Identifier: Apache-2.0
"""A LoRA module of an architecture with a name table: targets and ranks by the kind of a layer are its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.adapters.adapter_network import AdapterNetwork
from library.adapters.build import default_sizes
from library.adapters.lora_build import LORA_ARGUMENTS, given, lora_from_weights, new_lora
from library.adapters.options import FusedLayerOptions, NoConvOptions, SplitOptions, read_network_args
from library.adapters.table_targets import require_class, split_targets, text_targets
from library.adapters.target_spec import TargetSpec
from library.adapters.targets import TextEncoders, as_list
from library.adapters.type_dims import TypeDims


@dataclass(frozen=True)
class LoraFamily:
    """What the two functions of a network module need to know of an architecture."""

    module: str  # the --network_module
    models: tuple[str, ...]  # classes of its denoisers
    options: type  # ranks and blocks
    denoiser_targets: Callable[[nn.Module], list[TargetSpec]]  # every layer that a file may name, in a file's order
    type_dims: Callable[[Any, int, list[TargetSpec]], TypeDims]  # (options, --network_dim, all targets)
    more_options: Mapping[str, type]

    @property
    def arguments(self) -> dict[str, type]:
        """The groups of --network_args."""
        own = {"blocks": self.options, "split": SplitOptions, "conv": NoConvOptions}
        return {**own, **self.more_options, **LORA_ARGUMENTS, "layer": FusedLayerOptions}

    def create_network(
        self,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: nn.Module | None,
        text_encoder: TextEncoders,
        unet: nn.Module | None,
        neuron_dropout: float | None = None,
        **kwargs: Any,
    ) -> AdapterNetwork:
        """A new LoRA, not yet attached. `kwargs` are --network_args.

        Text encoders in the order of the family, None where one gets no adapters. Raises UserError listing every
        mistake in the arguments.
        """
        options = read_network_args(self.arguments, kwargs)
        options["conv"].warn()
        dim, alpha = default_sizes(network_dim, network_alpha)
        asked = "t5" in options and options["t5"].train_t5xxl
        targets = self.targets(text_encoder, unet, split=options["split"].split_qkv, t5=asked)
        rules = self.type_dims(options["blocks"], dim, targets)
        return new_lora(
            options,
            [target for target in targets if rules.wants(target)],
            lambda target: (rules.rank(target), alpha),
            alpha=alpha,
            neuron_dropout=neuron_dropout,
            multiplier=multiplier,
        )

    def create_network_from_weights(
        self,
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

        Any Linear of the models may be in the file. Raises UserError.
        """
        options = read_network_args(self.arguments, kwargs)
        options["conv"].warn()
        return lora_from_weights(
            options,
            self.targets(text_encoder, unet, split=options["split"].split_qkv, t5=True, outside=True),
            decided=given(options["blocks"]),
            file=file,
            weights_sd=weights_sd,
            for_inference=for_inference,
            neuron_dropout=neuron_dropout,
            multiplier=multiplier,
        )

    def targets(
        self, text_encoder: TextEncoders, unet: nn.Module | None, *, split: bool, t5: bool, outside: bool = False
    ) -> list[TargetSpec]:
        """Text encoders first. outside: as for `text_targets`.

        Raises UserError when the denoiser is another architecture's.
        """
        require_class(unet, self.models, self.module)
        denoiser = [] if unet is None else self.denoiser_targets(unet)
        return split_targets([*text_targets(as_list(text_encoder), t5=t5, outside=outside), *denoiser], split)
