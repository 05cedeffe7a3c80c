# SPDX-License-Identifier: Apache-2.0
"""The parts of SANA: denoiser, Gemma 2 and DC-AE, from one diffusers folder or from separate files and folders.

A single file of the denoiser has no configuration. configs/models/sana.json has what all models share; widths, heads
and counts are read from the shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from library.errors import UserError
from library.families.detect import PREFIXES, foreign_file, foreign_pipeline
from library.families.family import ModelParts
from library.families.sana.names import sana_names
from library.families.sana.options import SanaOptions
from library.key_tables import Rule, Shapes, expand
from library.weights import dc_ae
from library.weights.kl_vae import VAE_FILES
from library.weights.language_models import gemma2_encoder
from library.weights.loading import PIPELINE_FILES, Part, locate, own_names, part_file, read_json, shipped_config
from library.weights.sizes import SizeError, below, depth, has, reading_sizes, shape_of
from library.weights.weight_files import WeightFile, open_weights

ENCODER = "gemma2"  # name of the text encoder, and of its states in a Cond: (B, length, width)
MODEL_FILES = (*PIPELINE_FILES, "transformer/*.safetensors", "diffusion_pytorch_model*.safetensors")
GEMMA_FILES = ("text_encoder/*.safetensors", "*.safetensors", "*/*.json", "*.json", "*/*.model", "*.model")
MODEL_CLASS = "SanaTransformer2DModel"
TEXTS = ("y_embedder.y_proj.", "caption_projection.")  # published and diffusers names
CROSS_HEADS = {1152: 16, 2240: 20}  # width of a published model -> heads of its cross attention
SPRINT = ("cfg_embedder.", "time_embed.guidance_embedder.")
EXTRAS = (r"pos_embed", r"y_embedder\.y_embedding", r"logvar_linear\..+")
PLAIN_SIDE = 32  # latent pixels of a side up to which models have no positions
POSITION_SIDE = 64  # latent pixels of a side at which the scale of positions is 1


@dataclass(frozen=True, kw_only=True)
class SanaParts(ModelParts):
    """Where each module comes from."""

    gemma2_path: Path


def open_parts(options: SanaOptions) -> SanaParts:
    """Read headers and configurations only. Raises UserError for files of another kind and for missing parts."""
    path = _locate_model(options)
    denoiser, config = _denoiser(path)
    missing = [*_missing(path, options)]
    if missing:
        raise UserError(missing)
    gemma2 = _inside(locate(options.gemma2, "--gemma2", GEMMA_FILES) if options.gemma2 else path, "text_encoder")
    vae = dc_ae.dc_ae_part(locate(options.vae, "--vae", VAE_FILES) if options.vae else path)
    encoder = gemma2_encoder(gemma2, option="--gemma2")
    return SanaParts(
        path=path, denoiser=denoiser, config=config, vae=vae, encoders={ENCODER: encoder}, gemma2_path=gemma2
    )


def _locate_model(options: SanaOptions) -> Path:
    """File or folder of the model. Of a hub repository, only what is not given by another option is downloaded."""
    files = list(MODEL_FILES)
    files += [] if options.gemma2 else ["text_encoder/*.safetensors"]
    files += [] if options.vae else ["vae/*.safetensors"]
    return locate(options.pretrained_model_name_or_path or "", "--pretrained_model_name_or_path", files)


def _missing(path: Path, options: SanaOptions) -> Iterator[str]:
    """A line for each part that is neither given nor in the model."""
    wanted = (
        ("--gemma2", options.gemma2, "text_encoder", "Gemma 2 2B-it: give its file or folder"),
        ("--vae", options.vae, "vae", "autoencoder: give the file or folder of the DC-AE"),
    )
    for option, given, folder, what in wanted:
        if not given and not (path / folder).is_dir():
            yield f"{option} is missing: {path} has no {what}"


def _inside(path: Path, folder: str) -> Path:
    return path / folder if (path / folder).is_dir() else path


# ---- denoiser -------------------------------------------------------------------------------------------------------


def _denoiser(path: Path) -> tuple[Part, dict[str, Any]]:
    """The denoiser of a file or folder, and its configuration."""
    prefix, rules = "", own_names
    if path.is_dir():
        file, config = _folder(path)
    else:
        file = open_weights(path)
        answer = foreign_file(file.shapes, "sana")
        if answer:
            raise UserError(f"{path} is {answer}")
        with reading_sizes(path):
            prefix, texts = _naming(file.shapes)
        with reading_sizes(path, prefix):
            config = layout(below(file.shapes, prefix))
        rules = sana_rules if texts == TEXTS[0] else own_names
    if config.get("guidance_embeds") or has(file.shapes, *(prefix + name for name in SPRINT)):
        raise UserError(f"{path} is a SANA-Sprint, which is trained by distillation: give a SANA or SANA-1.5 model")
    with reading_sizes(path):
        width, layers = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
        usual = {1152: 28, 2240: 60 if layers > 20 else 20}
        depths = {width: {"num_layers": usual[width]}} if width in usual else {}
        channels, _ = config["in_channels"], config["caption_channels"]  # both must be there
    if channels != dc_ae.CHANNELS:
        raise UserError(f"{path} reads {channels} channels, not {dc_ae.CHANNELS}: give a SANA or SANA-1.5 model")
    part = Part("denoiser", file, prefix, partial(build, config), rules, extras=EXTRAS, published_depths=depths)
    return part, config


def _naming(shapes: Shapes) -> tuple[str, str]:
    """The prefix of the names in a file, and which of TEXTS it has."""
    pairs = ((prefix, texts) for prefix in (*PREFIXES, "") for texts in TEXTS)
    found = next((pair for pair in pairs if has(shapes, "".join(pair))), None)
    if found is None:
        raise SizeError("is incomplete: it lacks", f"{TEXTS[0]}fc1.weight")
    return found


def _folder(path: Path) -> tuple[WeightFile, dict[str, Any]]:
    """Weights and configuration in a pipeline's folder or in that of the denoiser alone."""
    index = path / "model_index.json"
    foreign = foreign_pipeline(str(read_json(index).get("_class_name", "")), "sana") if index.is_file() else None
    if foreign:
        raise UserError(f"{path} is {foreign}")
    folder = _inside(path, "transformer")
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} is no SANA folder: it has no folder transformer and no config.json")
    config = read_json(folder / "config.json")
    kind = config.get("_class_name", MODEL_CLASS)
    if kind != MODEL_CLASS:
        raise UserError(f"{folder} holds a {kind}, not a {MODEL_CLASS}")
    return part_file(folder), config


