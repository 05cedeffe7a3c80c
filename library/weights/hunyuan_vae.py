# SPDX-License-Identifier: Apache-2.0
"""The autoencoder of HunyuanImage-2.1: where its weights are, and their published names.

Published names: https://github.com/Tencent-Hunyuan/HunyuanImage-2.1. library.weights.kl_vae turns pixels into latents,
as for other KL autoencoders. Here 32 x 32 pixels become one latent pixel of 64 channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from torch import nn

from library.errors import UserError
from library.key_tables import ModuleName, Op, Rule, Shapes, expand, inside, named
from library.weights import kl_vae
from library.weights.loading import Part, own_names, part_file, read_json, shipped_config
from library.weights.sizes import below, depth, has, reading_sizes, shape_of
from library.weights.vae_names import VAE_RESNET
from library.weights.weight_files import open_weights

CLASS = "AutoencoderKLHunyuanImage"
NEEDED = kl_vae.RequiredVae(64, "HunyuanImage-2.1")
PREFIXES = ("", "vae.")
MARK = "encoder.conv_in."
# the 1x1 convolutions of the attention are three-dimensional in Tencent's own file
CONVOLUTION = Op(lambda t: t, lambda t, shape: t.reshape(shape), shapes=lambda shape: (shape, (*shape, 1)))
ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "proj"))


def vae_part(path: Path, option: str) -> Part:
    """The autoencoder in a file or in a folder (its own or a model's). Raises UserError if it is another one."""
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        file, prefix, published = part_file(folder), "", False
        config = read_json(folder / "config.json")
        if config.get("_class_name", CLASS) != CLASS:
            raise UserError(f"{option}: {folder} holds an {config['_class_name']}, not an {CLASS}")
    else:
        file = open_weights(path)
        found = next((prefix for prefix in PREFIXES if has(file.shapes, prefix + MARK)), None)
        if found is None:
            raise UserError(f"{option}: {path} has no VAE inside; the VAE of {NEEDED.whose} is needed")
        prefix, shapes = found, below(file.shapes, found)
        published = not has(shapes, "encoder.down_blocks.")
        with reading_sizes(path, prefix, option):
            config = {**shipped_config("hunyuan_image_vae"), **layout(shapes, published=published)}
    rules = vae_rules if published else own_names
    part = Part("VAE", file, prefix, partial(build_vae, config), rules, str(config.get("scaling_factor")))
    return kl_vae.with_channels(part, path, NEEDED, option)


def layout(shapes: Shapes, *, published: bool) -> dict[str, Any]:
    """The part of the configuration that the shapes tell. published: whether names are published or of diffusers."""
    if published:
        first = [f"encoder.down.{level}.block.0." for level in range(depth(shapes, "encoder.down.{}."))]
        layers = depth(shapes, "encoder.down.0.block.{}.")
    else:  # one list of blocks: the residual blocks of a level, then its downsampling
        blocks = [*takewhile(lambda start: has(shapes, start), (f"encoder.down_blocks.{i}." for i in count()))]
        layers = next((i for i, start in enumerate(blocks) if has(shapes, f"{start}conv.")), len(blocks))
        first = blocks[:: layers + 1]
    return {
        "latent_channels": shape_of(shapes, "encoder.conv_out.weight", 4)[0] // 2,
        "block_out_channels": [shape_of(shapes, f"{start}conv1.weight", 4)[0] for start in first],
        "layers_per_block": layers,
        "spatial_compression_ratio": 2 ** (len(first) - 1),
    }


def build_vae(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKLHunyuanImage

    return AutoencoderKLHunyuanImage.from_config(dict(config))


def vae_rules(vae: nn.Module) -> tuple[Rule, ...]:
    """The published names of an autoencoder's tensors."""
    return expand(_names(vae), vae.state_dict())


def _names(vae: nn.Module) -> Iterator[ModuleName]:
    for side, way in (("encoder", "down"), ("decoder", "up")):
        yield from (named(f"{side}.{name}", f"{side}.{name}") for name in ("conv_in", "conv_out", "norm_out"))
        mid, attention = f"{side}.mid_block", f"{side}.mid_block.attentions.0"
        for i in (0, 1):
            yield from inside(f"{side}.mid.block_{i + 1}", f"{mid}.resnets.{i}", VAE_RESNET)
        yield named(f"{side}.mid.attn_1.norm", f"{attention}.norm")
        yield from (named(f"{side}.mid.attn_1.{a}", f"{attention}.{b}", op=CONVOLUTION) for a, b in ATTENTION)
        level = block = 0
        for i, module in enumerate(vae.get_submodule(f"{side}.{way}_blocks").children()):
            ours = f"{side}.{way}_blocks.{i}"
            if hasattr(module, "conv1"):
                yield from inside(f"{side}.{way}.{level}.block.{block}", ours, VAE_RESNET)
                block += 1
            else:
                yield named(f"{side}.{way}.{level}.{way}sample.conv", f"{ours}.conv")
                level, block = level + 1, 0
