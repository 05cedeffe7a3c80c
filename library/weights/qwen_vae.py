# SPDX-License-Identifier: Apache-2.0
"""The autoencoder of Qwen-Image, also used by Anima: where its weights are, and pixels <-> normalised latents.

It is the video autoencoder of Wan 2.1 with other weights. Its convolutions are three-dimensional, and a picture is a
video of one frame. Published names are those of Wan 2.1 (https://github.com/Wan-Video/Wan2.1) in ComfyUI's files, and
those of diffusers in the repository of Qwen-Image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.device import on_device
from library.errors import UserError
from library.key_tables import ModuleName, Rule, Shapes, children_of, expand, inside, named
from library.weights.loading import Part, own_names, part_file, read_json
from library.weights.sizes import below, depth, has, reading_sizes, shape_of
from library.weights.vae_names import VAE_PREFIX
from library.weights.weight_files import WeightFile, open_weights

CLASS = "AutoencoderKLQwenImage"
PREFIXES = ("", "vae.", VAE_PREFIX)
CHANNELS = 16  # of latents
NEEDED = "the VAE of Qwen-Image is needed (qwen_image_vae.safetensors)"

RESIDUAL = (
    ("residual.0", "norm1"),
    ("residual.2", "conv1"),
    ("residual.3", "norm2"),
    ("residual.6", "conv2"),
    ("shortcut", "conv_shortcut"),
)
RESAMPLING = (("resample", "resample"), ("time_conv", "time_conv"))
ATTENTION = (("norm", "norm"), ("to_qkv", "to_qkv"), ("proj", "proj"))
# names in files: (a block of the encoder, its first convolution, the layer before the blocks)
WAN = ("encoder.downsamples.{}.", "residual.2.weight", "encoder.conv1.weight")
DIFFUSERS = ("encoder.down_blocks.{}.", "conv1.weight", "encoder.conv_in.weight")


def wan_names(vae: nn.Module) -> list[ModuleName]:
    """The table for files with the names of Wan 2.1, in which all levels of a side form one list of layers."""
    count = children_of(vae)
    names = [named("conv1", "quant_conv"), named("conv2", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        mid = f"{side}.mid_block"
        names += [named(f"{side}.conv1", f"{side}.conv_in")]
        names += inside(f"{side}.middle.0", f"{mid}.resnets.0", RESIDUAL)
        names += inside(f"{side}.middle.1", f"{mid}.attentions.0", ATTENTION)
        names += inside(f"{side}.middle.2", f"{mid}.resnets.1", RESIDUAL)
        names += [named(f"{side}.head.0", f"{side}.norm_out"), named(f"{side}.head.2", f"{side}.conv_out")]
    ours = [f"encoder.down_blocks.{i}" for i in range(count("encoder.down_blocks"))]
    theirs = [f"encoder.downsamples.{i}" for i in range(len(ours))]
    for level in range(count("decoder.up_blocks")):
        for part in ("resnets", "upsamplers"):
            block = f"decoder.up_blocks.{level}.{part}"
            ours += [f"{block}.{i}" for i in range(count(block))]
    theirs += [f"decoder.upsamples.{i}" for i in range(len(ours) - len(theirs))]
    for own, published in zip(ours, theirs, strict=True):
        names += inside(published, own, (*RESIDUAL, *RESAMPLING))
    return names


def wan_rules(vae: nn.Module) -> tuple[Rule, ...]:
    return expand(wan_names(vae), vae.state_dict())


# ---- where it is ----------------------------------------------------------------------------------------------------


def qwen_vae_part(path: Path, *, option: str = "--vae") -> Part:
    """The VAE in a file (names of Wan 2.1 or diffusers) or in a folder (its own or a model's).

    option: for messages. Raises UserError if it is another VAE.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        config = read_json(folder / "config.json")
        if config.get("_class_name", CLASS) != CLASS:
            raise UserError(f"{option}: {folder} holds a {config['_class_name']}, not an {CLASS}: {NEEDED}")
        return _part(part_file(folder), "", config, own_names, option)
    file = open_weights(path)
    for names, rules in ((WAN, wan_rules), (DIFFUSERS, own_names)):
        for prefix in PREFIXES:
            if has(file.shapes, prefix + names[0].partition("{}")[0]):
                shapes = below(file.shapes, prefix)
                if len(shapes.get(names[2], ())) == 4:
                    raise UserError(f"{option}: {path} is a VAE of single pictures: {NEEDED}")
                with reading_sizes(path, prefix, option):
                    return _part(file, prefix, layout(shapes, names), rules, option)
    what = "a VAE of another kind" if has(file.shapes, "encoder.", "decoder.", "first_stage_model.") else "no VAE"
    raise UserError(f"{option}: {path} is {what}: {NEEDED}")


def _part(
    file: WeightFile,
    prefix: str,
    config: Mapping[str, Any],
    rules: Callable[[nn.Module], tuple[Rule, ...]],
    option: str = "--vae",
) -> Part:
    channels = config.get("z_dim", CHANNELS)
    if channels != CHANNELS:
        raise UserError(f"{option}: {file.path} makes latents of {channels} channels, not {CHANNELS}: {NEEDED}")
    settings = f"{config.get('latents_mean')} {config.get('latents_std')}"
    return Part("VAE", file, prefix, partial(build_qwen_vae, config), rules, settings, use_single_frames)


def layout(shapes: Shapes, names: tuple[str, str, str]) -> dict[str, Any]:
    """The part of the configuration that the shapes tell. names: WAN or DIFFUSERS."""
    block, convolution, first = names
    found = (re.match(re.escape(block).replace(r"\{\}", r"(\d{1,3})") + r"(resample|time_conv)\.", n) for n in shapes)
    resampled = sorted({int(match[1]) for match in found if match})  # the last layer of each level but the last
    starts = [0, *(i + 1 for i in resampled)]
    width, colours, *_ = shape_of(shapes, first, 5)
    return {
        "base_dim": width,
        "z_dim": shape_of(shapes, "conv2.weight" if names is WAN else "post_quant_conv.weight", 5)[0],
        "dim_mult": [shape_of(shapes, block.format(i) + convolution, 5)[0] // width for i in starts],
        "num_res_blocks": resampled[0] if resampled else depth(shapes, block),
        "temperal_downsample": [has(shapes, f"{block.format(i)}time_conv.") for i in resampled],
        "input_channels": colours,
    }


def build_qwen_vae(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKLQwenImage

    module: Any = AutoencoderKLQwenImage.from_config(dict(config))
    return module


def use_single_frames(vae: nn.Module) -> None:
    """Compute the convolutions over time in two dimensions, which takes a third of the time and memory.

    Only zeros come before the single frame of a picture, so only the last slice of a kernel has an effect.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.forward = partial(_convolved, module)  # type: ignore[method-assign]


def _convolved(conv: Any, x: Tensor) -> Tensor:
    """B C 1 h w -> B C' 1 h w. `_padding` of diffusers' class: (left, right, top, bottom, before, after)."""
    left, _, top, *_ = conv._padding
    return F.conv2d(x.squeeze(2), conv.weight[:, :, -1], conv.bias, padding=(top, left)).unsqueeze(2)


# ---- pixels and latents ---------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels B 3 H W in [-1, 1] -> latents B 16 h w float32, normalised for the denoiser: (mean - m) / s per channel.

    Uses the mean of the posterior, with which the models were trained. Nothing is drawn.
    """
    parameter = next(vae.parameters())
    with torch.autocast(parameter.device.type, enabled=False):  # the VAE's own dtype decides: see --no_half_vae
        moments = vae.quant_conv(vae.encoder(pixels.to(parameter.device, parameter.dtype).unsqueeze(2)))
    mean, std = _statistics(vae, parameter.device)
    return (moments[:, : vae.config.z_dim, 0].float() - mean) / std


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Normalised latents B 16 h w -> pixels B 3 H W float32 in [-1, 1]."""
    parameter = next(vae.parameters())
    mean, std = _statistics(vae, parameter.device)
    raw = (latents.float().to(parameter.device) * std + mean).unsqueeze(2)
    with torch.autocast(parameter.device.type, enabled=False):
        pixels = vae.decoder(vae.post_quant_conv(raw.to(parameter.dtype)))
    return pixels[:, :, 0].float().clamp(-1, 1)


def _statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of pictures, (C 1 1) each."""
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (vae.config.latents_mean, vae.config.latents_std))
    return on_device(mean, device), on_device(std, device)
