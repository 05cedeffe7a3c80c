# SPDX-License-Identifier: Apache-2.0
"""The autoencoder of FLUX.2: where its weights are, and pixels <-> normalised latents.

A KL autoencoder of 32 channels at an eighth of the size. Each 2 x 2 latent pixels are joined to one of 128 channels,
which the running statistics of a batch normalisation bring to mean 0 and variance 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from library.key_tables import Rule, Shapes, expand, named
from library.weights import kl_vae
from library.weights.loading import Part, own_names, part_file, read_json, shipped_config
from library.weights.sizes import below, has, reading_sizes, shape_of
from library.weights.vae_names import vae_module_names
from library.weights.weight_files import WeightFile, open_weights

NEEDED = kl_vae.RequiredVae(32, "FLUX.2 (flux2-vae.safetensors)")
CLASS = "AutoencoderKLFlux2"
STATISTICS = ("running_mean", "running_var")
COUNTER = "bn.num_batches_tracked"  # an integer that nothing reads


def vae_part(path: Path, *, option: str) -> Part:
    """The VAE in a file (published or diffusers names, alone or in a checkpoint) or in a folder (its own or a model's).

    option: for messages. Raises UserError if it is not the VAE of FLUX.2.
    """
    config = shipped_config("flux2_ae")
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        own = read_json(folder / "config.json")
        if own.get("_class_name", CLASS) != CLASS:
            raise UserError(f"{option}: {folder} holds a {own['_class_name']}, not an {CLASS}")
        file, config = part_file(folder), {**config, **own}
    else:
        file, own = open_weights(path), {}
    prefix = next((prefix for prefix in kl_vae.PREFIXES if has(file.shapes, f"{prefix}encoder.conv_in.")), None)
    if prefix is None:
        raise UserError(f"{option}: {path} has no VAE inside; that of {NEEDED.whose} is needed")
    shapes = below(file.shapes, prefix)
    published, inside = not has(shapes, "encoder.down_blocks."), has(shapes, "encoder.quant_conv.")
    with reading_sizes(path, prefix, option):
        sizes = kl_vae.layout(shapes, kl_vae.LDM_BLOCK if published else kl_vae.DIFFUSERS_BLOCK)
        sizes["decoder_block_out_channels"] = _decoder_widths(shapes, len(sizes["block_out_channels"]), published)
    if inside:
        sizes |= {"use_quant_conv": True, "use_post_quant_conv": True}
    rules = partial(_published_rules, inside=inside) if published else _own_rules
    part = Part(
        "VAE", file, prefix, partial(build_vae, {**config, **sizes, **own}), rules,
        str({**config, **own}["batch_norm_eps"]), finish=partial(_keep_statistics, file=file, prefix=prefix),
    )  # fmt: skip
    return kl_vae.with_channels(part, path, NEEDED, option)


def _decoder_widths(shapes: Shapes, levels: int, published: bool) -> list[int]:
    """Channels of the decoder, beginning at full size. A smaller decoder exists for the same latents."""
    names = [f"decoder.up.{i}.block.0" if published else f"decoder.up_blocks.{levels - 1 - i}.resnets.0"
             for i in range(levels)]  # fmt: skip
    return [shape_of(shapes, f"{name}.conv2.weight", 4)[0] for name in names]


def build_vae(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKLFlux2

    module: Any = AutoencoderKLFlux2.from_config(dict(config))
    return module


def _own_rules(vae: nn.Module) -> tuple[Rule, ...]:
    return tuple(rule for rule in own_names(vae) if rule.published != COUNTER)


def _published_rules(vae: nn.Module, inside: bool) -> tuple[Rule, ...]:
    """Published names. inside: the 1 x 1 convolutions around the latents are named as parts of encoder and decoder."""
    sides = ("encoder.", "decoder.") if inside else ("", "")
    own = [named(f"{side}{name}", name) for side, name in zip(sides, ("quant_conv", "post_quant_conv"))]
    tensors = [name for name in vae.state_dict() if name != COUNTER]
    return expand([*vae_module_names(vae), *own, named("bn", "bn")], tensors)


def _keep_statistics(vae: nn.Module, file: WeightFile, prefix: str) -> None:
    """Load the statistics in float32 for every dtype of the weights: all latents depend on them."""
    bn: Any = vae.get_submodule("bn")
    for name in STATISTICS if not bn.running_mean.is_meta else ():
        setattr(bn, name, file.copy(f"{prefix}bn.{name}", torch.float32))


# ---- pixels and latents ---------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels B 3 16h 16w in [-1, 1] -> normalised latents B 128 h w float32, from the posterior's mean."""
    parameter = next(vae.parameters())
    with torch.autocast(parameter.device.type, enabled=False):  # the VAE's own dtype decides: see --no_half_vae
        posterior = vae.encode(pixels.to(parameter.device, parameter.dtype), return_dict=False)[0]
    mean, std = _statistics(vae)
    return (F.pixel_unshuffle(posterior.mode().float(), 2) - mean) / std


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Normalised latents B 128 h w -> pixels B 3 16h 16w float32 in [-1, 1]."""
    parameter, (mean, std) = next(vae.parameters()), _statistics(vae)
    raw = F.pixel_shuffle(latents.float().to(parameter.device) * std + mean, 2)
    with torch.autocast(parameter.device.type, enabled=False):
        pixels = vae.decode(raw.to(parameter.dtype), return_dict=False)[0]
    return pixels.float().clamp(-1, 1)


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels, each (1, 128, 1, 1) float32."""
    mean, variance = (getattr(vae.bn, name).float().view(1, -1, 1, 1) for name in STATISTICS)
    return mean, torch.sqrt(variance + vae.config.batch_norm_eps)
