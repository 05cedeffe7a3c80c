# SPDX-License-Identifier: Apache-2.0
"""The deep compression autoencoder (DC-AE) of SANA: where its weights lie, and pixels <-> scaled latents.

Chen et al. 2024, "Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models",
https://arxiv.org/abs/2410.10733. Latents are 32 times smaller than pictures along each side, and nothing is drawn.
Published names: https://github.com/mit-han-lab/efficientvit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.key_tables import CONV_1X1, ModuleName, Rule, Shapes, expand, inside, named
from library.weights.loading import Part, own_names, part_file, read_json, shipped_config
from library.weights.sizes import SizeError, below, has, reading_sizes, shape_of
from library.weights.weight_files import open_weights

CLASS = "AutoencoderDC"
CHANNELS = 32  # of latents
LEVELS = 6  # of encoder and decoder: each but the first halves the sides
PUBLISHED, DIFFUSERS = (
    "encoder.stages.",
    "encoder.down_blocks.0.0.",
)  # starts of names; other autoencoders lack the last 0
RESIDUAL, ATTENTION = "ResBlock", "EfficientViTBlock"
NEEDED = "the DC-AE of SANA (dc-ae-f32c32-sana-1.0 or 1.1) is needed"


def dc_ae_part(path: Path, *, option: str = "--vae") -> Part:
    """A DC-AE in a file (published or diffusers names) or in a folder (its own, a model's).

    option: for messages. Raises UserError when it is another autoencoder.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        config = read_json(folder / "config.json")
        if config.get("_class_name", CLASS) != CLASS:
            raise UserError(f"{option}: {folder} holds a {config['_class_name']}; {NEEDED}")
        file, published = part_file(folder), False
    else:
        file = open_weights(path)
        published = has(file.shapes, PUBLISHED)
        if not published and not has(file.shapes, DIFFUSERS):
            raise UserError(f"{option}: {path} is not a DC-AE; {NEEDED}")
        with reading_sizes(path, option=option):
            config = {**shipped_config("sana_vae"), **layout(file.shapes)}
    with reading_sizes(file.path, option=option):
        channels, levels = config["latent_channels"], len(config["encoder_block_out_channels"])
    if (channels, levels) != (CHANNELS, LEVELS):
        form = f"{channels} channels, {2 ** (levels - 1)} times smaller than pictures"
        raise UserError(f"{option}: {path} makes latents of {form}; {NEEDED}")
    rules = dc_ae_rules if published else own_names
    return Part("VAE", file, "", partial(build, config), rules, f"DC-AE {config.get('scaling_factor')}")


# Ends of names, published and of diffusers
CONVOLUTIONS = ("main.conv1.conv.weight", ".conv1.weight")
QUERIES = ("context_module.main.qkv.conv.weight", "attn.to_q.weight")
SURROUNDINGS = ("aggreg.0.0.weight", "to_qkv_multiscale.0.proj_in.weight")
HEADS = ("aggreg.0.1.weight", "to_qkv_multiscale.0.proj_out.weight")
SIZE_LAYER = r"(?:op_list\.)?(\d+)\.(?!main\.conv\.|conv\.)"  # matches all names of a level but those of its resizing


def layout(shapes: Shapes) -> dict[str, Any]:
    """The part of the configuration that the shapes of a file tell, in published or diffusers' names."""
    config: dict[str, Any] = {}
    for side, own in (("encoder", "down_blocks"), ("decoder", "up_blocks")):
        start = f"{side}.stages.{{}}." if has(shapes, PUBLISHED) else f"{side}.{own}.{{}}."
        levels = [*takewhile(bool, (below(shapes, start.format(i)) for i in count()))]
        config[f"{side}_block_types"] = [ATTENTION if _ending(level, QUERIES) else RESIDUAL for level in levels]
        config[f"{side}_block_out_channels"] = [_width(level, start.format(i)) for i, level in enumerate(levels)]
        config[f"{side}_layers_per_block"] = [
            len({found[1] for name in level if (found := re.match(SIZE_LAYER, name))}) for level in levels
        ]
        config[f"{side}_qkv_multiscales"] = [
            [*{shape[-1] for shape in _ending(level, SURROUNDINGS)}] for level in levels
        ]
    latents = "encoder.project_out.main.op_list.0.conv.weight" if has(shapes, PUBLISHED) else "encoder.conv_out.weight"
    config["latent_channels"] = shape_of(shapes, latents, 4)[0]
    heads = {shape[1] for shape in _ending(shapes, HEADS)}
    return config | ({"attention_head_dim": heads.pop()} if heads else {})


def _ending(shapes: Shapes, ends: tuple[str, ...]) -> list[tuple[int, ...]]:
    """The shapes of the tensors whose names end so."""
    return [shape for name, shape in shapes.items() if name.endswith(ends)]


def _width(level: Shapes, start: str) -> int:
    found = _ending(level, (*CONVOLUTIONS, *QUERIES))
    if not found:
        raise SizeError("is incomplete: it lacks", f"{start}*")
    return found[0][1]


def build(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderDC

    module: Any = AutoencoderDC.from_config(dict(config))
    return module


# ---- names ----------------------------------------------------------------------------------------------------------

ENDS = (
    named("encoder.project_in.conv", "encoder.conv_in"),
    named("encoder.project_out.main.op_list.0.conv", "encoder.conv_out"),
    named("decoder.project_in.main.conv", "decoder.conv_in"),
    named("decoder.project_out.op_list.0", "decoder.norm_out"),
    named("decoder.project_out.op_list.2.conv", "decoder.conv_out"),
)
RESIDUAL_NAMES = (("main.conv1.conv", "conv1"), ("main.conv2.conv", "conv2"), ("main.conv2.norm", "norm"))
ATTENTION_NAMES = (
    ("context_module.main.aggreg.0.0", "attn.to_qkv_multiscale.0.proj_in"),
    ("context_module.main.aggreg.0.1", "attn.to_qkv_multiscale.0.proj_out"),
    ("context_module.main.proj.norm", "attn.norm_out"),
    ("local_module.main.inverted_conv.conv", "conv_out.conv_inverted"),
    ("local_module.main.depth_conv.conv", "conv_out.conv_depth"),
    ("local_module.main.point_conv.conv", "conv_out.conv_point"),
    ("local_module.main.point_conv.norm", "conv_out.norm"),
)
SIZE_CHANGES = {"DCDownBlock2d": "main.conv", "DCUpBlock2d": "main.conv.conv"}


def dc_ae_names(vae: nn.Module) -> Iterator[ModuleName]:
    """The table of an AutoencoderDC. Attention is made of 1x1 convolutions in the file."""
    yield from ENDS
    for side, blocks in (("encoder", "down_blocks"), ("decoder", "up_blocks")):
        for i, level in enumerate(vae.get_submodule(f"{side}.{blocks}").children()):
            for j, block in enumerate(level.children()):
                theirs, ours = f"{side}.stages.{i}.op_list.{j}", f"{side}.{blocks}.{i}.{j}"
                kind = type(block).__name__
                if kind in SIZE_CHANGES:
                    yield named(f"{theirs}.{SIZE_CHANGES[kind]}", f"{ours}.conv")
                elif kind == RESIDUAL:
                    yield from inside(theirs, ours, RESIDUAL_NAMES)
                else:
                    attention, qkv = f"{theirs}.context_module.main", (f"{ours}.attn.to_{name}" for name in "qkv")
                    yield named(f"{attention}.qkv.conv", *qkv, op=CONV_1X1)
                    yield named(f"{attention}.proj.conv", f"{ours}.attn.to_out", op=CONV_1X1)
                    yield from inside(theirs, ours, ATTENTION_NAMES)


def dc_ae_rules(vae: nn.Module) -> tuple[Rule, ...]:
    return expand(dc_ae_names(vae), vae.state_dict())


# ---- pixels and latents ---------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels B 3 H W in [-1, 1] -> scaled latents B 32 h w float32."""
    parameter = next(vae.parameters())
    with torch.autocast(parameter.device.type, enabled=False):  # the VAE's own dtype decides: see --no_half_vae
        latents = vae.encode(pixels.to(parameter.device, parameter.dtype), return_dict=False)[0]
    return latents.float() * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Scaled latents B 32 h w -> pixels B 3 H W float32 in [-1, 1]."""
    parameter = next(vae.parameters())
    raw = latents.float().to(parameter.device) / vae.config.scaling_factor
    with torch.autocast(parameter.device.type, enabled=False):
        pixels = vae.decode(raw.to(parameter.dtype), return_dict=False)[0]
    return pixels.float().clamp(-1, 1)
