# SPDX-License-Identifier: Apache-2.0
"""The parts of a Stable Diffusion XL model: U-Net, VAE and two text encoders of a single file or a diffusers folder.

A single file holds no configuration: every width and count is read from the shapes, and configs/models/sdxl.json has
what is the same in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.families.sd import parts as sd_parts
from library.families.sd.names import UNET_PREFIX, unet_rules
from library.families.sd.unet_family import UnetParts
from library.families.sdxl.names import CLIP_G_PREFIX, CLIP_L_PREFIX
from library.families.sdxl.options import SDXLOptions
from library.key_tables import Shapes
from library.weights import kl_vae
from library.weights.clip_names import OPEN_CLIP_PROJECTION, PLAYGROUND_PROJECTION, clip_g_rules
from library.weights.loading import PIPELINE_FILES, Part, locate, own_names, part_file, read_json, shipped_config
from library.weights.sizes import below, depth, reading_sizes, shape_of
from library.weights.text_encoders import CLIP, CLIP_HEAD, EncoderPart, clip_encoder
from library.weights.weight_files import WeightFile

OPTION = "--pretrained_model_name_or_path"
CLIP_L, CLIP_G = "clip_l", "clip_g"
ENCODERS = {CLIP_L: "text_encoder", CLIP_G: "text_encoder_2"}  # folders of a pipeline
FOLDERS = ("unet", *ENCODERS.values())
MODEL_FILES = (*PIPELINE_FILES, *(f"{folder}/*.safetensors" for folder in (*FOLDERS, "vae")))
CLIP_L_FILE_PREFIX = CLIP_L_PREFIX.removesuffix("text_model.")
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"  # empty tensors by which some v-prediction models say what they are
TRANSFORMERS = "{}.1.transformer_blocks.{{}}."  # of an attention of the U-Net, by its block
ADDED_NUMBERS = 6  # of the size and crop that the U-Net is told


@dataclass(frozen=True, kw_only=True)
class SDXLParts(UnetParts):
    """Where each module comes from, and what the model says of itself."""

    is_v: bool  # whether the model says that it predicts v
    is_zero_snr: bool  # whether it says that its last timestep is pure noise


def marks(parts: SDXLParts) -> dict[str, Tensor]:
    """What says in a single file which kind of prediction a model was trained for."""
    found = {V_MARK: parts.is_v, ZERO_SNR_MARK: parts.is_zero_snr}
    return {name: torch.empty(0) for name, is_there in found.items() if is_there}


def open_parts(options: SDXLOptions) -> SDXLParts:
    """Reads headers and configurations only. Raises UserError for files of another architecture."""
    path = locate(options.pretrained_model_name_or_path or "", OPTION, MODEL_FILES)
    vae = locate(options.vae, "--vae", kl_vae.VAE_FILES) if options.vae else None
    with reading_sizes(path):
        edits = options.task == "edit"
        return _open_folder(path, vae, edits) if path.is_dir() else _open_file(path, vae, edits)


# ---- diffusers folder -----------------------------------------------------------------------------------------------


def _open_folder(path: Path, vae: Path | None, edits: bool) -> SDXLParts:
    sd_parts.check_folder(path, "sdxl", "SDXL", FOLDERS)
    defaults = shipped_config("sdxl")
    config = read_json(path / "unet" / "config.json")
    if config.get("addition_embed_type") != "text_time":
        raise UserError(f"{path} is no SDXL folder: its U-Net is not told the size of pictures (addition_embed_type)")
    sd_parts.check_channels(path, config, edits)
    scheduler = sd_parts.folder_scheduler(path, defaults["scheduler"])
    return SDXLParts(
        path=path,
        denoiser=sd_parts.unet_part(part_file(path / "unet"), "", config, own_names, edits),
        config=config,
        vae=kl_vae.vae_part(vae or path, defaults["vae"], needed=kl_vae.SDXL),
        encoders={
            name: clip_encoder(path / folder, option=OPTION, projection=name == CLIP_G, config=name)
            for name, folder in ENCODERS.items()
        },
        scheduler=scheduler,
        is_v=scheduler.get("prediction_type") == "v_prediction",
        is_zero_snr=bool(scheduler.get("rescale_betas_zero_snr")),
    )


# ---- single file ----------------------------------------------------------------------------------------------------


def _open_file(path: Path, vae: Path | None, edits: bool) -> SDXLParts:
    file, shapes = sd_parts.open_checkpoint(path, "sdxl", "SDXL")
    with reading_sizes(path, UNET_PREFIX):
        sd_parts.check_channels(path, sd_parts.input_channels(shapes), edits)
    if not any(name.startswith(CLIP_L_FILE_PREFIX) for name in file.shapes):
        raise UserError(f"{path} has no first text encoder inside (no weights below {CLIP_L_FILE_PREFIX})")
    defaults = shipped_config("sdxl")
    clip_g = open_clip_part(file)
    with reading_sizes(path, UNET_PREFIX):
        config = {**defaults["unet"], **sdxl_layout(shapes, clip_g.projected)}
    return SDXLParts(
        path=path,
        denoiser=sd_parts.unet_part(file, UNET_PREFIX, config, unet_rules, edits),
        config=config,
        vae=kl_vae.vae_part(vae, defaults["vae"], needed=kl_vae.SDXL)
        if vae
        else kl_vae.inner_part(file, defaults["vae"], kl_vae.SDXL),
        encoders={
            CLIP_L: clip_encoder(file, option=OPTION, projection=False, prefixes=(CLIP_L_FILE_PREFIX,), config=CLIP_L),
            CLIP_G: clip_g.encoder,
        },
        scheduler=defaults["scheduler"],
        is_v=V_MARK in file.shapes,
        is_zero_snr=ZERO_SNR_MARK in file.shapes,
    )


@dataclass(frozen=True)
class OpenClip:
    """CLIP-G in OpenCLIP's names, and how wide its pooled state is."""

    encoder: EncoderPart
    projected: int


