# SPDX-License-Identifier: Apache-2.0
"""Weight names of the U-Net of Stable Diffusion 1.x / 2.x / XL: published (LDM) names, and ours (those of diffusers).

Published names: https://github.com/CompVis/latent-diffusion. The table follows the module tree, so any block layout
works.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from library.key_tables import ChildCount, ModuleName, Rule, children_of, expand, inside, named

if TYPE_CHECKING:
    from torch import nn

UNET_PREFIX = "model.diffusion_model."
CLIP_PREFIX = "cond_stage_model.transformer.text_model."  # text encoder of 1.x
OPEN_CLIP_PREFIX = "cond_stage_model.model."  # text encoder of 2.x

UNET_ENDS = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)
UNET_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)


def unet_module_names(unet: nn.Module) -> list[ModuleName]:
    """Published and own name of each part of the U-Net. Attention blocks have the same names inside."""
    count = children_of(unet)
    names = [named(a, b) for a, b in UNET_ENDS]
    names += _down_names(count)
    names += inside("middle_block.0", "mid_block.resnets.0", UNET_RESNET)
    names += [named("middle_block.1", "mid_block.attentions.0")]
    names += inside("middle_block.2", "mid_block.resnets.1", UNET_RESNET)
    return names + list(_up_names(count))


def _down_names(count: ChildCount) -> Iterator[ModuleName]:
    index = 1  # input_blocks.0 is conv_in
    for i in range(count("down_blocks")):
        block = f"down_blocks.{i}"
        for j in range(count(f"{block}.resnets")):
            yield from inside(f"input_blocks.{index}.0", f"{block}.resnets.{j}", UNET_RESNET)
            if count(f"{block}.attentions"):
                yield named(f"input_blocks.{index}.1", f"{block}.attentions.{j}")
            index += 1
        if count(f"{block}.downsamplers"):
            yield named(f"input_blocks.{index}.0.op", f"{block}.downsamplers.0.conv")
            index += 1


def _up_names(count: ChildCount) -> Iterator[ModuleName]:
    index = 0
    for i in range(count("up_blocks")):
        block = f"up_blocks.{i}"
        resnets = count(f"{block}.resnets")
        for j in range(resnets):
            yield from inside(f"output_blocks.{index}.0", f"{block}.resnets.{j}", UNET_RESNET)
            if count(f"{block}.attentions"):
                yield named(f"output_blocks.{index}.1", f"{block}.attentions.{j}")
            if j == resnets - 1 and count(f"{block}.upsamplers"):
                place = 2 if count(f"{block}.attentions") else 1
                yield named(f"output_blocks.{index}.{place}.conv", f"{block}.upsamplers.0.conv")
            index += 1


def unet_rules(unet: nn.Module) -> tuple[Rule, ...]:
    return expand(unet_module_names(unet), unet.state_dict())
