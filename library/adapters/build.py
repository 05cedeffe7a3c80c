# SPDX-License-Identifier: Apache-2.0
"""The builder: a kind of adapters and the targets of an architecture make a network, from options or from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.adapter_network import AdapterNetwork
from library.adapters.file_readers import READERS
from library.adapters.formats.adapter_files import by_module, read_tensors
from library.adapters.formats.architecture import Tables
from library.adapters.formats.conversion import to_kohya
from library.adapters.formats.damage import BROKEN
from library.adapters.formats.deltas import kohya_dora
from library.adapters.formats.recognition import OFT_PREFIX, architectures_with
from library.adapters.kind import AdapterKind, LayerReader
from library.adapters.layer_network import RateRules
from library.adapters.layers.new_inputs import NewInputsLayer
from library.adapters.layers.norm import NormLayer
from library.adapters.layers.rewrite import RewriteLayer
from library.adapters.options import BlockOptions, LoraPlusOptions, PatternOptions, read_network_args
from library.adapters.target_spec import TargetSpec
from library.adapters.targets import AdaptedModels, RankRule, Targets, TextEncoders
from library.errors import UserError, first_names, retold
from library.log import get_logger

# Tensor that tells a kind of adapters -> the network module that reads it
READING = {
    "lora_down.weight": "networks.lora",
    "hada_w1_a": "networks.loha",
    "lokr_w1": "networks.lokr",
    "lokr_w1_a": "networks.lokr",
    "oft_blocks": "networks.oft",
    "oft_blocks.0": "networks.oft_flux",
}
MakeLayer = Callable[[TargetSpec, int, float], AdapterLayer]  # (target, rank, alpha)


@dataclass(frozen=True)
class NetworkBuilder:
    """The two functions of a network module, for one kind of adapters on the targets of some architectures.

    Raises ValueError for a kind and targets that do not go together.
    """

    module: str  # the --network_module
    kind: AdapterKind
    targets: Targets
    tables: Tables  # of every architecture: names of layers in files

    def __post_init__(self) -> None:
        if self.kind.prefix != self.targets.prefix:
            raise ValueError(f"{self.module}: {self.kind.prefix} adapters do not go with {self.targets.prefix} targets")
        if self.kind.blocks is not None and self.targets.options.get("blocks") is not BlockOptions:
            raise ValueError(f"{self.module}: these adapters need targets with the option group BlockOptions")

    @property
    def arguments(self) -> dict[str, type]:
        """The groups of --network_args."""
        groups = {**self.targets.options, **self.kind.options}
        if self.targets.fused:
            groups |= self.kind.fused_options
        if self.kind.blocks is not None:
            del groups["blocks"]
        return groups

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
        """A new network, not yet attached. `kwargs` are --network_args.

        text_encoder: in the order of the family, None where one gets no adapters.
        Raises UserError listing every mistake in the arguments.
        """
        models = AdaptedModels(text_encoder, unet)
        options = read_network_args(self.arguments, kwargs)
        self.targets.require_models(models, self.module)
        dim, alpha = self.kind.sizes(network_dim, network_alpha)
        if self.kind.blocks is not None:
            options["blocks"] = self.kind.blocks(options, dim, alpha)
        settings = self.kind.settings(options, neuron_dropout)
        selection = self.targets.select(options, dim, alpha, models)
        layers = new_layers(
            selection.targets,
            selection.rank_alpha,
            lambda target, rank, own_alpha: self.kind.make(target, rank, own_alpha, settings),
            patterns=options.get("patterns", PatternOptions()),
            alpha=alpha,
        )
        layers += map(NewInputsLayer, self.targets.new_inputs(models))
        rates = rate_rules(options, selection.block_weights)
        return self.kind.network(layers, rates=rates, multiplier=multiplier, tables=self.tables)

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
        """A network with the layers, sizes and values of a file (or of `weights_sd`), and its tensors.

        for_inference: nothing learns, and the file may be of any kind, where this kind allows it.
        Raises UserError, also for options that the file decides.
        """
        models = AdaptedModels(text_encoder, unet)
        options = read_network_args(self.arguments, kwargs)
        self.targets.require_models(models, self.module)
        self._refuse_decided(options, file)
        if self.kind.blocks is not None:
            options["blocks"] = BlockOptions()
        grown = {target.name: target for target in self.targets.new_inputs(models)}
        whole: LayerReader = RewriteLayer if for_inference else NewInputsLayer
        targets = [target for target in self.targets.in_file(options, models) if target.name not in grown]
        readers = READERS if for_inference and self.kind.reads_every_kind else self.kind.readers
        weights = weights_of(file, weights_sd)
        layers = layers_from_weights(
            [*targets, *grown.values()],
            [*readers, whole] if grown else readers,
            weights,
            self.tables,
            settings=self.kind.settings(options, neuron_dropout),
            file=str(file or "adapter weights"),
        )
        there = {layer.target.name for layer in layers}
        if not for_inference:
            layers += [NewInputsLayer(target) for name, target in grown.items() if name not in there]
        rates = rate_rules(options, self.targets.block_weights(options, models))
        network = self.kind.network(layers, rates=rates, multiplier=multiplier, tables=self.tables)
        if for_inference:
            network.requires_grad_(False).eval()
        return network, weights

    def _refuse_decided(self, options: Mapping[str, Any], file: str | Path | None) -> None:
        """Raise UserError for sizes given beside a file, and warn about forms of layers, which have no effect."""
        names = (*self.targets.decided_by_file, *self.kind.decided_by_file, "network_reg_dims")
        decided = given(options, names)
        if decided:
            raise UserError(f"--network_args: {', '.join(decided)}: {self.kind.in_file.format(file=file)}")
        forms = self.kind.forms(options)
        if forms:
            names_given = ", ".join(forms)
            get_logger().warning("--network_args: %s: no effect, %s decides the form of its layers", names_given, file)


def given(options: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Those of the options `names` that differ from their defaults."""
    changed = {
        field.name for group in options.values() for field in fields(group)
        if getattr(group, field.name) != field.default
    }  # fmt: skip
    return [name for name in names if name in changed]