def open_clip_part(file: WeightFile) -> OpenClip:
    """The second text encoder of a single file, a CLIPTextModelWithProjection."""
    shapes = below(file.shapes, CLIP_G_PREFIX)
    if not shapes:
        raise UserError(f"{file.path} has no second text encoder inside (no weights below {CLIP_G_PREFIX})")
    projection = next((n for n in (OPEN_CLIP_PROJECTION, PLAYGROUND_PROJECTION) if n in shapes), OPEN_CLIP_PROJECTION)
    with reading_sizes(file.path, CLIP_G_PREFIX):
        config = {**shipped_config(CLIP_G), **open_clip_layout(shapes, projection)}
    part = Part(
        CLIP,
        file,
        CLIP_G_PREFIX,
        partial(_build_clip_g, config),
        partial(clip_g_rules, projection=projection),
        f"{config['hidden_act']} {config['num_attention_heads']} {config['eos_token_id']}",
    )
    return OpenClip(EncoderPart.of_clip(part, config), config["projection_dim"])


def _build_clip_g(config: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(config)))


# ---- configurations from shapes -------------------------------------------------------------------------------------


def open_clip_layout(shapes: Shapes, projection: str) -> dict[str, Any]:
    """The part of CLIP-G's config that the shapes tell. All blocks of the file are used, unlike in SD 2.x."""
    vocabulary, width = shape_of(shapes, "token_embedding.weight", 2)
    outputs = shape_of(shapes, projection, 2)[0 if projection == PLAYGROUND_PROJECTION else 1]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": depth(shapes, sd_parts.OPEN_CLIP_BLOCKS),
        "num_attention_heads": max(1, width // CLIP_HEAD),
        "max_position_embeddings": shape_of(shapes, "positional_embedding", 2)[0],
        "projection_dim": outputs,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def sdxl_layout(shapes: Shapes, pooled: int) -> dict[str, Any]:
    """The part of the U-Net's config that the shapes tell. pooled: width of CLIP-G's pooled state."""
    config = sd_parts.unet_layout(shapes, version=2)  # with the heads counted as in SD 2.x
    added = shape_of(shapes, "label_emb.0.0.weight", 2)[1]
    return config | {
        "transformer_layers_per_block": _transformer_layers(shapes),
        "addition_time_embed_dim": (added - pooled) // ADDED_NUMBERS,
        "projection_class_embeddings_input_dim": added,
    }


def _transformer_layers(shapes: Shapes) -> list[int]:
    """How deep the attention of each level is; 1 where there is none. The middle is as deep as the last level."""
    levels = [[f"input_blocks.{index}" for index in own] for own in sd_parts.input_levels(shapes)]
    levels[-1].append("middle_block")
    return [max(1, depth(shapes, *(TRANSFORMERS.format(block) for block in own))) for own in levels]
