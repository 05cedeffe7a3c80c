# SPDX-License-Identifier: Apache-2.0
"""Weight names of Stable Diffusion 1.x / 2.x / XL: published (LDM) single-file names, and ours (those of diffusers).

Published names: https://github.com/CompVis/latent-diffusion (U-Net, VAE), https://github.com/mlfoundations/open_clip
(text encoder of 2.x, second one of XL), transformers (text encoder of 1.x, first one of XL). The tables follow the
module tree, so any block layout works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from library.key_tables import CONV_1X1, COPY, TRANSPOSE, ModuleName, Rule, expand, named

if TYPE_CHECKING:
    from torch import nn

Count = Callable[[str], int]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer.text_model."
OPEN_CLIP_PREFIX = "cond_stage_model.model."
SDXL_CLIP_L_PREFIX = "conditioner.embedders.0.transformer.text_model."
SDXL_CLIP_G_PREFIX = "conditioner.embedders.1.model."
OPEN_CLIP_PROJECTION = "text_projection"  # a bare parameter: states @ text_projection
PLAYGROUND_PROJECTION = "text_projection.weight"  # as Playground v2 writes it: a Linear's weight

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
    return (named(f"{published}.{a}", f"{ours}.{b}") for a, b in table)


def _children_of(root: nn.Module) -> Count:
    """Name of a module list -> its length, 0 where a block has none (no attention, no sampling)."""
    tree = dict(root.named_modules())
    return lambda name: len(list(tree[name].children())) if name in tree else 0


def unet_module_names(unet: nn.Module) -> list[ModuleName]:
    """Published and own name of each part of the U-Net. Attention blocks have the same names inside."""
    count = _children_of(unet)
    names = [named(a, b) for a, b in UNET_ENDS]
    names += _down_names(count)
    names += _inside("middle_block.0", "mid_block.resnets.0", UNET_RESNET)
    names += [named("middle_block.1", "mid_block.attentions.0")]
    names += _inside("middle_block.2", "mid_block.resnets.1", UNET_RESNET)
    return names + list(_up_names(count))


def _down_names(count: Count) -> Iterator[ModuleName]:
    index = 1  # input_blocks.0 is conv_in
    for i in range(count("down_blocks")):
        block = f"down_blocks.{i}"
        for j in range(count(f"{block}.resnets")):
            yield from _inside(f"input_blocks.{index}.0", f"{block}.resnets.{j}", UNET_RESNET)
            if count(f"{block}.attentions"):
                yield named(f"input_blocks.{index}.1", f"{block}.attentions.{j}")
            index += 1
        if count(f"{block}.downsamplers"):
            yield named(f"input_blocks.{index}.0.op", f"{block}.downsamplers.0.conv")
            index += 1


def _up_names(count: Count) -> Iterator[ModuleName]:
    index = 0
    for i in range(count("up_blocks")):
        block = f"up_blocks.{i}"
        resnets = count(f"{block}.resnets")
        for j in range(resnets):
            yield from _inside(f"output_blocks.{index}.0", f"{block}.resnets.{j}", UNET_RESNET)
            if count(f"{block}.attentions"):
                yield named(f"output_blocks.{index}.1", f"{block}.attentions.{j}")
            if j == resnets - 1 and count(f"{block}.upsamplers"):
                place = 2 if count(f"{block}.attentions") else 1
                yield named(f"output_blocks.{index}.{place}.conv", f"{block}.upsamplers.0.conv")
            index += 1


def vae_module_names(vae: nn.Module) -> list[ModuleName]:
    """The KL autoencoder of SD 1/2/XL/3 and FLUX. Its one attention is made of 1x1 convolutions in the file."""
    count = _children_of(vae)
    names = [named("quant_conv", "quant_conv"), named("post_quant_conv", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        mid, attention = f"{side}.mid_block", f"{side}.mid_block.attentions.0"
        names += [named(f"{side}.{n}", f"{side}.{n}") for n in ("conv_in", "conv_out")]
        names += [named(f"{side}.norm_out", f"{side}.conv_norm_out")]
        names += _inside(f"{side}.mid.block_1", f"{mid}.resnets.0", VAE_RESNET)
        names += _inside(f"{side}.mid.block_2", f"{mid}.resnets.1", VAE_RESNET)
        names += [named(f"{side}.mid.attn_1.norm", f"{attention}.group_norm")]
        names += [named(f"{side}.mid.attn_1.{a}", f"{attention}.{b}", op=CONV_1X1) for a, b in VAE_ATTENTION]
    levels = count("encoder.down_blocks")
    for i in range(levels):
        ours = f"encoder.down_blocks.{i}"
        for j in range(count(f"{ours}.resnets")):
            names += _inside(f"encoder.down.{i}.block.{j}", f"{ours}.resnets.{j}", VAE_RESNET)
        names += [named(f"encoder.down.{i}.downsample.conv", f"{ours}.downsamplers.0.conv")]
    for i in range(levels):
        ours, theirs = f"decoder.up_blocks.{i}", f"decoder.up.{levels - 1 - i}"  # the file counts from the full size
        for j in range(count(f"{ours}.resnets")):
            names += _inside(f"{theirs}.block.{j}", f"{ours}.resnets.{j}", VAE_RESNET)
        names += [named(f"{theirs}.upsample.conv", f"{ours}.upsamplers.0.conv")]
    return names


def unet_rules(unet: nn.Module) -> tuple[Rule, ...]:
    return expand(unet_module_names(unet), unet.state_dict())


def vae_rules(vae: nn.Module) -> tuple[Rule, ...]:
    return expand(vae_module_names(vae), vae.state_dict())


def clip_level(encoder: nn.Module) -> str:
    """transformers before 5 has everything of a CLIPTextModel below `text_model.`."""
    return "text_model." if "text_model" in dict(encoder.named_children()) else ""


def clip_rules(encoder: nn.Module) -> tuple[Rule, ...]:
    """CLIP-L of SD 1.x: transformers' names below `text_model.`, which is part of the file's prefix."""
    return tuple(Rule(name.removeprefix(clip_level(encoder)), (name,)) for name in encoder.state_dict())


def open_clip_rules(encoder: nn.Module) -> tuple[Rule, ...]:
    """OpenCLIP of SD 2.x: q, k and v are one matrix in the file."""
    level = clip_level(encoder)
    rules = [
        Rule("token_embedding.weight", (f"{level}embeddings.token_embedding.weight",)),
        Rule("positional_embedding", (f"{level}embeddings.position_embedding.weight",)),
    ]
    rules += [Rule(f"ln_final.{t}", (f"{level}final_layer_norm.{t}",)) for t in ("weight", "bias")]
    for i in range(_children_of(encoder)(f"{level}encoder.layers")):
        block, ours = f"transformer.resblocks.{i}", f"{level}encoder.layers.{i}"
        for tensor in ("weight", "bias"):
            fused = tuple(f"{ours}.self_attn.{x}_proj.{tensor}" for x in "qkv")
            rules += [Rule(f"{block}.attn.in_proj_{tensor}", fused)]
            rules += [Rule(f"{block}.{a}.{tensor}", (f"{ours}.{b}.{tensor}",)) for a, b in OPEN_CLIP_BLOCK]
    return tuple(rules)


def clip_g_rules(encoder: nn.Module, projection: str = OPEN_CLIP_PROJECTION) -> tuple[Rule, ...]:
    """OpenCLIP of SDXL's second text encoder, with the projection of its pooled state under the given name."""
    op = TRANSPOSE if projection == OPEN_CLIP_PROJECTION else COPY
    return (*open_clip_rules(encoder), Rule(projection, ("text_projection.weight",), op))


# ---- the blocks of SDXL ---------------------------------------------------------------------------------------------

SDXL_BLOCKS = 23  # time and label embeddings, 9 input blocks, 3 middle ones, 9 output blocks, the last layers
_SDXL_STARTS = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}


def sdxl_block(published: str) -> int:
    """Index among the 23 blocks of SDXL's U-Net that rates and ranks are given for, from a published path."""
    kind, _, rest = published.partition(".")
    if kind in _SDXL_STARTS:
        return _SDXL_STARTS[kind] + int(rest.partition(".")[0])
    return SDXL_BLOCKS - 1 if kind == "out" else 0
