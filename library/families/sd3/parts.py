# SPDX-License-Identifier: Apache-2.0
"""The parts of Stable Diffusion 3 and 3.5: MMDiT, VAE and up to three text encoders, and where each of them lies.

A model is one file in published names (all parts or the MMDiT alone), a diffusers transformer, or a diffusers pipeline
folder. A part that has an option of its own is taken from there. A single file holds no configuration: every width and
count is read from the shapes, and configs/models/sd3.json has what is the same in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.errors import UserError
from library.families.detect import PREFIXES
from library.families.family import ModelParts
from library.families.own_files import class_named, require_own_file, require_own_folder
from library.families.sd3.names import sd3_names
from library.families.sd3.options import SD3Options
from library.key_tables import Rule, Shapes, expand
from library.weights import kl_vae
from library.weights.loading import PIPELINE_FILES, Part, locate, own_names, part_file, read_json, shipped_config
from library.weights.sizes import SizeError, below, depth, has, reading_sizes, shape_of
from library.weights.text_encoders import EncoderPart, clip_encoder, t5_encoder
from library.weights.vae_names import VAE_PREFIX
from library.weights.weight_files import WeightFile, open_weights

MMDIT_PREFIX = "model.diffusion_model."
ENCODER_PREFIX = "text_encoders.{name}.transformer."
CLIP_L, CLIP_G, T5 = "clip_l", "clip_g", "t5xxl"
ENCODERS = {CLIP_L: "text_encoder", CLIP_G: "text_encoder_2", T5: "text_encoder_3"}  # folders of a pipeline
ENCODER_FILES = ("*.safetensors", "*.json")
PUBLISHED_DEPTHS = {1536: {"num_layers": 24}, 2432: {"num_layers": 38}}
HEAD_DIM = 64  # of every published model; where queries and keys are normed, the norm says it
# what tells the configuration, in published and in diffusers' names: whole names, or starts of several
PUBLISHED = {
    "patches": "x_embedder.proj.",
    "positions": "pos_embed",
    "context": "context_embedder.weight",
    "pooled": "y_embedder.mlp.0.weight",
    "outputs": "final_layer.linear.weight",
    "block": "joint_blocks.{}.",
    "norm": "x_block.attn.ln_k.weight",
    "second": "x_block.attn2.",
}
DIFFUSERS = {
    "patches": "pos_embed.proj.",
    "positions": "pos_embed.pos_embed",
    "context": "context_embedder.weight",
    "pooled": "time_text_embed.text_embedder.linear_1.weight",
    "outputs": "proj_out.weight",
    "block": "transformer_blocks.{}.",
    "norm": "attn.norm_k.weight",
    "second": "attn2.",
}


@dataclass(frozen=True, kw_only=True)
class SD3Parts(ModelParts):
    """Where each module comes from."""

    places: Mapping[str, Path]  # file or folder of each encoder


def open_parts(options: SD3Options) -> SD3Parts:
    """Reads headers and configurations only. Raises UserError for files of another kind and for missing parts."""
    path = locate(options.pretrained_model_name_or_path or "", "--pretrained_model_name_or_path", _files(options))
    file, denoiser, config = _denoiser(path)
    found = {name: _place(name, path, file, options) for name in ENCODERS}
    places = {name: place for name, place in found.items() if place is not None}
    if not places:
        raise UserError(f"{path} has no text encoders inside: give --clip_l, --clip_g and --t5xxl")
    encoders = {name: _encoder(name, place) for name, place in places.items()}
    vae = _vae(path, file, options)
    return SD3Parts(path=path, denoiser=denoiser, config=config, vae=vae, encoders=encoders, places=places)


def kind(config: Mapping[str, Any]) -> str:
    """Which of the published models a configuration is like: "medium", "5-medium" or "5-large"."""
    if config["dual_attention_layers"]:
        return "5-medium"
    return "5-large" if config["qk_norm"] else "medium"


def _given(options: SD3Options) -> dict[str, str | None]:
    return {CLIP_L: options.clip_l, CLIP_G: options.clip_g, T5: options.t5xxl}


def _files(options: SD3Options) -> list[str]:
    """What is needed of a repository on the hub."""
    given = {ENCODERS[name]: place for name, place in _given(options).items()} | {"vae": options.vae}
    parts = [folder for folder, own in given.items() if own is None]
    return [
        *PIPELINE_FILES,
        *(f"{part}/*.safetensors" for part in ("transformer", *parts)),
        "diffusion_pytorch_model*.safetensors",
    ]


# ---- MMDiT ----------------------------------------------------------------------------------------------------------


def _denoiser(path: Path) -> tuple[WeightFile, Part, dict[str, Any]]:
    if path.is_dir():
        folder = _transformer_folder(path)
        file, config = part_file(folder), read_json(folder / "config.json")
        config = {"qk_norm": None, "dual_attention_layers": (), **shipped_config("sd3"), **config}
        return file, _mmdit(file, "", config, own_names), config
    file = open_weights(path)
    require_own_file(file, "sd3")
    with reading_sizes(path):
        names, prefix = _naming(file.shapes)
    with reading_sizes(path, prefix):
        config = {**shipped_config("sd3"), **layout(below(file.shapes, prefix), names)}
    rules = mmdit_rules if names is PUBLISHED else own_names
    return file, _mmdit(file, prefix, config, rules), config


def _mmdit(
    file: WeightFile, prefix: str, config: dict[str, Any], rules: Callable[[nn.Module], tuple[Rule, ...]]
) -> Part:
    return Part("MMDiT", file, prefix, partial(build_mmdit, config), rules, published_depths=PUBLISHED_DEPTHS)


def _naming(shapes: Shapes) -> tuple[Mapping[str, str], str]:
    """The names that a file has, and what stands before them."""
    for names in (PUBLISHED, DIFFUSERS):
        for prefix in ("", *PREFIXES):
            if has(shapes, prefix + names["patches"]):
                return names, prefix
    raise SizeError("is incomplete: it lacks", f"{PUBLISHED['patches']}weight")


def _transformer_folder(path: Path) -> Path:
    """The folder with the MMDiT: `path` itself or the one in a pipeline."""
    require_own_folder(path, "sd3")
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    name = class_named(folder / "config.json")
    if name != "SD3Transformer2DModel":
        what = f"it is a {name}" if name else f"it has neither {path.name}/transformer nor a config.json"
        raise UserError(f"{path} is no folder of SD3 or SD3.5: {what}")
    return folder


def build_mmdit(config: Mapping[str, Any]) -> nn.Module:
    """The model with an empty table of positions: that of a file takes its place, and making one takes gigabytes."""
    from diffusers import SD3Transformer2DModel

    module: Any = SD3Transformer2DModel.from_config({**config, "pos_embed_max_size": 1})
    side, embedding = config["pos_embed_max_size"], module.pos_embed
    embedding.pos_embed = torch.empty(1, side**2, embedding.pos_embed.shape[-1], device="meta")
    embedding.pos_embed_max_size = side
    module.register_to_config(pos_embed_max_size=side)
    return module


def mmdit_rules(module: nn.Module) -> tuple[Rule, ...]:
    """The published names of an MMDiT's tensors."""
    blocks = len(list(module.get_submodule("transformer_blocks").children()))
    return expand(sd3_names(blocks), module.state_dict())


