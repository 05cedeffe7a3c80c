# SPDX-License-Identifier: Apache-2.0
"""The network of our own adapter layers: attach, learning-rate groups, files, merging."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.adapter_network import AdapterNetwork, NormReport, Rates, in_dtype
from library.adapters.formats.adapter_files import by_module
from library.adapters.formats.architecture import Tables
from library.adapters.formats.conversion import to_kohya
from library.adapters.formats.damage import BROKEN
from library.adapters.formats.deltas import kohya_dora
from library.adapters.formats.recognition import architectures_with
from library.adapters.readers.trained_layer import TrainedLayer, trained_layer
from library.adapters.target_spec import Component, TargetSpec
from library.errors import UserError, first_names
from library.log import get_logger
from library.optim.working_copy import FindCopy


@dataclass(frozen=True)
class RateRules:
    """Learning rates within a network: a factor per denoiser block, LoRA+ ratios (None: no group of its own), patterns.

    patterns: (regular expression, rate). The first one that matches a layer sets its rate and overrides all others.
    """

    block_weights: tuple[float, ...] | None = None
    denoiser_plus: float | None = None
    text_encoder_plus: float | None = None
    patterns: tuple[tuple[re.Pattern[str], float], ...] = ()


class LayerNetwork(AdapterNetwork):
    """Adapter layers by published name. Order: text encoders, then the denoiser, as in the file."""

    def __init__(
        self,
        layers: Iterable[AdapterLayer],
        *,
        rates: RateRules | None = None,
        multiplier: float = 1.0,
        tables: Tables = (),
    ):
        """tables: names of layers in files, for `load`; without any, files have the names of the layers."""
        super().__init__()
        self.tables = tables
        self.layers = nn.ModuleDict({layer.target.name: layer for layer in layers})
        self.rates = rates or RateRules()
        self.left_out: dict[str, Component] = {}  # layers of models that are not trained
        self._multiplier: float | None = None  # of the layers, once it was set
        self.set_multiplier(multiplier)

    def named_layers(self, part: Component | None = None) -> dict[str, AdapterLayer]:
        """Published name -> layer, of one part of the model or of both."""
        found: dict[str, AdapterLayer] = {}
        for name, layer in self.layers.items():
            assert isinstance(layer, AdapterLayer)
            if part in (None, layer.target.part):
                found[name] = layer
        return found

    # ---- forward ---------------------------------------------------------------------------------------------------

    def attach(self, *, train_denoiser: bool, train_text_encoder: bool) -> None:
        wanted = {"denoiser": train_denoiser, "text_encoder": train_text_encoder}
        for name, layer in self.named_layers().items():
            if wanted[layer.target.part]:
                layer.attach()
            else:
                self.left_out[name] = layer.target.part
                del self.layers[name]

    def detach(self) -> None:
        for layer in self.named_layers().values():
            layer.detach()

    @cached_property
    def _listening(self) -> list[AdapterLayer]:
        """The layers that have to know of each step."""
        return [layer for layer in self.named_layers().values() if layer.reads_between_steps]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        layers = [*self.named_layers().values()]
        before = [layer.enabled for layer in layers]
        for layer in layers:
            layer.enabled = False
        try:
            yield
        finally:
            for layer, enabled in zip(layers, before, strict=True):
                layer.enabled = enabled

    def set_multiplier(self, multiplier: float) -> None:
        if multiplier == self._multiplier:
            return
        self._multiplier = multiplier
        for layer in self.named_layers().values():
            layer.set_multiplier(multiplier)

    def scale_norms(self, max_norm: float) -> NormReport:
        limited = [layer.limit_norm(max_norm) for layer in self.named_layers().values()]
        norms = [found[0] for found in limited if found is not None]
        scaled = [found[1] for found in limited if found is not None]
        if not norms:
            zero = torch.zeros(())
            return NormReport(zero, zero, zero)
        all_norms = torch.stack(norms)
        return NormReport(torch.stack(scaled).sum(), all_norms.mean(), all_norms.max())

    def targets(self) -> dict[str, TargetSpec]:
        return {name: layer.target for name, layer in self.named_layers().items()}

    def trained(self) -> list[TrainedLayer]:
        return [trained_layer(layer) for layer in self.named_layers().values()]

    def step_taken(self) -> None:
        for layer in self._listening:
            layer.step_taken()

    def use_copies(self, find: FindCopy) -> None:
        for layer in self.named_layers().values():
            layer.use_copies(find)

    def reads_weights(self, among: Iterable[nn.Module]) -> bool:
        chosen = {id(module) for module in among}
        reading = (layer for layer in self.named_layers().values() if layer.reads_weights)
        return any(id(target.module) in chosen for layer in reading for target in layer.target.modules)

    def reads_between_steps(self) -> bool:
        return any(layer.reads_between_steps for layer in self.named_layers().values())

    def is_sparse(self) -> bool:
        return any(layer.sparse for layer in self.named_layers().values())

    def exact_tensors(self) -> dict[str, Tensor]:
        return {**super().exact_tensors(), **dict(self.named_buffers())}

    def merge_into(self, *, dtype: torch.dtype | None = None) -> None:
        self.detach()
        for layer in self.named_layers().values():
            layer.merge(dtype)

    # ---- optimizer -------------------------------------------------------------------------------------------------

    def param_groups(
        self, *, learning_rate: float | None, unet_lr: float | None = None, text_encoder_lr: Rates = None
    ) -> list[dict[str, Any]]:
        rules = self.rates
        groups: list[dict[str, Any]] = []
        encoders = self.named_layers("text_encoder").values()
        for index in sorted({layer.target.encoder for layer in encoders}):
            layers = [layer for layer in encoders if layer.target.encoder == index]
            rate = encoder_rate(text_encoder_lr, index)
            rate = learning_rate if rate is None else rate
            name = encoder_label(layers[0].target.name)
            others, matched = self._matched(name, layers, rules.text_encoder_plus)
            groups += [*matched, *_groups(others, name, rate, rules.text_encoder_plus)]
        rate = learning_rate if unet_lr is None else unet_lr
        others, matched = self._matched("unet", [*self.named_layers("denoiser").values()], rules.denoiser_plus)
        groups += matched
        for name, weight, layers in self._denoiser_blocks(others):
            groups += _groups(layers, name, None if rate is None else rate * weight, rules.denoiser_plus)
        return groups

    def _matched(
        self, part: str, layers: Sequence[AdapterLayer], plus: float | None
    ) -> tuple[list[AdapterLayer], list[dict[str, Any]]]:
        """The layers that no pattern matches, and the optimizer groups of the others."""
        groups: list[dict[str, Any]] = []
        others = [*layers]
        for index, (pattern, rate) in enumerate(self.rates.patterns):
            own = [layer for layer in others if layer.target.matches(pattern)]
            others = [layer for layer in others if not layer.target.matches(pattern)]
            groups += _groups(own, f"{part} reg_lr_{index}", rate, plus)
        return others, groups

    def _denoiser_blocks(self, layers: list[AdapterLayer]) -> list[tuple[str, float, list[AdapterLayer]]]:
        """(group name, learning-rate factor, layers): one entry, or one per block in the order of the file."""
        weights = self.rates.block_weights
        if weights is None:
            return [("unet", 1.0, layers)]
        blocks: dict[int | None, list[AdapterLayer]] = {}
        for layer in layers:
            blocks.setdefault(layer.target.block, []).append(layer)
        return [
            ("unet", 1.0, own) if block is None else (f"unet_block{block}", weights[block], own)
            for block, own in blocks.items()
        ]

    def module_parameters(self) -> dict[str, list[nn.Parameter]]:
        return {name: [*layer.parameters()] for name, layer in self.named_layers().items()}

    # ---- files -----------------------------------------------------------------------------------------------------

    def state(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        layers = self.named_layers().items()
        return in_dtype({f"{n}.{suffix}": value for n, own in layers for suffix, value in own.tensors().items()}, dtype)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load tensors with keys of any format. Layers that are missing keep their values, with a warning."""
        layers = self.named_layers()
        files = by_module(
            to_kohya(tensors, self.tables, among=architectures_with([*layers, *self.left_out], self.tables))
        )
        unknown = [f"{name}.{suffix}" for name in files if name not in layers and name not in self.left_out
                   for suffix in files[name]]  # fmt: skip
        if unknown:
            raise UserError(
                f"{len(unknown)} keys of the adapter file belong to no adapter here: {first_names(unknown)}"
            )
        files = {n: kohya_dora(own, layers[n].target) if n in layers else own for n, own in files.items()}
        problems = {name: _problem(layers[name], own) for name, own in files.items() if name in layers}
        wrong = [f"{name} {problem}" for name, problem in problems.items() if problem]
        if wrong:
            more = f" ({len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
            raise UserError(f"the adapter file does not fit: {wrong[0]}{more}")
        self._warn_about_missing(files)
        for name in problems:
            layers[name].load_tensors(files[name])

    def _warn_about_missing(self, files: Mapping[str, Any]) -> None:
        unused = [name for name in files if name in self.left_out]
        if unused:
            names = first_names(unused)
            get_logger().warning("%d adapters of the file are of a model that is not trained: %s", len(unused), names)
        layers = self.named_layers()
        present = {layers[name].target.part for name in files if name in layers}
        missing = [name for name, layer in layers.items() if name not in files and layer.target.part in present]
        if missing:
            names = first_names(missing)
            get_logger().warning("%d adapters are not in the file and keep their values: %s", len(missing), names)


