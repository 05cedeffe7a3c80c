# SPDX-License-Identifier: Apache-2.0
"""Weight names of the KL autoencoder of SD 1/2/XL/3 and FLUX.1: published (LDM) names, and ours (those of diffusers).

Published names: https://github.com/CompVis/latent-diffusion. The table follows the module tree, so any block layout
works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.key_tables import CONV_1X1, ModuleName, Rule, children_of, expand, inside, named

if TYPE_CHECKING:
    from torch import nn

VAE_PREFIX = "first_stage_model."

VAE_RESNET = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
)
VAE_ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
# VAE folders written before diffusers 0.12 (the hub's SD 1.x among them) -> the names since then
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def vae_module_names(vae: nn.Module) -> list[ModuleName]:
    """The KL autoencoder of SD 1/2/XL/3 and FLUX. Its one attention is made of 1x1 convolutions in the file."""
    count = children_of(vae)
    names = [named("quant_conv", "quant_conv"), named("post_quant_conv", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        mid, attention = f"{side}.mid_block", f"{side}.mid_block.attentions.0"
        names += [named(f"{side}.{n}", f"{side}.{n}") for n in ("conv_in", "conv_out")]
        names += [named(f"{side}.norm_out", f"{side}.conv_norm_out")]
        names += inside(f"{side}.mid.block_1", f"{mid}.resnets.0", VAE_RESNET)
        names += inside(f"{side}.mid.block_2", f"{mid}.resnets.1", VAE_RESNET)
        names += [named(f"{side}.mid.attn_1.norm", f"{attention}.group_norm")]
        names += [named(f"{side}.mid.attn_1.{a}", f"{attention}.{b}", op=CONV_1X1) for a, b in VAE_ATTENTION]
    levels = count("encoder.down_blocks")
    for i in range(levels):
        ours = f"encoder.down_blocks.{i}"
        for j in range(count(f"{ours}.resnets")):
            names += inside(f"encoder.down.{i}.block.{j}", f"{ours}.resnets.{j}", VAE_RESNET)
        names += [named(f"encoder.down.{i}.downsample.conv", f"{ours}.downsamplers.0.conv")]
    for i in range(levels):
        ours, theirs = f"decoder.up_blocks.{i}", f"decoder.up.{levels - 1 - i}"  # the file counts from the full size
        for j in range(count(f"{ours}.resnets")):
            names += inside(f"{theirs}.block.{j}", f"{ours}.resnets.{j}", VAE_RESNET)
        names += [named(f"{theirs}.upsample.conv", f"{ours}.upsamplers.0.conv")]
    return names


def vae_rules(vae: nn.Module) -> tuple[Rule, ...]:
    return expand(vae_module_names(vae), vae.state_dict())
