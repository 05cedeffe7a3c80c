# SPDX-License-Identifier: Apache-2.0
"""--network_module: our own modules and third-party ones, behind one interface.

A third-party module (LyCORIS, a user's own file) follows the contract of kohya-ss/sd-scripts: `create_network(...)`
returns an nn.Module with apply_to, prepare_optimizer_params, ... `PluginNetwork` drives it as an AdapterNetwork.
Only this file asks an object what it can do; a contract that others fill in differently leaves no other way.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from library.device import on_device
from library.errors import UserError, first_names, nearest
from networks.base import AdapterNetwork, NormReport, Rates
from networks.formats import read_tensors, to_kohya, write_tensors
from networks.network import encoder_rate
from networks.options import read_network_args
from networks.readers.trained import TrainedLayer, foreign_layer
from networks.targets import TextEncoders, as_list

REQUIRED = ("apply_to", "prepare_optimizer_params", "load_weights", "save_weights")
INSTALL = {"lycoris": "pip install lycoris-lora"}

DEFINITION = re.compile(r"^(def create_network\(|create_network = )", re.MULTILINE)


class PublishedEncoder(nn.Module):
    """A text encoder one level deeper, so that module paths start with `text_model` as published names do."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.text_model = encoder


@dataclass(frozen=True)
class Models:
    """The models as third-party modules expect them: one text encoder alone, several as a list."""

    text_encoder: nn.Module | list[nn.Module] | None
    unet: nn.Module | None
    places: tuple[int, ...] = ()  # of the text encoders, among the learning rates

    @classmethod
    def published(cls, text_encoder: TextEncoders, unet: nn.Module | None) -> Models:
        given = {place: encoder for place, encoder in enumerate(as_list(text_encoder)) if encoder is not None}
        encoders = [_published(encoder) for encoder in given.values()]
        return cls(None if not encoders else encoders[0] if len(encoders) == 1 else encoders, unet, tuple(given))


def _published(encoder: nn.Module) -> nn.Module:
    flattened = type(encoder).__name__ == "CLIPTextModel" and "text_model" not in dict(encoder.named_children())
    return PublishedEncoder(encoder) if flattened else encoder


