# SPDX-License-Identifier: Apache-2.0
"""From options or from a file to a network. An adapter type brings its options and a function that makes a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.formats.conversion import by_module, read_tensors, to_kohya
from library.adapters.formats.damage import BROKEN
from library.adapters.formats.deltas import kohya_dora
from library.adapters.formats.recognition import OFT_PREFIX, architectures_with
from library.adapters.layer_network import LayerNetwork, RateRules
from library.adapters.layers.norm import NormLayer
from library.adapters.options import LoraPlusOptions, PatternOptions
from library.adapters.target_spec import TargetSpec
from library.errors import UserError, first_names
from library.log import get_logger

# what a file of another kind is told by -> the module that reads it
READING = {
    "lora_down.weight": "networks.lora",
    "hada_w1_a": "networks.loha",
    "lokr_w1": "networks.lokr",
    "lokr_w1_a": "networks.lokr",
    "oft_blocks": "networks.oft",
    "oft_blocks.0": "networks.oft_flux",
}

MakeLayer = Callable[[TargetSpec, int, float], AdapterLayer]  # (target, rank, alpha)
Ranks = Callable[[TargetSpec], tuple[int, float]]  # rank (0: no adapter) and alpha


class FileLayer(Protocol):
    """A layer class that can be made from the tensors of a file."""

    @staticmethod
    def claims(names: set[str]) -> bool: ...

    @classmethod
    def from_tensors(cls, target: TargetSpec, tensors: Mapping[str, Tensor], settings: Any) -> AdapterLayer: ...


class FileReader(Protocol):
    """What makes layers from the tensors of a file: a FileLayer itself, or something that stands for one."""

    def claims(self, names: set[str], /) -> bool: ...

    def from_tensors(self, target: TargetSpec, tensors: Mapping[str, Tensor], settings: Any, /) -> AdapterLayer: ...


def default_sizes(dim: int | None, alpha: float | None) -> tuple[int, float]:
    """--network_dim (None is 4) and --network_alpha (None is 1). Raises UserError for a dim below 1."""
    if dim is not None and dim < 1:
        raise UserError(f"--network_dim must be at least 1, got {dim}")
    if alpha is not None and not math.isfinite(alpha):
        raise UserError(f"--network_alpha must be a finite number, got {alpha}")
    return 4 if dim is None else int(dim), 1.0 if alpha is None else float(alpha)


def build_network(
    targets: Iterable[TargetSpec],
    ranks: Ranks,
    make_layer: MakeLayer,
    *,
    patterns: PatternOptions,
    alpha: float,
    rates: RateRules,
    multiplier: float,
) -> LayerNetwork:
    """A new network. network_reg_dims stands above `ranks`. Raises UserError when nothing is left to adapt."""
    layers: list[AdapterLayer] = []
    for target in targets:
        matched = [rank for pattern, rank in patterns.network_reg_dims or () if pattern.search(target.name)]
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
    return LayerNetwork(layers, rates=rates, multiplier=multiplier)


def network_from_weights(
    targets: Sequence[TargetSpec],
    kinds: Sequence[FileReader],
    weights: Mapping[str, Tensor],
    *,
    settings: Any,
    rates: RateRules,
    multiplier: float,
    file: str,
) -> LayerNetwork:
    """A network with the layers, ranks and values of a file. Raises UserError for what does not belong to the model."""
    known = {target.name: target for target in targets}
    try:
        files = by_module(to_kohya(weights, among=architectures_with(known)))
    except UserError as error:
        raise UserError([f"{file}: {problem}" for problem in error.problems]) from None
    foreign = [f"{name}.{suffix}" for name in files if name not in known for suffix in files[name]]
    if foreign:
        if all(key.startswith(OFT_PREFIX) for key in foreign) and not any(n.startswith(OFT_PREFIX) for n in known):
            raise UserError(f"{file} holds rotations of OFT: they go with --network_module networks.oft or oft_flux")
        raise UserError(f"{file}: {len(foreign)} keys name no layer of this model: {first_names(foreign)}")
    problems: list[str] = []
    readers: dict[str, None] = {}
    made: dict[str, AdapterLayer] = {}
    for name, in_file in files.items():
        kind = next((kind for kind in kinds if kind.claims(set(in_file))), None)
        if kind is None:
            problems.append(f"{name} ({', '.join(in_file)})")
            if name.startswith("lora_") and "oft_blocks" in in_file:  # of LyCORIS: merged, but trained by none of ours
                continue
            readers |= {READING[suffix]: None for suffix in in_file if suffix in READING}
            continue
        try:
            tensors = kohya_dora(in_file, known[name])
            made[name] = kind.from_tensors(known[name], tensors, settings)
            problem = made[name].problem(tensors)
        except BROKEN as error:
            problem = f"is damaged ({str(error).splitlines()[0]})"
        if problem is not None:
            problems.append(f"{name} {problem}")
        else:
            made[name].load_tensors(tensors)
    if problems:
        advice = f" (--network_module {' or '.join(readers)} reads such files)" if readers else ""
        names = first_names(problems)
        raise UserError(f"{file}: {len(problems)} adapters are of another kind or damaged: {names}{advice}")
    return LayerNetwork([made[name] for name in known if name in made], rates=rates, multiplier=multiplier)


def rate_rules(plus: LoraPlusOptions, patterns: PatternOptions, block_weights: tuple[float, ...] | None) -> RateRules:
    """LoRA+ ratios (the one of a model stands above the general one), rates by name and by block."""
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