def _problem(layer: AdapterLayer, own: Mapping[str, Tensor]) -> str | None:
    try:
        return layer.problem(own)
    except BROKEN as error:
        return f"is damaged ({str(error).splitlines()[0]})"


def encoder_rate(rates: Rates, index: int) -> float | None:
    """The learning rate of text encoder `index`: its own, or the last one given."""
    if isinstance(rates, Sequence):
        return rates[min(index, len(rates) - 1)] if rates else None
    return rates


def encoder_label(name: str) -> str:
    """ "textencoder", or "textencoder 2" for the layers of lora_te2_."""
    return f"textencoder {name.split('_')[1].removeprefix('te')}".strip()


def _groups(layers: Sequence[AdapterLayer], name: str, rate: float | None, plus: float | None) -> list[dict[str, Any]]:
    """An optimizer group, and a second one for LoRA+ parameters; empty for a rate of 0."""
    if not rate:
        return []
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    for layer in layers:
        for parameter_name, parameter in layer.named_parameters():
            is_fast = plus is not None and not {*parameter_name.split(".")}.isdisjoint(layer.plus)
            (fast if is_fast else slow).append(parameter)
    groups = [{"params": slow, "lr": rate, "name": name}]
    if plus is not None:
        groups.append({"params": fast, "lr": rate * plus, "name": f"{name} plus"})
    return [group for group in groups if group["params"]]
