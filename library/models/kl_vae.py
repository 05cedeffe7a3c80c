# SPDX-License-Identifier: Apache-2.0
"""The KL autoencoder of SD 1/2/XL/3 and FLUX.1: where its weights lie, and pixels <-> scaled latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.device import on_device
from library.errors import UserError
from library.models.loading import Part, own_names, part_file, read_json
from library.models.weight_files import WeightFile, open_weights
from library.names.keys import CONV_1X1, Rule, Shapes
from library.names.sd import OLD_VAE_ATTENTION, VAE_PREFIX, vae_rules

VAE_FILES = ("vae/config.json", "vae/*.safetensors", "config.json", "diffusion_pytorch_model*.safetensors")
PREFIXES = (VAE_PREFIX, "vae.", "")  # of published names: Stable Diffusion's checkpoints, Lumina's, a VAE alone


def vae_part(path: Path, default_config: Mapping[str, Any], *, option: str = "--vae") -> Part:
    """A VAE in a file (published or diffusers names, alone or inside a checkpoint) or in a folder (its own, a model's).

    default_config: what a file does not say of itself, such as the scaling factor. option: for messages.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        return folder_part(part_file(folder), read_json(folder / "config.json"))
    file = open_weights(path)
    try:
        if "encoder.down_blocks.0.resnets.0.conv1.weight" in file.shapes:
            return folder_part(file, {**default_config, **layout(file.shapes, DIFFUSERS_BLOCK)})
        return published_part(file, default_config, advice=f"{option} needs one that has")
    except KeyError as error:  # a size is read from a weight that is not there
        raise UserError(f"{option}: {path} is incomplete: it lacks {error.args[0]}") from None


def published_part(file: WeightFile, default_config: Mapping[str, Any], advice: str = "give one with --vae") -> Part:
    """A VAE under published names, with one of PREFIXES; `advice` is for a file that has none."""
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}encoder.conv_in.weight" in file.shapes), None)
    if prefix is None:
        raise UserError(f"{file.path} has no VAE inside; {advice}")
    shapes = {name[len(prefix) :]: shape for name, shape in file.shapes.items() if name.startswith(prefix)}
    config = {**default_config, **layout(shapes, LDM_BLOCK)}
    return Part("VAE", file, prefix, lambda: build_vae(config), vae_rules, _scale(config))


def folder_part(file: WeightFile, config: Mapping[str, Any]) -> Part:
    """A VAE under diffusers' names, those of its early versions included."""
    return Part(
        "VAE", file, "", lambda: build_vae(config), lambda module: _folder_rules(module, file.shapes), _scale(config)
    )


def _scale(config: Mapping[str, Any]) -> str:
    """What latents depend on besides the weights."""
    return f"{config.get('scaling_factor')} {config.get('shift_factor')}"


def build_vae(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL

    module: Any = AutoencoderKL.from_config(dict(config))
    return module


def _folder_rules(module: nn.Module, names: Shapes) -> tuple[Rule, ...]:
    rules = []
    for rule in own_names(module):
        (name,) = rule.ours
        if ".attentions.0.to_" in name and name not in names:
            for old, new in OLD_VAE_ATTENTION.items():
                name = name.replace(f".{new}.", f".{old}.")
            rule = Rule(name, rule.ours, CONV_1X1 if name.endswith(".weight") else rule.op)
        rules.append(rule)
    return tuple(rules)


LDM_BLOCK = "encoder.down.{level}.block.{index}.conv1.weight"
DIFFUSERS_BLOCK = "encoder.down_blocks.{level}.resnets.{index}.conv1.weight"


def layout(shapes: Shapes, block: str) -> dict[str, Any]:
    """The part of the config that the shapes tell. `block` is the name of a residual block's first convolution."""
    widths: list[int] = []
    while (name := block.format(level=len(widths), index=0)) in shapes:
        widths.append(shapes[name][0])
    layers = 0
    while block.format(level=0, index=layers) in shapes:
        layers += 1
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": layers,
        "latent_channels": shapes["encoder.conv_out.weight"][0] // 2,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


# ---- pixels and latents ---------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
    """Pixels B 3 H W in [-1, 1] -> latents B C h w float32 as the denoiser sees them: (sample - shift) * scale.

    sample = mean + std * noise (Kingma & Welling 2014, https://arxiv.org/abs/1312.6114, section 2.4). The noise of each
    picture comes from its own seed on the CPU, so that a latent depends neither on its batch nor on the device.
    """
    parameter = next(vae.parameters())
    with torch.autocast(parameter.device.type, enabled=False):  # the VAE's own dtype decides: see --no_half_vae
        posterior = vae.encode(pixels.to(parameter.device, parameter.dtype), return_dict=False)[0]
    shape = tuple(posterior.mean.shape[1:])
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    sample = posterior.mean.float() + posterior.std.float() * on_device(noise, parameter.device)
    return (sample - _shift(vae)) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Scaled latents B C h w -> pixels B 3 H W float32 in [-1, 1]."""
    parameter = next(vae.parameters())
    raw = latents.float().to(parameter.device) / vae.config.scaling_factor + _shift(vae)
    with torch.autocast(parameter.device.type, enabled=False):
        pixels = vae.decode(raw.to(parameter.dtype), return_dict=False)[0]
    return pixels.float().clamp(-1, 1)


def _shift(vae: Any) -> float:
    return vae.config.shift_factor or 0.0