def new_layers(
    targets: Iterable[TargetSpec], ranks: RankRule, make_layer: MakeLayer, *, patterns: PatternOptions, alpha: float
) -> list[AdapterLayer]:
    """The layers of a new network. network_reg_dims overrides `ranks`.

    Raises UserError when nothing is left to adapt.
    """
    layers: list[AdapterLayer] = []
    for target in targets:
        matched = [rank for pattern, rank in patterns.network_reg_dims or () if target.matches(pattern)]
        rank, own_alpha = (matched[0], alpha) if matched else ranks(target)
        if not rank:
            continue
        if isinstance(target.modules[0].module, (nn.LayerNorm, nn.GroupNorm)):
            layers.append(NormLayer(target))
            continue
        layers.append(make_layer(target, rank, own_alpha))
        if patterns.verbose:
            get_logger().info("adapter %s: rank %d, alpha %g", target.name, rank, own_alpha)
    if not layers:
        raise UserError("--network_args: no layer is left to train (every block has rank or learning-rate weight 0)")
    return layers


def layers_from_weights(
    targets: Sequence[TargetSpec],
    readers: Sequence[LayerReader],
    weights: Mapping[str, Tensor],
    tables: Tables,
    *,
    settings: Any,
    file: str,
) -> list[AdapterLayer]:
    """The layers of a file, with its ranks and values, in the order of the targets.

    Raises UserError for what does not belong to the model.
    """
    known = {target.name: target for target in targets}
    with retold(lambda line: f"{file}: {line}"):
        files = by_module(to_kohya(weights, tables, among=architectures_with(known, tables)))
    _refuse_foreign(files, known, file)
    problems: list[str] = []
    reading: dict[str, None] = {}
    made: dict[str, AdapterLayer] = {}
    for name, in_file in files.items():
        reader = next((reader for reader in readers if reader.claims(set(in_file))), None)
        if reader is None:
            problems.append(f"{name} ({', '.join(in_file)})")
            if name.startswith("lora_") and "oft_blocks" in in_file:  # of LyCORIS: merged, but trained by none of ours
                continue
            reading |= {READING[suffix]: None for suffix in in_file if suffix in READING}
            continue
        try:
            tensors = kohya_dora(in_file, known[name])
            made[name] = reader.from_tensors(known[name], tensors, settings)
            problem = made[name].problem(tensors)
        except BROKEN as error:
            problem = f"is damaged ({str(error).splitlines()[0]})"
        if problem is not None:
            problems.append(f"{name} {problem}")
        else:
            made[name].load_tensors(tensors)
    if problems:
        advice = f" (--network_module {' or '.join(reading)} reads such files)" if reading else ""
        names = first_names(problems)
        raise UserError(f"{file}: {len(problems)} adapters are of another kind or damaged: {names}{advice}")
    return [made[name] for name in known if name in made]


def _refuse_foreign(files: Mapping[str, Mapping[str, Tensor]], known: Mapping[str, TargetSpec], file: str) -> None:
    """Raise UserError for layers that the model does not have."""
    foreign = [f"{name}.{suffix}" for name in files if name not in known for suffix in files[name]]
    if not foreign:
        return
    if all(key.startswith(OFT_PREFIX) for key in foreign) and not any(n.startswith(OFT_PREFIX) for n in known):
        raise UserError(f"{file} holds rotations of OFT: they go with --network_module networks.oft or oft_flux")
    raise UserError(f"{file}: {len(foreign)} keys name no layer of this model: {first_names(foreign)}")


def rate_rules(options: Mapping[str, Any], block_weights: tuple[float, ...] | None) -> RateRules:
    """LoRA+ ratios (that of a model overrides the general one), learning rates by name and by block."""
    plus: LoraPlusOptions = options.get("plus", LoraPlusOptions())
    patterns: PatternOptions = options.get("patterns", PatternOptions())
    general = plus.loraplus_lr_ratio
    denoiser, encoder = plus.loraplus_unet_lr_ratio, plus.loraplus_text_encoder_lr_ratio
    return RateRules(
        block_weights,
        general if denoiser is None else denoiser,
        general if encoder is None else encoder,
        patterns.network_reg_lrs or (),
    )


def weights_of(file: str | Path | None, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors that were given, or those of the file."""
    if weights is not None:
        return dict(weights)
    if file is None:
        raise ValueError("neither a file nor its weights are given")
    return read_tensors(file)
