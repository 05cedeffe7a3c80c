# SPDX-License-Identifier: Apache-2.0
"""A network module of an adapter kind (LoHa, LoKr, LoRA-FA, DyLoRA) for every architecture that there is.

Targets come from the U-Nets of Stable Diffusion 1.x, 2.x and XL, or from the name table of FLUX.1, SD3 or Lumina; there
a fused published layer is one adapter, as for LoRA. A kind brings its options and a function that makes a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.adapter_network import AdapterNetwork
from library.adapters.block_ranks import block_lr_weights, plan_ranks
from library.adapters.build import (
    FileReader,
    Ranks,
    build_network,
    default_sizes,
    network_from_weights,
    rate_rules,
    weights_of,
)
from library.adapters.file_readers import READERS
from library.adapters.formats.conversion import by_module
from library.adapters.lora_family import LoraFamily
from library.adapters.options import BlockOptions, LoraPlusOptions, PatternOptions, T5Options, read_network_args
from library.adapters.target_spec import TargetSpec
from library.adapters.targets import TextEncoders, block_layout, every_target, sd_targets
from library.errors import UserError
from library.log import get_logger
from networks import lora_flux, lora_lumina, lora_sd3

FAMILIES: tuple[LoraFamily, ...] = (lora_flux.FAMILY, lora_sd3.FAMILY, lora_lumina.FAMILY)


FILE_DECIDES = ("conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")


def is_readable(weights: Mapping[str, Tensor]) -> bool:
    """Whether every layer of a file is of one of these kinds."""
    layers = by_module(weights).values()
    return bool(layers) and all(any(reader.claims(set(own)) for reader in READERS) for own in layers)


def own_blocks(options: Mapping[str, Any], dim: int, alpha: float) -> BlockOptions:
    """The group of --network_args itself, where a kind has all of its options."""
    blocks = options["blocks"]
    assert isinstance(blocks, BlockOptions)
    return blocks


@dataclass(frozen=True)
class AdapterKind:
    """What the two functions of a network module need to know of a kind of adapters.

    settings: (options, --network_dropout) -> what `make` and the file layers get. forms: given options about which a
    file decides.
    """

    options: Mapping[str, type]  # groups of --network_args, besides those that every kind has
    layers: Sequence[FileReader]  # what a file may hold
    settings: Callable[[Mapping[str, Any], float | None], Any]
    make: Callable[[TargetSpec, int, float, Any], AdapterLayer]  # (target, rank, alpha, settings)
    blocks: Callable[[Mapping[str, Any], int, float], BlockOptions] = own_blocks
    forms: Callable[[Mapping[str, Any]], list[str]] = field(default=lambda options: [])

    @property
    def arguments(self) -> dict[str, type]:
        """The groups of --network_args."""
        return {**self.options, "patterns": PatternOptions, "t5": T5Options}

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

        Raises UserError listing every mistake in them.
        """
        options = read_network_args(self.arguments, kwargs)
        dim, alpha = default_sizes(network_dim, network_alpha)
        blocks = self.blocks(options, dim, alpha)
        settings = self.settings(options, neuron_dropout)
        family = family_of(unet)
        if family is None:
            targets, ranks, weights = _unet_layers(blocks, dim, alpha, text_encoder, unet)
        else:
            targets, ranks = _table_layers(family, blocks, options["t5"], dim, alpha, text_encoder, unet)
            weights = None
        return build_network(
            targets,
            ranks,
            lambda target, rank, own_alpha: self.make(target, rank, own_alpha, settings),
            patterns=options["patterns"],
            alpha=alpha,
            rates=rate_rules(options.get("plus", LoraPlusOptions()), options["patterns"], weights),
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
        """A network with the layers, ranks, alphas and values of a file (or of `weights_sd`), and its tensors.

        for_inference: nothing learns, and the file may be of any of these kinds. Options that the file decides (ranks)
        must not be given. Raises UserError.
        """
        options = read_network_args(self.arguments, kwargs)
        _refuse_ranks(options, file)
        forms = self.forms(options)
        if forms:
            names = ", ".join(forms)
            get_logger().warning("--network_args: %s: no effect, %s decides the form of its layers", names, file)
        family = family_of(unet)
        blocks = options.get("blocks", BlockOptions())
        lr_weights = None
        if family is None:
            targets = every_target(text_encoder, unet)
            lr_weights = block_lr_weights(blocks, block_layout(text_encoder, unet))
        else:
            targets = family.targets(text_encoder, unet, split=False, t5=True, outside=True)
        readers: Sequence[FileReader] = READERS if for_inference else self.layers
        network = network_from_weights(
            targets,
            readers,
            weights := weights_of(file, weights_sd),
            settings=self.settings(options, neuron_dropout),
            rates=rate_rules(options.get("plus", LoraPlusOptions()), options["patterns"], lr_weights),
            multiplier=multiplier,
            file=str(file or "adapter weights"),
        )
        if for_inference:
            network.requires_grad_(False).eval()
        return network, weights


def family_of(unet: nn.Module | None) -> LoraFamily | None:
    """The architecture with a name table that the denoiser is of; None for U-Nets."""
    return next((family for family in FAMILIES if type(unet).__name__ in family.models), None)


def is_large_conv(module: nn.Module) -> bool:
    """Whether it is a convolution that conv_dim is for."""
    return isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)


def _unet_layers(
    blocks: BlockOptions, dim: int, alpha: float, text_encoder: TextEncoders, unet: nn.Module | None
) -> tuple[list[TargetSpec], Ranks, tuple[float, ...] | None]:
    """Targets, their ranks, and learning-rate factors by block."""
    plan = plan_ranks(blocks, block_layout(text_encoder, unet), dim=dim, alpha=alpha)
    targets = sd_targets(text_encoder, unet, conv=plan.has_conv, norm=blocks.train_norm)
    ranks: Ranks = lambda target: plan.rank_alpha(target, is_3x3=is_large_conv(target.modules[0].module))
    return targets, ranks, plan.lr_weights


def _table_layers(
    family: LoraFamily,
    blocks: BlockOptions,
    t5: T5Options,
    dim: int,
    alpha: float,
    text_encoder: TextEncoders,
    unet: nn.Module | None,
) -> tuple[list[TargetSpec], Ranks]:
    """The layers that LoRA adapts by default, all of one rank; network_reg_dims sets others."""
    plan_ranks(blocks, None, dim=dim, alpha=alpha)  # refuses ranks and rates by block
    idle = [name for name in ("conv_dim", "conv_alpha", "train_norm") if getattr(blocks, name)]
    if idle:
        names = ", ".join(idle)
        get_logger().warning("--network_args: %s: no effect, this model has no such layers", names)
    targets = family.targets(text_encoder, unet, split=False, t5=t5.train_t5xxl)
    rules = family.type_dims(family.options(), dim, targets)
    return [target for target in targets if rules.wants(target)], lambda target: (rules.rank(target), alpha)


def _refuse_ranks(options: Mapping[str, Any], file: str | Path | None) -> None:
    """UserError when ranks are given beside a file that has its own."""
    groups = [options[name] for name in options if name in ("blocks", "ranks", "patterns")]
    names = (*FILE_DECIDES, "network_reg_dims")
    given = [name for group in groups for name in names if vars(group).get(name) is not None]
    if given:
        raise UserError(f"--network_args: {', '.join(given)}: ranks and alphas come from {file}; leave them out")
