# SPDX-License-Identifier: Apache-2.0
"""--network_module: our own modules and third-party ones, behind one interface.

A third-party module (LyCORIS, a user's own file) follows the contract of kohya-ss/sd-scripts: `create_network(...)`
returns an nn.Module with apply_to, prepare_optimizer_params, ... `PluginNetwork` drives it as an AdapterNetwork. It is
given the models as sd-scripts builds them (library/adapters/foreign/published_model.py).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from library.adapters.adapter_network import AdapterNetwork
from library.adapters.build import NetworkBuilder, weights_of
from library.adapters.file_readers import is_readable
from library.adapters.foreign.plugin_network import PluginNetwork, describe, foreign_code, refuse_comfy_dora
from library.adapters.foreign.published_model import PublishedModels, published_models
from library.adapters.formats.architecture import Tables
from library.adapters.layers.lora import LORA
from library.adapters.options import read_network_args
from library.adapters.targets import AdaptedModels, AnyFamily, TextEncoders
from library.errors import UserError, nearest

INSTALL = {"lycoris": "pip install lycoris-lora"}


@dataclass(frozen=True)
class NetworkModule:
    """An imported --network_module. Both functions return AdapterNetworks, whatever the module returns.

    families: for showing models to third-party modules. tables: the names of layers in files.
    """

    name: str
    module: ModuleType
    families: AnyFamily
    tables: Tables

    @property
    def builder(self) -> NetworkBuilder | None:
        """What a module of our own kind calls; None for third-party modules."""
        return self.module.__dict__.get("BUILDER")

    @property
    def is_own(self) -> bool:
        """Whether it is one of ours, which take the models and the list of encoders as they are."""
        return self.module.__name__.startswith("networks.") and self.builder is not None

    @property
    def conditioned(self) -> bool:
        """Whether its networks look at control images. Such a network changes the denoiser only."""
        return bool(self.module.__dict__.get("CONDITIONED", False))

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Raises UserError listing every mistake in --network_args; third-party modules check their own when built."""
        if self.builder is not None:
            read_network_args(self.builder.arguments, arguments)

    def create_network(
        self, multiplier: float, network_dim: int | None, network_alpha: float | None, vae: nn.Module | None,
        text_encoder: TextEncoders, unet: nn.Module | None,
        neuron_dropout: float | None = None, **kwargs: Any,
    ) -> AdapterNetwork:  # fmt: skip
        """A new network. Raises UserError where the module raises an error."""
        sizes = (multiplier, network_dim, network_alpha, vae)
        if self.is_own:
            return self.module.create_network(*sizes, text_encoder, unet, neuron_dropout=neuron_dropout, **kwargs)
        if neuron_dropout is not None:
            kwargs.setdefault("dropout", neuron_dropout)  # LyCORIS reads this name

        def make(models: PublishedModels) -> Any:
            return self.module.create_network(
                *sizes, models.text_encoder, models.unet, neuron_dropout=neuron_dropout, **kwargs
            )

        with foreign_code(self.name, "refuses these --network_args"):
            models = published_models(AdaptedModels(text_encoder, unet), self.families)
            made = make(models)
            missed = _without_layers(made, models)
            if missed:  # it may know none of the classes of these models, but others like them
                models = published_models(AdaptedModels(text_encoder, unet), self.families, missed)
                made = make(models)
        if isinstance(made, AdapterNetwork):
            return made
        return PluginNetwork(made, models, self.name, multiplier, tables=self.tables)

    def create_network_from_weights(
        self, multiplier: float, file: str | Path | None, vae: nn.Module | None,
        text_encoder: TextEncoders, unet: nn.Module | None,
        weights_sd: Mapping[str, Tensor] | None = None, for_inference: bool = False, **kwargs: Any,
    ) -> tuple[AdapterNetwork, dict[str, Tensor]]:  # fmt: skip
        """A network with the layers of a file, and the file's tensors. Raises UserError."""
        create = self.module.__dict__.get("create_network_from_weights")
        if create is None:
            raise UserError(f"--network_module {self.name} has no create_network_from_weights()")
        given = {"weights_sd": weights_sd, "for_inference": for_inference, **kwargs}
        path = None if file is None else str(file)
        if self.is_own:
            return create(multiplier, path, vae, text_encoder, unet, **given)
        if for_inference:  # what our classes know they merge exactly: LyCORIS 4.1 takes the alpha of LoHa twice
            tensors = weights_of(file, weights_sd)
            if is_readable(tensors):
                own_builder = NetworkBuilder(self.name, LORA, self.families, self.tables)
                return own_builder.create_network_from_weights(multiplier, file, vae, text_encoder, unet, tensors, True)
        refuse_comfy_dora(weights_sd or {}, self.name)
        with foreign_code(self.name, "refuses this file or these --network_args"):
            models = published_models(AdaptedModels(text_encoder, unet), self.families)
            made, weights = create(multiplier, path, vae, models.text_encoder, models.unet, **given)
        if isinstance(made, AdapterNetwork):
            return made, weights
        return PluginNetwork(made, models, self.name, multiplier, weights, tables=self.tables), weights


def _without_layers(network: Any, models: PublishedModels) -> list[int | None]:
    """Places of the models in which a network that lists its layers, as LyCORIS does, has found none."""
    lists = [getattr(network, name, None) for name in ("unet_loras", "text_encoder_loras")]
    if None in lists:
        return []
    names = [str(getattr(layer, "lora_name", "")) for layers in lists for layer in layers or ()]
    known = {place: model.prefix for place, model in models.by_place.items() if model.prefix}
    return [place for place, prefix in known.items() if not any(name.startswith(prefix) for name in names)]


def import_network_module(name: str, families: AnyFamily, tables: Tables, own: Sequence[str]) -> NetworkModule:
    """Import a --network_module by its dotted name. own: the modules of this project, for the error message.

    Raises UserError when it is missing or not a network module.
    """
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # importing runs foreign code
        reason = str(error) if isinstance(error, ModuleNotFoundError) else describe(error)
        raise UserError(f"--network_module {name} cannot be imported: {reason}{_hint(name, own)}") from None
    if not callable(module.__dict__.get("create_network")):
        raise UserError(f"--network_module {name} has no create_network(){_hint(name, own)}")
    return NetworkModule(name, module, families, tables)


def _hint(name: str, own: Sequence[str]) -> str:
    root = name.partition(".")[0]
    if root in INSTALL:
        return f" (install it: {INSTALL[root]})"
    return f". Did you mean {nearest(name, own) or ' or '.join(own)}?"
