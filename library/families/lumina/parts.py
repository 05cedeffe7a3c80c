# SPDX-License-Identifier: Apache-2.0
"""The parts of Lumina-Image 2.0: denoiser, Gemma 2 and autoencoder, each from a file or folder of its own or a model's.

A bare file holds no configuration: configs/models/lumina.json has what is the same in every model, and widths, heads
and counts are read from the shapes, so that models of other sizes load too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from library.errors import UserError, raise_problems
from library.families.family import ModelParts
from library.families.lumina.forward import use_device_lengths
from library.families.lumina.names import lumina_names
from library.families.lumina.options import LuminaOptions
from library.families.own_files import require_own_file, require_own_folder
from library.key_tables import Rule, Shapes, expand, part_rows
from library.weights import kl_vae
from library.weights.language_models import gemma2_encoder
from library.weights.loading import PIPELINE_FILES, Part, locate, own_names, part_file, read_json, shipped_config
from library.weights.sizes import SizeError, below, depth, has, reading_sizes, shape_of
from library.weights.weight_files import open_weights

ENCODER = "gemma2"  # name of the text encoder, and of its states in a Cond: (B, length, width)
LATENT_CHANNELS = 16
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
GEMMA_PREFIX = "text_encoders.gemma2_2b.transformer.model."  # in a file that holds everything
VAE_PREFIX = "vae."
MODEL_FILES = (*PIPELINE_FILES, "transformer/*.safetensors", "diffusion_pytorch_model*.safetensors")
GEMMA_FILES = ("text_encoder/*.safetensors", "*.safetensors", "*/*.json", "*.json", "*/*.model", "*.model")
CAPTION = ("cap_embedder.", "time_caption_embed.caption_embedder.")  # published and diffusers names
UNUSED = "norm_final.weight"  # published files have it, and the model never runs it
PUBLISHED_DEPTHS = {2304: {"num_layers": 26}}
MODEL_CLASS = "Lumina2Transformer2DModel"


@dataclass(frozen=True, kw_only=True)
class LuminaParts(ModelParts):
    """Where each module comes from."""

    gemma2_path: Path


def open_parts(options: LuminaOptions) -> LuminaParts:
    """Reads headers and configurations only. Raises UserError for files of another kind and where parts are missing."""
    path = _locate_model(options)
    denoiser, config = _denoiser(path)
    raise_problems(_missing(path, options))
    gemma2 = _inside(locate(options.gemma2, "--gemma2", GEMMA_FILES) if options.gemma2 else path, "text_encoder")
    ae = locate(options.ae, "--ae", kl_vae.VAE_FILES) if options.ae else path
    vae = kl_vae.vae_part(ae, shipped_config("flux_ae"), needed=kl_vae.FLUX, option="--ae")
    encoder = gemma2_encoder(gemma2, option="--gemma2", prefixes=(GEMMA_PREFIX, ""))
    return LuminaParts(
        path=path, denoiser=denoiser, config=config, vae=vae, encoders={ENCODER: encoder}, gemma2_path=gemma2
    )


def _locate_model(options: LuminaOptions) -> Path:
    """File or folder of the model. Of a hub repository, only what is not given by another option is downloaded."""
    files = list(MODEL_FILES)
    files += [] if options.gemma2 else ["text_encoder/*.safetensors"]
    files += [] if options.ae else ["vae/*.safetensors"]
    return locate(options.pretrained_model_name_or_path or "", "--pretrained_model_name_or_path", files)


def _missing(path: Path, options: LuminaOptions) -> Iterator[str]:
    """A line for each part that is neither given nor in the model."""
    wanted = (
        ("--gemma2", options.gemma2, "text_encoder", GEMMA_PREFIX, "Gemma 2: give its file or folder"),
        ("--ae", options.ae, "vae", VAE_PREFIX, "autoencoder: give the file of FLUX.1's (ae.safetensors)"),
    )
    names = () if path.is_dir() else open_weights(path).shapes
    for option, given, folder, prefix, what in wanted:
        if not given and not (path / folder).is_dir() and not any(name.startswith(prefix) for name in names):
            yield f"{option} is missing: {path} has no {what}"


def _inside(path: Path, folder: str) -> Path:
    return path / folder if (path / folder).is_dir() else path


# ---- denoiser -------------------------------------------------------------------------------------------------------


def _denoiser(path: Path) -> tuple[Part, dict[str, Any]]:
    """The denoiser of a file or folder, and its configuration."""
    if path.is_dir():
        file, config = _folder(path)
        prefix, rules = "", own_names
    else:
        file = open_weights(path)
        require_own_file(file, "lumina")
        with reading_sizes(path):
            prefix, mark = _naming(file.shapes)
        with reading_sizes(path, prefix):
            config = layout(below(file.shapes, prefix))
        rules = denoiser_rules if mark == CAPTION[0] else own_names
    with reading_sizes(path):
        part = Part(
            "denoiser", file, prefix, partial(build_denoiser, config), rules,
            extras=(re.escape(UNUSED),), published_depths=PUBLISHED_DEPTHS,
        )  # fmt: skip
        return part, config


def _naming(shapes: Shapes) -> tuple[str, str]:
    """What stands before the names of a file, and which of CAPTION it has."""
    found = next(((prefix, mark) for prefix in PREFIXES for mark in CAPTION if has(shapes, prefix + mark)), None)
    if found is None:
        raise SizeError("is incomplete: it lacks", f"{CAPTION[0]}0.weight")
    return found


def _folder(path: Path) -> tuple[Any, dict[str, Any]]:
    """Weights and configuration in a pipeline's folder or in that of the denoiser alone."""
    require_own_folder(path, "lumina")
    folder = _inside(path, "transformer")
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} is no Lumina-Image 2.0 folder: it has no folder transformer and no config.json")
    config = read_json(folder / "config.json")
    kind = config.get("_class_name", MODEL_CLASS)
    if kind != MODEL_CLASS:
        raise UserError(f"{folder} holds a {kind}, not a {MODEL_CLASS}")
    return part_file(folder), config


