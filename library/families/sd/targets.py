# SPDX-License-Identifier: Apache-2.0
"""Targets of adapters in the U-Nets of Stable Diffusion 1.x and 2.x and in their text encoders.

Those of Stable Diffusion XL (library/families/sdxl/targets.py) differ in the names of the U-Net's layers only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from library.adapters.block_ranks import BlockLayout, block_lr_weights, plan_ranks
from library.adapters.foreign.published_classes import ClassNames, class_names
from library.adapters.layers.oft import PREFIX as OFT_PREFIX
from library.adapters.layers.oft import OftOptions, renamed_for_oft
from library.adapters.options import SIZES_BY_BLOCK, BlockOptions
from library.adapters.target_spec import TargetSpec
from library.adapters.targets import (
    CLIP_BLOCKS,
    DENOISER_PREFIX,
    ENCODER_PREFIX,
    LAYERS,
    UNKNOWN,
    AdaptedModels,
    AnyFamily,
    FamilyTargets,
    Selection,
    Targets,
    encoder_targets,
    module_target,
    walk,
)
from library.errors import UserError
from library.options import option
from library.weights.grown_input import GrownConv2d

CLASSES = ("UNet2DConditionModel",)
SD_BLOCKS = BlockLayout(down=12, mid=1, up=12)
SD_ATTENTION = frozenset({"Transformer2DModel"})
SD_CONVOLUTION = frozenset({"ResnetBlock2D", "Downsample2D", "Upsample2D"})
NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.GroupNorm)
OFT_ATTENTION = re.compile(r"_attn[12]_")
_SD_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.")

Blocks = frozenset[str] | None  # classes of the blocks that have targets; None: layers anywhere
Kinds = tuple[type[nn.Module], ...]  # classes of the layers that are targets

TRANSFORMER_BLOCK = (
    (r"(.+\.transformer_blocks\.\d+)\.", "BasicTransformerBlock"),
    (r"(.+\.attn[12])\.", "CrossAttention"),
    (r"(.+\.ff)\.", "FeedForward"),
    (r"(.+\.ff\.net\.0)\.", "GEGLU"),
)
BLOCK = r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)"
CLASS_NAMES = class_names(
    "UNet2DConditionModel",
    (rf"({BLOCK}\.attentions\.\d+)\.", "Transformer2DModel"),
    (rf"({BLOCK}\.resnets\.\d+)\.", "ResnetBlock2D"),
    (rf"({BLOCK}\.downsamplers\.\d+)\.", "Downsample2D"),
    (rf"({BLOCK}\.upsamplers\.\d+)\.", "Upsample2D"),
    *TRANSFORMER_BLOCK,
)


@dataclass(frozen=True)
class UnetTargets(FamilyTargets):
    """Linear layers and 1x1 convolutions of attention; with conv_dim everything in the residual blocks too."""

    layout: BlockLayout  # how the blocks are counted for which ranks and learning rates are given
    class_names: ClassNames
    fits_models: Callable[[AdaptedModels], bool]
    denoiser_targets: Callable[[nn.Module, Blocks, Kinds], Sequence[TargetSpec]]  # in the order of files
    numbered_encoders: bool  # names of text encoders' layers have a number, also where there is one encoder

    classes = CLASSES
    decided_by_file = SIZES_BY_BLOCK

    @property
    def options(self) -> Mapping[str, type]:
        return {"blocks": BlockOptions}

    def require_models(self, models: AdaptedModels, network_module: str) -> None:
        """Any class will do: a model without targets is refused when they are looked for."""

    def fits(self, models: AdaptedModels) -> bool:
        return self.fits_models(models)

    def select(self, options: Mapping[str, Any], dim: int, alpha: float, models: AdaptedModels) -> Selection:
        return self.select_by_blocks(options["blocks"], dim, alpha, models, t5=False)

    def select_by_blocks(
        self, blocks: BlockOptions, dim: int, alpha: float, models: AdaptedModels, *, t5: bool
    ) -> Selection:
        plan = plan_ranks(blocks, self.layout, dim=dim, alpha=alpha)
        targets = self.default(models, conv=plan.has_conv, norm=blocks.train_norm)
        return Selection(
            targets,
            lambda target: plan.rank_alpha(target, is_3x3=is_large_conv(target.modules[0].module)),
            plan.lr_weights,
        )

    def in_file(self, options: Mapping[str, Any], models: AdaptedModels) -> list[TargetSpec]:
        return self.every(models, outside=True)

    def block_weights(self, options: Mapping[str, Any], models: AdaptedModels) -> tuple[float, ...] | None:
        return block_lr_weights(options["blocks"], self.layout)

    def new_inputs(self, models: AdaptedModels) -> list[TargetSpec]:
        """The first convolution, where it has new channels for a reference picture. It is in no block."""
        children = {} if models.denoiser is None else dict(models.denoiser.named_children())
        if models.denoiser is None or not isinstance(children.get("conv_in"), GrownConv2d):
            return []
        found = self.denoiser_targets(models.denoiser, None, LAYERS)
        return [replace(t, block=None) for t in found if isinstance(t.modules[0].module, GrownConv2d)]

    def default(self, models: AdaptedModels, *, conv: bool = False, norm: bool = False) -> list[TargetSpec]:
        """The targets of a new network: in attention, with `conv` also in the residual blocks; text encoders first.

        norm: the norms within those blocks as well.
        """
        kinds = LAYERS + (NORMS if norm else ())
        return self._targets(models, CLIP_BLOCKS, SD_ATTENTION | SD_CONVOLUTION if conv else SD_ATTENTION, kinds)

    def every(self, models: AdaptedModels, *, outside: bool) -> list[TargetSpec]:
        return self._targets(models, None, None, LAYERS + NORMS)

    def _targets(
        self, models: AdaptedModels, encoder_blocks: Blocks, denoiser_blocks: Blocks, kinds: Kinds
    ) -> list[TargetSpec]:
        """Layers of `kinds` inside blocks of these classes. Raises UserError for models without any."""
        denoiser: Sequence[TargetSpec] = []
        if models.denoiser is not None:
            denoiser = self.denoiser_targets(models.denoiser, denoiser_blocks, kinds)
            if not denoiser:
                raise UserError(UNKNOWN.format(what="denoiser", kind=models.denoiser_class))
        return [*self._encoders(models.encoders, encoder_blocks, kinds), *denoiser]

    def _encoders(self, encoders: Sequence[nn.Module | None], blocks: Blocks, kinds: Kinds) -> Iterator[TargetSpec]:
        for index, encoder in enumerate(encoders):
            numbered = self.numbered_encoders or len(encoders) > 1
            prefix = f"{ENCODER_PREFIX}{index + 1}" if numbered else ENCODER_PREFIX
            if encoder is not None:
                yield from encoder_targets(encoder, prefix, blocks, index, clip=True, kinds=kinds)


def is_large_conv(module: nn.Module) -> bool:
    """Whether it is a convolution that conv_dim is for."""
    return isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)


def sd_block(path: str) -> int | None:
    """Index among the 25 blocks of a Stable Diffusion U-Net, from a module path; None outside of them."""
    if path.startswith("mid_block."):
        return SD_BLOCKS.down
    found = _SD_BLOCK.match(path)
    if found is None:
        return None
    side, level, kind, index = found[1], int(found[2]), found[3], int(found[4])
    within = 2 if kind in ("downsamplers", "upsamplers") else index
    return (1 if side == "down" else SD_BLOCKS.down + SD_BLOCKS.mid) + 3 * level + within


def sd_denoiser(unet: nn.Module, blocks: Blocks, kinds: Kinds) -> list[TargetSpec]:
    """Layers of a U-Net under the names that diffusers has for them."""
    return [
        module_target(DENOISER_PREFIX, path, module, "denoiser", block=sd_block(path))
        for path, module in walk(unet, "", blocks, kinds)
    ]


TARGETS = UnetTargets(
    SD_BLOCKS,
    CLASS_NAMES,
    lambda models: models.denoiser_class in CLASSES,
    sd_denoiser,
    numbered_encoders=False,
)


# ---- OFT ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OftConvOptions:
    """Which convolutions OFT rotates."""

    enable_conv: bool = option(False, help="Residual blocks too, with their 3x3 convolutions.")


@dataclass(frozen=True)
class UnetOftTargets(Targets):
    """Rotated layers of U-Nets: Linear layers of attention, and what the options add; text encoders have none."""

    unets: AnyFamily

    classes = CLASSES
    prefix = OFT_PREFIX
    decided_by_file = ()

    @property
    def options(self) -> Mapping[str, type]:
        return {"layers": OftOptions, "conv": OftConvOptions}

    def select(self, options: Mapping[str, Any], dim: int, alpha: float, models: AdaptedModels) -> Selection:
        alone, family = self._of(models)
        inside = {target.name for target in family.default(alone)}  # of the transformer blocks
        everything = options["layers"].enable_all_linear
        chosen = [
            target
            for target in family.default(alone, conv=options["conv"].enable_conv)
            if everything or target.name not in inside or OFT_ATTENTION.search(target.name)
        ]
        return Selection(renamed_for_oft(chosen), lambda target: (dim, alpha))

    def in_file(self, options: Mapping[str, Any], models: AdaptedModels) -> list[TargetSpec]:
        alone, family = self._of(models)
        found = family.every(alone, outside=True)
        return renamed_for_oft(target for target in found if isinstance(target.modules[0].module, LAYERS))

    def new_inputs(self, models: AdaptedModels) -> list[TargetSpec]:
        return self.unets.new_inputs(models)

    def _of(self, models: AdaptedModels) -> tuple[AdaptedModels, UnetTargets]:
        """The denoiser without the text encoders, and the targets that it has for other kinds of adapters."""
        alone = AdaptedModels(None, models.denoiser)
        family = self.unets.of(alone)
        assert isinstance(family, UnetTargets)
        return alone, family