def layout(shapes: Shapes) -> dict[str, Any]:
    """The configuration of a file in published or diffusers names, without prefix."""
    fixed = shipped_config("sana")
    published = has(shapes, TEXTS[0])
    size = lambda name, diffusers, axes: shape_of(shapes, name if published else diffusers, axes)
    width, channels, patch, _ = size("x_embedder.proj.weight", "patch_embed.proj.weight", 4)
    inner = size("blocks.0.mlp.inverted_conv.conv.weight", "transformer_blocks.0.ff.conv_inverted.weight", 4)[0] // 2
    head = fixed["attention_head_dim"]
    cross = CROSS_HEADS.get(width, width // head)
    side = math.isqrt(shapes["pos_embed"][1]) if len(shapes.get("pos_embed", ())) == 3 else PLAIN_SIDE
    return {
        **fixed,
        "sample_size": side,
        "interpolation_scale": None if side <= PLAIN_SIDE else side / POSITION_SIDE,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": size("final_layer.linear.weight", "proj_out.weight", 2)[0] // patch**2,
        "num_layers": depth(shapes, "blocks.{}." if published else "transformer_blocks.{}."),
        "num_attention_heads": width // head,
        "num_cross_attention_heads": cross,
        "cross_attention_head_dim": width // cross,
        "cross_attention_dim": width,
        "caption_channels": size("y_embedder.y_proj.fc1.weight", "caption_projection.linear_1.weight", 2)[1],
        "mlp_ratio": (inner + 0.5) / width,  # exactly `inner` channels
        "qk_norm": "rms_norm_across_heads" if any(".q_norm." in n or ".norm_q." in n for n in shapes) else None,
    }


def sana_rules(module: Any) -> tuple[Rule, ...]:
    """The published names of a denoiser's tensors."""
    return expand(sana_names(len(module.transformer_blocks)), module.state_dict())


def build(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import SanaTransformer2DModel

    module: Any = SanaTransformer2DModel.from_config(dict(config))
    return module