def layout(shapes: Shapes) -> dict[str, Any]:
    """The configuration of a file in published or diffusers names, without prefix."""
    fixed = shipped_config("lumina")
    area = fixed["patch_size"] ** 2
    published = has(shapes, CAPTION[0])
    size = lambda name, diffusers, axes: shape_of(shapes, name if published else diffusers, axes)
    hidden, patch = shape_of(shapes, "x_embedder.weight", 2)
    head = size("layers.0.attention.q_norm.weight", "layers.0.attn.norm_q.weight", 1)[0]
    inner = size("layers.0.feed_forward.w1.weight", "layers.0.feed_forward.linear_1.weight", 2)[0]
    keys = size("layers.0.attention.qkv.weight", "layers.0.attn.to_k.weight", 2)[0]
    if published:
        keys = part_rows(keys, hidden, 3)[1]
    return {
        **fixed,
        "in_channels": patch // area,
        "out_channels": size("final_layer.linear.weight", "norm_out.linear_2.weight", 2)[0] // area,
        "hidden_size": hidden,
        "num_layers": depth(shapes, "layers.{}."),
        "num_refiner_layers": depth(shapes, "noise_refiner.{}.", "context_refiner.{}."),
        "num_attention_heads": hidden // head,
        "num_kv_heads": keys // head,
        "multiple_of": 1,  # with the next line: exactly `inner` rows
        "ffn_dim_multiplier": (inner + 0.5) / (4 * hidden),
        "axes_dim_rope": rope_axes(head),
        "cap_feat_dim": shape_of(shapes, f"{CAPTION[0 if published else 1]}0.weight", 1)[0],
    }


def rope_axes(head: int) -> list[int]:
    """How the numbers of a head are shared out between text position, row and column: 96 -> 32, 32, 32."""
    third = head // 6 * 2
    return [head - 2 * third, third, third]


def denoiser_rules(module: Any) -> tuple[Rule, ...]:
    """The published names of a denoiser's tensors."""
    return expand(lumina_names(len(module.layers), len(module.noise_refiner)), module.state_dict())


def build_denoiser(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import Lumina2Transformer2DModel

    module: Any = Lumina2Transformer2DModel.from_config(dict(config))
    use_device_lengths(module)
    return module