def layout(shapes: Shapes, names: Mapping[str, str]) -> dict[str, Any]:
    """The part of the configuration that the shapes tell. names: PUBLISHED or DIFFUSERS; no prefix."""
    width, channels, patch, _ = shape_of(shapes, f"{names['patches']}weight", 4)
    context, blocks = shape_of(shapes, names["context"], 2), depth(shapes, names["block"])
    starts = [names["block"].format(i) for i in range(blocks)]
    norm = next((f"{start}{names['norm']}" for start in starts if f"{start}{names['norm']}" in shapes), None)
    config: dict[str, Any] = {"attention_head_dim": shape_of(shapes, norm, 1)[0]} if norm else {}
    head = config.get("attention_head_dim", HEAD_DIM)
    return config | {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shape_of(shapes, names["outputs"], 2)[0] // patch**2,
        "num_layers": blocks,
        "num_attention_heads": max(1, width // head),
        "caption_projection_dim": context[0],
        "joint_attention_dim": context[1],
        "pooled_projection_dim": shape_of(shapes, names["pooled"], 2)[1],
        "pos_embed_max_size": math.isqrt(shape_of(shapes, names["positions"], 3)[1]),
        "qk_norm": "rms_norm" if norm else None,
        "dual_attention_layers": tuple(i for i, start in enumerate(starts) if has(shapes, start + names["second"])),
    }


# ---- text encoders and VAE ------------------------------------------------------------------------------------------


def _place(name: str, path: Path, file: WeightFile, options: SD3Options) -> Path | None:
    """File or folder of an encoder: its option's, else one of the pipeline, else the file of the MMDiT; or None."""
    given, folder = _given(options)[name], ENCODERS[name]
    if given:
        place = locate(given, f"--{name}", (f"{folder}/*", *ENCODER_FILES))
        return place / folder if (place / folder).is_dir() else place
    if (path / folder).is_dir():
        return path / folder
    prefix = ENCODER_PREFIX.format(name=name)
    return path if any(key.startswith(prefix) for key in file.shapes) else None


def _encoder(name: str, place: Path) -> EncoderPart:
    option, prefixes = f"--{name}", (ENCODER_PREFIX.format(name=name), "")
    if name == T5:
        return t5_encoder(place, option=option, prefixes=prefixes)
    return clip_encoder(place, option=option, projection=True, prefixes=prefixes, config=name)


def _vae(path: Path, file: WeightFile, options: SD3Options) -> Part:
    config = shipped_config("sd3_vae")
    if options.vae:
        return kl_vae.vae_part(locate(options.vae, "--vae", kl_vae.VAE_FILES), config, needed=kl_vae.SD3)
    if (path / "vae").is_dir():
        return kl_vae.vae_part(path, config, needed=kl_vae.SD3)
    if has(file.shapes, f"{VAE_PREFIX}encoder.conv_in."):
        return kl_vae.inner_part(file, config, kl_vae.SD3)
    raise UserError(f"{path} has no VAE inside: give one with --vae")
