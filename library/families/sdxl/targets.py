# SPDX-License-Identifier: Apache-2.0
"""Targets of adapters in Stable Diffusion XL: the U-Net's layers have the names of checkpoints."""

from __future__ import annotations

from torch import nn

from library.adapters.block_ranks import BlockLayout
from library.adapters.foreign.published_classes import class_names
from library.adapters.target_spec import TargetSpec
from library.adapters.targets import DENOISER_PREFIX, AdaptedModels, module_target, walk
from library.families.sd.names import unet_module_names
from library.families.sd.targets import TRANSFORMER_BLOCK, Blocks, Kinds, UnetTargets
from library.families.sdxl.names import sdxl_block

SDXL_BLOCKS = BlockLayout(down=9, mid=3, up=9, outer=1)
XL_BLOCK = r"((?:input_blocks|output_blocks)\.\d+\.\d+|middle_block\.\d+)"
CLASS_NAMES = class_names(
    "SdxlUNet2DConditionModel",
    (rf"{XL_BLOCK}\.(?:norm|proj_in|transformer_blocks|proj_out)\b", "Transformer2DModel"),
    (rf"{XL_BLOCK}\.(?:in_layers|emb_layers|out_layers|skip_connection)\b", "ResnetBlock2D"),
    (rf"{XL_BLOCK}\.op\b", "Downsample2D"),
    (rf"{XL_BLOCK}\.conv\b", "Upsample2D"),
    *TRANSFORMER_BLOCK,
)


def reads_sizes(models: AdaptedModels) -> bool:
    """Whether the U-Net is told the sizes of pictures; without a U-Net, whether there are two text encoders."""
    if models.denoiser is None:
        return len(models.encoders) > 1
    config = getattr(models.denoiser, "config", {})  # of diffusers; a plain module has none
    return bool(config.get("addition_embed_type") == "text_time")


def sdxl_denoiser(unet: nn.Module, blocks: Blocks, kinds: Kinds) -> list[TargetSpec]:
    """Layers of a U-Net in the order of the published names, within a block in ours."""
    table = {name.ours[0]: (place, name.published) for place, name in enumerate(unet_module_names(unet))}
    found = []
    for path, module in walk(unet, "", blocks, kinds):
        steps = path.split(".")
        own = next(own for i in range(len(steps), 0, -1) if (own := ".".join(steps[:i])) in table)
        place, start = table[own]
        published = start + path[len(own) :]
        target = module_target(DENOISER_PREFIX, published, module, "denoiser", block=sdxl_block(published))
        found.append((place, target))
    return [target for _, target in sorted(found, key=lambda pair: pair[0])]


TARGETS = UnetTargets(SDXL_BLOCKS, CLASS_NAMES, reads_sizes, sdxl_denoiser, numbered_encoders=True)
