# SPDX-License-Identifier: Apache-2.0
"""The KL autoencoder of SD 1/2/XL/3 and FLUX.1: where its weights lie, and pixels <-> scaled latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.device import on_device
from library.errors import UserError
from library.key_tables import CONV_1X1, Rule, Shapes
from library.weights.loading import Part, own_names, part_file, read_json
from library.weights.sizes import below, depth, has, reading_sizes, shape_of
from library.weights.vae_names import OLD_VAE_ATTENTION, VAE_PREFIX, vae_rules
from library.weights.weight_files import WeightFile, open_weights

VAE_FILES = ("vae/config.json", "vae/*.safetensors", "config.json", "diffusion_pytorch_model*.safetensors")
PREFIXES = (VAE_PREFIX, "vae.", "")  # of published names: Stable Diffusion's checkpoints, Lumina's, a VAE alone
TAESD = ("encoder.0.", "decoder.1.", "decoder.layers.")  # in its own names and in those of diffusers
CLASS = "AutoencoderKL"


@dataclass(frozen=True)
class RequiredVae:
    """The VAE that a model needs. Those of one number of channels look alike, and only their pictures differ."""

    channels: int  # of latents
    whose: str


SD = RequiredVae(4, "Stable Diffusion 1.x or 2.x")
SDXL = RequiredVae(4, "SDXL")
SD3 = RequiredVae(16, "SD3")
FLUX = RequiredVae(16, "FLUX.1 (ae.safetensors)")


def vae_part(
    path: Path, default_config: Mapping[str, Any], *, needed: RequiredVae | None = None, option: str = "--vae"
) -> Part:
    """A VAE in a file (published or diffusers names, alone or inside a checkpoint) or in a folder (its own, a model's).

    default_config: what a file does not say of itself, such as the scaling factor. option: for messages. Raises
    UserError when it is not the VAE that is `needed`.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        config = read_json(folder / "config.json")
        if config.get("_class_name", CLASS) != CLASS:
            raise UserError(f"{option}: {folder} holds a {config['_class_name']}, not an {CLASS}")
        part = folder_part(part_file(folder), config)
    else:
        file = open_weights(path)
        if has(file.shapes, "encoder.down_blocks."):
            with reading_sizes(path, option=option):
                part = folder_part(file, {**default_config, **layout(file.shapes, DIFFUSERS_BLOCK)})
        else:
            part = published_part(file, default_config, advice=f"{option} needs one that has", option=option)
    return part if needed is None else with_channels(part, path, needed, option)


def with_channels(part: Part, path: Path, needed: RequiredVae, option: str = "") -> Part:
    """`part`, checked. Raises UserError when its latents have not the number of channels that is needed."""
    with reading_sizes(part.file.path, part.prefix, option):
        channels = shape_of(below(part.file.shapes, part.prefix), "encoder.conv_out.weight", 4)[0] // 2
    if channels != needed.channels:
        start = f"{option}: {path}" if option else f"{path}: its VAE"
        raise UserError(
            f"{start} makes latents of {channels} channels, not {needed.channels}: the VAE of {needed.whose} is needed"
        )
    return part


def inner_part(file: WeightFile, default_config: Mapping[str, Any], needed: RequiredVae) -> Part:
    """The VAE inside a checkpoint. Raises UserError when there is none, or one of another kind of model."""
    return with_channels(published_part(file, default_config), file.path, needed)


def published_part(
    file: WeightFile, default_config: Mapping[str, Any], advice: str = "give one with --vae", option: str = ""
) -> Part:
    """A VAE under published names, with one of PREFIXES; `advice` is for a file that has none."""
    prefix = next((prefix for prefix in PREFIXES if has(file.shapes, f"{prefix}encoder.conv_in.")), None)
    if prefix is None:
        told = " (it is a TAESD, which only makes previews)" if has(file.shapes, *TAESD) else ""
        raise UserError(f"{file.path} has no VAE inside{told}; {advice}")
    with reading_sizes(file.path, prefix, option):
        config = {**default_config, **layout(below(file.shapes, prefix), LDM_BLOCK)}
    return Part("VAE", file, prefix, partial(build_vae, config), vae_rules, _scale(config))


def folder_part(file: WeightFile, config: Mapping[str, Any]) -> Part:
    """A VAE under diffusers' names, those of its early versions included."""
    is_old = any(f".attentions.0.{name}." in own for own in file.shapes for name in OLD_VAE_ATTENTION)
    return Part("VAE", file, "", partial(build_vae, config), partial(_folder_rules, is_old=is_old), _scale(config))


def _scale(config: Mapping[str, Any]) -> str:
    """What latents depend on besides the weights."""
    return f"{config.get('scaling_factor')} {config.get('shift_factor')}"


def build_vae(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(dict(config))


def _folder_rules(module: nn.Module, is_old: bool) -> tuple[Rule, ...]:
    rules = []
    for rule in own_names(module):
        (name,) = rule.ours
        if is_old and ".attentions.0.to_" in name:
            for old, new in OLD_VAE_ATTENTION.items():
                name = name.replace(f".{new}.", f".{old}.")
            rule = Rule(name, rule.ours, CONV_1X1 if name.endswith(".weight") else rule.op)
        rules.append(rule)
    return tuple(rules)


# starts of names: the levels of encoder and decoder, and the residual blocks of a level of the encoder
LDM_BLOCK = ("encoder.down.{}.", "decoder.up.{}.", "encoder.down.{level}.block.{{}}.")
DIFFUSERS_BLOCK = ("encoder.down_blocks.{}.", "decoder.up_blocks.{}.", "encoder.down_blocks.{level}.resnets.{{}}.")


def layout(shapes: Shapes, names: tuple[str, str, str]) -> dict[str, Any]:
    """The part of the config that the shapes tell. names: LDM_BLOCK or DIFFUSERS_BLOCK."""
    *levels, block = names
    blocks = [block.format(level=level) for level in range(depth(shapes, *levels))]
    widths = [shape_of(shapes, f"{own.format(0)}conv1.weight", 4)[0] for own in blocks]
    layers = max((depth(shapes, own) for own in blocks), default=0)
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": layers,
        "latent_channels": shape_of(shapes, "encoder.conv_out.weight", 4)[0] // 2,
        "use_quant_conv": has(shapes, "quant_conv."),
        "use_post_quant_conv": has(shapes, "post_quant_conv."),
    }


# ---- pixels and latents ---------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, seeds: Sequence[int] | None) -> Tensor:
    """Pixels B 3 H W in [-1, 1] -> latents B C h w float32 as the denoiser sees them: (sample - shift) * scale.

    sample = mean + std * noise (Kingma & Welling 2014, https://arxiv.org/abs/1312.6114, section 2.4). The noise of each
    picture comes from its own seed on the CPU, so that a latent depends neither on its batch nor on the device. Without
    seeds the mean is used.
    """
    posterior = _posterior(vae, pixels)
    if seeds is None:
        return (posterior.mean.float() - _shift(vae)) * vae.config.scaling_factor
    shape = tuple(posterior.mean.shape[1:])
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    sample = posterior.mean.float() + posterior.std.float() * on_device(noise, posterior.mean.device)
    return (sample - _shift(vae)) * vae.config.scaling_factor


@torch.no_grad()
def encode_unscaled(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels B 3 H W in [-1, 1] -> the mean of the posterior, B C h w float32, neither shifted nor scaled."""
    mean: Tensor = _posterior(vae, pixels).mean
    return mean.float()


def _posterior(vae: Any, pixels: Tensor) -> Any:
    parameter = next(vae.parameters())
    with torch.autocast(parameter.device.type, enabled=False):  # the VAE's own dtype decides: see --no_half_vae
        return vae.encode(pixels.to(parameter.device, parameter.dtype), return_dict=False)[0]


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Scaled latents B C h w -> pixels B 3 H W float32 in [-1, 1]."""
    parameter = next(vae.parameters())
    raw = latents.float().to(parameter.device) / vae.config.scaling_factor + _shift(vae)
    with torch.autocast(parameter.device.type, enabled=False):
        pixels = vae.decode(raw.to(parameter.dtype), return_dict=False)[0]
    return pixels.float().clamp(-1, 1)


def _shift(vae: Any) -> float:
    return vae.config.get("shift_factor") or 0.0
