# SPDX-License-Identifier: Apache-2.0
"""Weight names of Stable Diffusion 1.x / 2.x / XL: the published (LDM) single-file names and ours (diffusers, transformers).

Published names: https://github.com/CompVis/latent-diffusion (U-Net, VAE), https://github.com/mlfoundations/open_clip
(text encoder of 2.x), transformers (text encoder of 1.x). The tables follow the module tree, so any block layout works.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from library.models.keys import CONV_1X1, ModuleName, Rule, expand

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import nn

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer.text_model."
OPEN_CLIP_PREFIX = "cond_stage_model.model."

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
VAE_RESNET = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
)
VAE_ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
# VAE folders written before diffusers 0.12 (the hub's SD 1.x among them) -> today's names
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OPEN_CLIP_BLOCK = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)


def _inside(published: str, ours: str, table: Iterable[tuple[str, str]]) -> Iterator[ModuleName]:
    return (ModuleName(f"{published}.{a}", f"{ours}.{b}") for a, b in table)


def unet_module_names(unet: UNet2DConditionModel) -> list[ModuleName]:
    """Published and own name of each part of the U-Net. Attention blocks have the same names inside."""
    names = [ModuleName(a, b) for a, b in UNET_ENDS]
    names += _down_names(unet)
    names += _inside("middle_block.0", "mid_block.resnets.0", UNET_RESNET)
    names += [ModuleName("middle_block.1", "mid_block.attentions.0")]
    names += _inside("middle_block.2", "mid_block.resnets.1", UNET_RESNET)
    return names + list(_up_names(unet))


def _children(block: nn.Module, name: str) -> int:
    """Length of a block's module list; blocks without attention or sampling lack it or hold None there."""
    return len([n for n, _ in block.named_modules() if n.startswith(f"{name}.") and n.count(".") == 1])


def _down_names(unet: UNet2DConditionModel) -> Iterator[ModuleName]:
    index = 1  # input_blocks.0 is conv_in
    for i, block in enumerate(unet.down_blocks):
        attentions = _children(block, "attentions")
        for j in range(_children(block, "resnets")):
            yield from _inside(f"input_blocks.{index}.0", f"down_blocks.{i}.resnets.{j}", UNET_RESNET)
            if j < attentions:
                yield ModuleName(f"input_blocks.{index}.1", f"down_blocks.{i}.attentions.{j}")
            index += 1
        if _children(block, "downsamplers"):
            yield ModuleName(f"input_blocks.{index}.0.op", f"down_blocks.{i}.downsamplers.0.conv")
            index += 1


def _up_names(unet: UNet2DConditionModel) -> Iterator[ModuleName]:
    index = 0
    for i, block in enumerate(unet.up_blocks):
        attentions, resnets = _children(block, "attentions"), _children(block, "resnets")
        for j in range(resnets):
            yield from _inside(f"output_blocks.{index}.0", f"up_blocks.{i}.resnets.{j}", UNET_RESNET)
            if j < attentions:
                yield ModuleName(f"output_blocks.{index}.1", f"up_blocks.{i}.attentions.{j}")
            if j == resnets - 1 and _children(block, "upsamplers"):
                place = 2 if j < attentions else 1
                yield ModuleName(f"output_blocks.{index}.{place}.conv", f"up_blocks.{i}.upsamplers.0.conv")
            index += 1


def vae_module_names(vae: AutoencoderKL) -> list[ModuleName]:
    """The KL autoencoder of SD 1/2/XL/3 and FLUX. Its one attention is made of 1x1 convolutions in the file."""
    names = [ModuleName("quant_conv", "quant_conv"), ModuleName("post_quant_conv", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        mid, attention = f"{side}.mid_block", f"{side}.mid_block.attentions.0"
        names += [ModuleName(f"{side}.{n}", f"{side}.{n}") for n in ("conv_in", "conv_out")]
        names += [ModuleName(f"{side}.norm_out", f"{side}.conv_norm_out")]
        names += _inside(f"{side}.mid.block_1", f"{mid}.resnets.0", VAE_RESNET)
        names += _inside(f"{side}.mid.block_2", f"{mid}.resnets.1", VAE_RESNET)
        names += [ModuleName(f"{side}.mid.attn_1.norm", f"{attention}.group_norm")]
        names += [ModuleName(f"{side}.mid.attn_1.{a}", f"{attention}.{b}", CONV_1X1) for a, b in VAE_ATTENTION]
    levels = len(vae.encoder.down_blocks)
    for i, block in enumerate(vae.encoder.down_blocks):
        for j in range(len(block.resnets)):
            names += _inside(f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}", VAE_RESNET)
        names += [ModuleName(f"encoder.down.{i}.downsample.conv", f"encoder.down_blocks.{i}.downsamplers.0.conv")]
    for i, block in enumerate(vae.decoder.up_blocks):
        level = levels - 1 - i  # the file counts the decoder's levels from the full size
        for j in range(len(block.resnets)):
            names += _inside(f"decoder.up.{level}.block.{j}", f"decoder.up_blocks.{i}.resnets.{j}", VAE_RESNET)
        names += [ModuleName(f"decoder.up.{level}.upsample.conv", f"decoder.up_blocks.{i}.upsamplers.0.conv")]
    return names


def unet_rules(unet: UNet2DConditionModel) -> tuple[Rule, ...]:
    return expand(unet_module_names(unet), unet.state_dict())


def vae_rules(vae: AutoencoderKL) -> tuple[Rule, ...]:
    return expand(vae_module_names(vae), vae.state_dict())


def clip_rules(encoder: nn.Module) -> tuple[Rule, ...]:
    """CLIP-L of SD 1.x: the names are those of transformers below `text_model.`, which is part of the prefix."""
    return tuple(Rule(name, (name,)) for name in encoder.state_dict())


def open_clip_rules(encoder: nn.Module) -> tuple[Rule, ...]:
    """OpenCLIP of SD 2.x: q, k and v are one matrix in the file."""
    rules = [
        Rule("token_embedding.weight", ("embeddings.token_embedding.weight",)),
        Rule("positional_embedding", ("embeddings.position_embedding.weight",)),
    ]
    rules += [Rule(f"ln_final.{t}", (f"final_layer_norm.{t}",)) for t in ("weight", "bias")]
    for i in range(_children(encoder.get_submodule("encoder"), "layers")):
        block, ours = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for tensor in ("weight", "bias"):
            fused = tuple(f"{ours}.self_attn.{x}_proj.{tensor}" for x in "qkv")
            rules += [Rule(f"{block}.attn.in_proj_{tensor}", fused)]
            rules += [Rule(f"{block}.{a}.{tensor}", (f"{ours}.{b}.{tensor}",)) for a, b in OPEN_CLIP_BLOCK]
    return tuple(rules)
