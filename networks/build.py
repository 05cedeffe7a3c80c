# SPDX-License-Identifier: Apache-2.0
"""From options or from a file to a network. An adapter type brings its options and a function that makes a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from library.errors import UserError, first_names
from networks.base import AdapterLayer
from networks.formats import by_module, read_tensors, to_kohya
from networks.lr_weights import BlockLayout, plan_ranks
from networks.network import LayerNetwork, RateRules
from networks.norm_layer import NormLayer
from networks.options import BlockOptions, LoraPlusOptions
from networks.spec import TargetSpec

MakeLayer = Callable[[TargetSpec, int, float], AdapterLayer]  # (target, rank, alpha)
FindTargets = Callable[[bool, bool], list[TargetSpec]]  # (with 3x3 convolutions, with norms)


class FileLayer(Protocol):
    """A layer class that can be made from the tensors of a file."""

    @staticmethod
    def claims(names: set[str]) -> bool: ...

    @classmethod
    def from_tensors(cls, target: TargetSpec, tensors: Mapping[str, Tensor], settings: Any) -> AdapterLayer: ...


def build_network(
    find_targets: FindTargets,
    make_layer: MakeLayer,
    *,
    layout: BlockLayout | None,
    blocks: BlockOptions,
    plus: LoraPlusOptions,
    multiplier: float,
    dim: int | None,
    alpha: float | None,
) -> LayerNetwork:
    """A new network. dim None is 4, alpha None is 1. Raises UserError when nothing is left to adapt."""
    if dim is not None and dim < 1:
        raise UserError(f"--network_dim must be at least 1, got {dim}")
    plan = plan_ranks(blocks, layout, dim=4 if dim is None else int(dim), alpha=1.0 if alpha is None else float(alpha))
    layers: list[AdapterLayer] = []
    for target in find_targets(plan.has_conv, blocks.train_norm):
        module = target.modules[0].module
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            if plan.rank_alpha(target, is_3x3=False)[0]:
                layers.append(NormLayer(target))
            continue
        is_3x3 = isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
        rank, own_alpha = plan.rank_alpha(target, is_3x3=is_3x3)
        if rank:
            layers.append(make_layer(target, rank, own_alpha))
    if not layers:
        raise UserError("--network_args: no layer is left to train (every block has rank or learning-rate weight 0)")
    return LayerNetwork(layers, rates=rate_rules(plus, plan.lr_weights), multiplier=multiplier)


def network_from_weights(
    targets: Sequence[TargetSpec],
    kinds: Sequence[type[FileLayer]],
    weights: Mapping[str, Tensor],
    *,
    settings: Any,
    rates: RateRules,
    multiplier: float,
    file: str,
) -> LayerNetwork:
    """A network with the layers, ranks and values of a file. Raises UserError for what does not belong to the model."""
    known = {target.name: target for target in targets}
    files = by_module(to_kohya(weights))
    foreign = [f"{name}.{suffix}" for name in files if name not in known for suffix in files[name]]
    if foreign:
        raise UserError(f"{file}: {len(foreign)} keys name no layer of this model: {first_names(foreign)}")
    problems: list[str] = []
    made: dict[str, AdapterLayer] = {}
    for name, tensors in files.items():
        kind = next((kind for kind in kinds if kind.claims(set(tensors))), None)
        if kind is None:
            problems.append(f"{name} ({', '.join(tensors)})")
            continue
        made[name] = kind.from_tensors(known[name], tensors, settings)
        problem = made[name].problem(tensors)
        if problem is not None:
            problems.append(f"{name} {problem}")
        else:
            made[name].load_tensors(tensors)
    if problems:
        raise UserError(f"{file}: {len(problems)} adapters are of another kind or damaged: {first_names(problems)}")
    return LayerNetwork([made[name] for name in known if name in made], rates=rates, multiplier=multiplier)


def rate_rules(plus: LoraPlusOptions, block_weights: tuple[float, ...] | None) -> RateRules:
    """LoRA+ ratios: the one of a model stands above the general one."""
    general = plus.loraplus_lr_ratio
    denoiser, encoder = plus.loraplus_unet_lr_ratio, plus.loraplus_text_encoder_lr_ratio
    return RateRules(block_weights, general if denoiser is None else denoiser, general if encoder is None else encoder)


def weights_of(file: str | Path | None, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors that were given, or those of the file."""
    if weights is not None:
        return dict(weights)
    if file is None:
        raise ValueError("neither a file nor its weights are given")
    return read_tensors(file)
