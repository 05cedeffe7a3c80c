# SPDX-License-Identifier: Apache-2.0
"""The deep compression autoencoder (DC-AE) of SANA: where its weights are, and pixels <-> scaled latents.

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
LEVELS = 6  # of encoder and decoder; each except the first halves the sides
PUBLISHED, DIFFUSERS = (
    "encoder.stages.",
    "encoder.down_blocks.0.0.",
)  # beginnings of names; those of other autoencoders lack the last 0
RESIDUAL, ATTENTION = "ResBlock", "EfficientViTBlock"
NEEDED = "the DC-AE of SANA (dc-ae-f32c32-sana-1.0 or 1.1) is needed"


def dc_ae_part(path: Path, *, option: str = "--vae") -> Part:
    """The DC-AE in a file (published or diffusers names) or in a folder (its own or a model's).

    option: for messages. Raises UserError if it is another autoencoder.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        config = read_json(folder / "config.json")
        if config.get("_class_name", CLASS) != CLASS:
            raise UserError(f"{option}: {folder} is of the class {config['_class_name']}; {NEEDED}")
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


# Names inside a block, published and of diffusers
NORMS = {RESIDUAL: ("main.conv2.norm.weight", "norm.weight"),
         ATTENTION: ("context_module.main.proj.norm.weight", "attn.norm_out.weight")}  # fmt: skip
AROUND = ("context_module.main.aggreg.0.0.weight", "attn.to_qkv_multiscale.0.proj_in.weight")
HEADS = ("context_module.main.aggreg.0.1.weight", "attn.to_qkv_multiscale.0.proj_out.weight")
RESIZING = ("main.conv.", "conv.")
BLOCK = re.compile(r"((?:op_list\.)?\d+\.)(.*)")


def layout(shapes: Shapes) -> dict[str, Any]:
    """The part of the configuration that the shapes of a file in published or diffusers names tell."""
    names = 0 if has(shapes, PUBLISHED) else 1
    latents = ("encoder.project_out.main.op_list.0.conv.weight", "encoder.conv_out.weight")[names]
    config: dict[str, Any] = {"latent_channels": shape_of(shapes, latents, 4)[0]}
    for side, own in (("encoder", "down_blocks"), ("decoder", "up_blocks")):
        starts = (f"{side}.{('stages', own)[names]}.{i}." for i in count())
        levels = [_level(shapes, start, names) for start in takewhile(lambda start: has(shapes, start), starts)]
        for key in levels[0] if levels else ():
            config[f"{side}_{key}"] = [level[key] for level in levels]
    heads = {shape[1] for name, shape in shapes.items() if name.endswith(HEADS[names]) and len(shape) == 4}
    return config | ({"attention_head_dim": heads.pop()} if heads else {})


def _level(shapes: Shapes, start: str, names: int) -> dict[str, Any]:
    """The configuration of the level whose names begin with `start`. names: 0 for published ones, 1 for diffusers'."""
    found = [match.groups() for name in below(shapes, start) if (match := BLOCK.match(name))]
    blocks = [*dict.fromkeys(block for block, rest in found if not rest.startswith(RESIZING))]
    if not blocks:
        raise SizeError("is incomplete: it lacks", f"{start}*")
    kind = ATTENTION if any(rest.startswith(("context_module.", "attn.")) for _, rest in found) else RESIDUAL
    (width,) = shape_of(shapes, f"{start}{blocks[0]}{NORMS[kind][names]}", 1)
    gathers = any(rest.startswith(("context_module.main.aggreg.", "attn.to_qkv_multiscale.")) for _, rest in found)
    scales = [shape_of(shapes, f"{start}{blocks[0]}{AROUND[names]}", 4)[-1]] if gathers else []
    return {
        "block_types": kind, "block_out_channels": width, "layers_per_block": len(blocks), "qkv_multiscales": scales,
    }  # fmt: skip


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
    """The table of an AutoencoderDC. Its attention consists of 1x1 convolutions in the file."""
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