@dataclass(frozen=True)
class NetworkModule:
    """An imported --network_module. Both functions return AdapterNetworks, whatever the module returns."""

    name: str
    module: ModuleType

    @property
    def is_own(self) -> bool:
        """Whether it is one of this package: those find their way in models and lists of encoders as they are."""
        return self.module.__name__.startswith("networks.")

    @property
    def conditioned(self) -> bool:
        """Whether its networks look at control images. Such a network changes the denoiser only."""
        return bool(self.module.__dict__.get("CONDITIONED", False))

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Raises UserError listing every mistake in --network_args; third-party modules check their own when built."""
        groups = self.module.__dict__.get("ARGUMENTS")
        if groups is not None:
            read_network_args(groups, arguments)

    def create_network(
        self, multiplier: float, network_dim: int | None, network_alpha: float | None, vae: nn.Module | None,
        text_encoder: TextEncoders, unet: nn.Module | None,
        neuron_dropout: float | None = None, **kwargs: Any,
    ) -> AdapterNetwork:  # fmt: skip
        """A new network. Raises UserError for what the module refuses."""
        models = Models.published(text_encoder, unet)
        encoders = text_encoder if self.is_own else models.text_encoder
        if neuron_dropout is not None:
            kwargs.setdefault("dropout", neuron_dropout)  # LyCORIS reads this name
        made = self._guarded(
            self.module.create_network, multiplier, network_dim, network_alpha, vae,
            encoders, unet, neuron_dropout=neuron_dropout, **kwargs,
        )  # fmt: skip
        return made if isinstance(made, AdapterNetwork) else PluginNetwork(made, models, self.name, multiplier)

    def create_network_from_weights(
        self, multiplier: float, file: str | Path | None, vae: nn.Module | None,
        text_encoder: TextEncoders, unet: nn.Module | None,
        weights_sd: Mapping[str, Tensor] | None = None, for_inference: bool = False, **kwargs: Any,
    ) -> tuple[AdapterNetwork, dict[str, Tensor]]:  # fmt: skip
        """A network as a file has it, and the file's tensors."""
        create = self.module.__dict__.get("create_network_from_weights")
        if create is None:
            raise UserError(f"--network_module {self.name} has no create_network_from_weights()")
        models = Models.published(text_encoder, unet)
        encoders = text_encoder if self.is_own else models.text_encoder
        path = None if file is None else str(file)
        made, weights = self._guarded(create, multiplier, path, vae, encoders, unet,
                                      weights_sd=weights_sd, for_inference=for_inference, **kwargs)  # fmt: skip
        if isinstance(made, AdapterNetwork):
            return made, weights
        return PluginNetwork(made, models, self.name, multiplier, weights), weights

    def _guarded(self, create: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The call, with the refusals of a third-party module as one line."""
        try:
            return create(*args, **kwargs)
        except UserError:
            raise
        except (TypeError, ValueError, KeyError, NotImplementedError) as error:
            if self.is_own:
                raise
            refused = f"--network_module {self.name} refuses these --network_args"
            raise UserError(f"{refused}: {type(error).__name__}: {error}") from error


def load_network_module(name: str) -> NetworkModule:
    """Import a --network_module by its dotted name. Raises UserError when it is not there or no network module."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # importing runs foreign code
        raise UserError(f"--network_module {name} cannot be imported: {error}{_hint(name)}") from None
    if not callable(module.__dict__.get("create_network")):
        raise UserError(f"--network_module {name} has no create_network(){_hint(name)}")
    return NetworkModule(name, module)


def own_modules() -> list[str]:
    """The network modules of this package."""
    package = importlib.import_module("networks")
    names = [f"networks.{info.name}" for info in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if _defines_create_network(name)]


def _defines_create_network(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    origin = spec.origin if spec is not None else None
    return origin is not None and DEFINITION.search(Path(origin).read_text("utf-8")) is not None


def _hint(name: str) -> str:
    root = name.partition(".")[0]
    if root in INSTALL:
        return f" (install it: {INSTALL[root]})"
    names = own_modules()
    return f". Did you mean {nearest(name, names) or ' or '.join(names)}?"


class PluginNetwork(AdapterNetwork):
    """A third-party network, driven through the interface of ours."""

    network: Any

    def __init__(
        self, network: Any, models: Models, name: str, multiplier: float, weights: Mapping[str, Tensor] | None = None
    ):
        super().__init__()
        missing = [method for method in REQUIRED if not callable(getattr(network, method, None))]
        if not isinstance(network, nn.Module) or missing:
            lacks = ", ".join(missing) or "parameters (it is no nn.Module)"
            raise UserError(f"--network_module {name}: its network lacks {lacks}")
        self.network = network
        self.models = (models,)  # in a tuple: the models' weights are not the adapter's
        self.module_name, self.multiplier, self.weights, self.attached = name, multiplier, weights, False

    def _call(self, method: str, *args: Any) -> Any:
        """Call an optional method of the contract; None when the network has no such method."""
        function = getattr(self.network, method, None)
        return function(*args) if callable(function) else None

    def attach(self, *, train_denoiser: bool, train_text_encoder: bool) -> None:
        """Its own `apply_to` replaces the modules' forward; a second call would wrap it twice, so it is refused."""
        models = self.models[0]
        self.network.apply_to(models.text_encoder, models.unet, train_text_encoder, train_denoiser)
        self._call("prepare_grad_etc", models.text_encoder, models.unet)
        self.attached = True
        if self.weights is not None:
            self.load(self.weights)

    def detach(self) -> None:
        """By its own `restore`, of the network or of each of its layers."""
        if callable(getattr(self.network, "restore", None)):
            self.network.restore()
            return
        layers = [layer for layer in self.network.modules() if layer is not self.network]
        restorable = [layer for layer in layers if callable(getattr(layer, "restore", None))]
        if not restorable:
            raise UserError(f"--network_module {self.module_name} cannot be detached (it has no restore)")
        for layer in restorable:
            layer.restore()

    def param_groups(
        self, *, learning_rate: float | None, unet_lr: float | None = None, text_encoder_lr: Rates = None
    ) -> list[dict[str, Any]]:
        many = getattr(self.network, "prepare_optimizer_params_with_multiple_te_lrs", None)
        prepare = many or self.network.prepare_optimizer_params
        rates = [encoder_rate(text_encoder_lr, place) for place in self.models[0].places or (0,)]
        encoder = (None if rates[0] is None else rates) if many else rates[0]
        args = [encoder, unet_lr, learning_rate]
        if not _takes(prepare, 3):
            args = [learning_rate if encoder is None else encoder, learning_rate if unet_lr is None else unet_lr]
        groups, names = _with_names(prepare(*args))
        return [
            {**group, "params": [*group["params"]], "name": name, "lr": group.get("lr", learning_rate)}
            for group, name in zip(groups, names, strict=True)
            if group.get("lr", learning_rate)
        ]

    def state(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """What its own `save_weights` writes: some networks fold tensors together there."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.safetensors"
            self.network.save_weights(str(path), dtype, {})
            return {key: value.clone() for key, value in read_tensors(path).items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Before `attach` the tensors wait: many networks know their layers only after apply_to."""
        self.weights = dict(tensors)
        if not self.attached:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.safetensors"
            own = {key: value.detach().cpu().contiguous() for key, value in to_kohya(tensors).items()}
            write_tensors(path, own, None)
            try:
                info = self.network.load_weights(str(path))
            except RuntimeError as error:
                line = str(error).strip().splitlines()[-1].strip()
                raise UserError(f"the adapter file does not fit --network_module {self.module_name}: {line}") from None
        unexpected = _unexpected(info)
        if unexpected:
            names = first_names(unexpected)
            raise UserError(f"{len(unexpected)} keys of the adapter file belong to no adapter here: {names}")

    def merge_into(self, *, dtype: torch.dtype | None = None) -> None:
        if not callable(getattr(self.network, "merge_to", None)):
            raise UserError(f"--network_module {self.module_name} cannot merge into a model (no merge_to)")
        models, strength = self.models[0], self.multiplier
        weights = self.state(None) if self.weights is None else self.weights
        with self._on_one_device() as (whole, device):
            before = None if strength == 1 else {n: p.detach().clone() for n, p in whole.named_parameters()}
            self.set_multiplier(1.0)
            self.network.merge_to(models.text_encoder, models.unet, weights, dtype, device)
            self.set_multiplier(strength)
            if before is not None:  # LyCORIS merges at strength 1 whatever its multiplier is, so the strength is ours
                with torch.no_grad():
                    for name, parameter in whole.named_parameters():
                        parameter.copy_(torch.lerp(before[name].float(), parameter.float(), strength))

    @contextmanager
    def _on_one_device(self) -> Iterator[tuple[nn.ModuleList, torch.device]]:
        """The models and where they are: the contract of `merge_to` has one device for all of them.

        Inside it the text encoders and the network are where the denoiser is, which may wait in main memory.
        """
        given = (*as_list(self.models[0].text_encoder), self.models[0].unet)
        models = nn.ModuleList([model for model in given if model is not None])
        places = [next(model.parameters()).device for model in models]
        self.network.to(places[-1])
        try:
            yield models.to(places[-1]), places[-1]
        finally:
            for model, place in zip(models, places, strict=True):
                model.to(place)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        before = self.multiplier
        self.set_multiplier(0.0)
        try:
            yield
        finally:
            self.set_multiplier(before)

    def set_multiplier(self, multiplier: float) -> None:
        """By its own `set_multiplier`, or in every layer that has a multiplier."""
        self.multiplier = multiplier
        if callable(getattr(self.network, "set_multiplier", None)):
            self.network.set_multiplier(multiplier)
            return
        for layer in self.network.modules():
            if isinstance(getattr(layer, "multiplier", None), (int, float)):
                layer.multiplier = multiplier

    def scale_norms(self, max_norm: float) -> NormReport:
        if not callable(getattr(self.network, "apply_max_norm_regularization", None)):
            raise UserError(f"--scale_weight_norms: --network_module {self.module_name} does not support it")
        device = next(self.network.parameters()).device
        found = self.network.apply_max_norm_regularization(max_norm, device)
        scaled, mean, maximum = (on_device(torch.as_tensor(value, dtype=torch.float32), device) for value in found)
        return NormReport(scaled, mean, maximum)

    def module_parameters(self) -> dict[str, list[nn.Parameter]]:
        found: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.network.named_parameters():
            found.setdefault(name.partition(".")[0], []).append(parameter)
        return found

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        own = self._call("get_trainable_params")
        return iter(self.network.parameters() if own is None else own)

    def trained(self) -> list[TrainedLayer]:
        """Layers that say their name, and which module's forward they stand for."""
        found = []
        for layer in self.network.modules():
            name, forward = getattr(layer, "lora_name", None), getattr(layer, "org_forward", None)
            module = getattr(forward, "__self__", None)
            if isinstance(name, str) and isinstance(module, nn.Module):
                # LyCORIS' full matrices take the module's own away and keep them
                weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
                weight = layer.org_weight if weight is None else weight
                bias = (getattr(layer, "org_bias", None) or [None])[0] if bias is None else bias
                found.append(foreign_layer(name, layer, module, weight, bias))
        return found

    def epoch_started(self) -> None:
        models = self.models[0]
        self._call("on_epoch_start", models.text_encoder, models.unet)

    def enable_gradient_checkpointing(self) -> None:
        self._call("enable_gradient_checkpointing")


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether `function` can be called with `count` positional arguments."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) >= count


def _with_names(result: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Groups and their names from what prepare_optimizer_params returned: groups alone, or with descriptions."""
    groups, names = result if isinstance(result, tuple) else (result, None)
    groups = [group if isinstance(group, dict) else {"params": [group]} for group in groups]
    return groups, [*names] if names and len(names) == len(groups) else [f"group {i + 1}" for i in range(len(groups))]


def _unexpected(info: Any) -> list[str]:
    """Unexpected keys in what load_weights returned: torch's result, or a dict of LyCORIS."""
    if isinstance(info, Mapping):
        return [*info.get("unexpected keys", ())]
    return [*getattr(info, "unexpected_keys", ())]
