# SPDX-License-Identifier: Apache-2.0
"""The parts of a Stable Diffusion 1.x / 2.x model: U-Net, VAE and text encoder of a single file or a diffusers folder.

A single file holds no configuration: version 1 or 2 gives configs/models/sd1.json or sd2.json, and every width and
count is read from the shapes, so that models of other sizes load too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from library.errors import UserError
from library.families.detect import context_dim
from library.families.own_files import require_own_file, require_own_folder
from library.families.sd.editing import grow_input
from library.families.sd.names import CLIP_PREFIX, OPEN_CLIP_PREFIX, UNET_PREFIX, unet_rules
from library.families.sd.unet_family import UnetParts
from library.key_tables import Rule, Shapes
from library.weights import kl_vae
from library.weights.clip_names import clip_rules, open_clip_rules
from library.weights.grown_input import EDIT_CHANNELS, LATENT_CHANNELS
from library.weights.loading import Part, own_names, part_file, read_json, shipped_config
from library.weights.sizes import SizeError, below, depth, has, reading_sizes, shape_of
from library.weights.text_encoders import EncoderPart
from library.weights.weight_files import WeightFile, open_weights

ENCODER = "clip"  # name of the text encoder in Tokens
CONTEXT_DIMS = {768: 1, 1024: 2}
OPEN_CLIP_BLOCKS = "transformer.resblocks.{}."
CUT_OPEN_CLIP_BLOCKS = 23  # files that left out the last block already; whole ones have 24
HEAD_DIM = 64  # of the attention heads of SD 2.x's U-Net and of both text encoders


def open_parts(path: Path, *, version: int, vae: Path | None, edits: bool = False) -> UnetParts:
    """Reads headers and configurations only. Raises UserError for files of another architecture or version.

    edits: the U-Net reads a reference picture; one of a file that does not is made to.
    """
    with reading_sizes(path):
        return _open_folder(path, version, vae, edits) if path.is_dir() else _open_file(path, version, vae, edits)


# ---- diffusers folder -----------------------------------------------------------------------------------------------


def _open_folder(path: Path, version: int, vae: Path | None, edits: bool) -> UnetParts:
    check_folder(path, "sd", "Stable Diffusion", ("unet", "text_encoder"))
    defaults = shipped_config(f"sd{version}")
    unet_config = read_json(path / "unet" / "config.json")
    _check_version(str(path), CONTEXT_DIMS.get(unet_config.get("cross_attention_dim", 0)), version)
    check_channels(path, unet_config, edits)
    text_file = part_file(path / "text_encoder")
    text_config = read_json(path / "text_encoder" / "config.json")
    prefix = "text_model." if any(name.startswith("text_model.") for name in text_file.shapes) else ""
    text_encoder = Part("text encoder", text_file, prefix, partial(build_text_encoder, text_config), clip_rules)
    return UnetParts(
        path=path,
        denoiser=unet_part(part_file(path / "unet"), "", unet_config, own_names, edits),
        config=unet_config,
        vae=kl_vae.vae_part(vae or path, defaults["vae"], needed=kl_vae.SD),
        encoders={ENCODER: EncoderPart.of_clip(text_encoder, text_config)},
        scheduler=folder_scheduler(path, defaults["scheduler"]),
    )


def check_folder(path: Path, family: str, title: str, folders: Sequence[str]) -> None:
    """Raises UserError for a pipeline of another family, and for one that lacks a folder."""
    require_own_folder(path, family)
    missing = [part for part in folders if not (path / part).is_dir()]
    if missing:
        raise UserError(f"{path} is no {title} folder: {' and '.join(missing)} missing there")


def folder_scheduler(path: Path, default: dict[str, Any]) -> dict[str, Any]:
    """The noise schedule of a pipeline, or `default`."""
    file = path / "scheduler" / "scheduler_config.json"
    return read_json(file) if file.is_file() else default


# ---- single file ----------------------------------------------------------------------------------------------------


def _open_file(path: Path, version: int, vae: Path | None, edits: bool) -> UnetParts:
    file, unet_shapes = open_checkpoint(path, "sd", "Stable Diffusion")
    _check_version(str(path), _file_version(file.shapes), version)
    defaults = shipped_config(f"sd{version}")
    with reading_sizes(path, UNET_PREFIX):
        check_channels(path, input_channels(unet_shapes), edits)
        unet_config = {**defaults["unet"], **unet_layout(unet_shapes, version)}
    return UnetParts(
        path=path,
        denoiser=unet_part(file, UNET_PREFIX, unet_config, unet_rules, edits),
        config=unet_config,
        vae=kl_vae.vae_part(vae, defaults["vae"], needed=kl_vae.SD)
        if vae
        else kl_vae.inner_part(file, defaults["vae"], kl_vae.SD),
        encoders={ENCODER: _text_part(file, version, defaults["text_encoder"])},
        # the noise of all of them is the same; what a model predicts, a single file does not say
        scheduler={key: value for key, value in defaults["scheduler"].items() if key != "prediction_type"},
    )


def open_checkpoint(path: Path, family: str, title: str) -> tuple[WeightFile, Shapes]:
    """A single file, and the shapes of its U-Net. Raises UserError for other files."""
    file = open_weights(path)
    require_own_file(file, family)
    shapes = below(file.shapes, UNET_PREFIX)
    if not has(shapes, "input_blocks."):
        raise UserError(f"{path} has no weights below {UNET_PREFIX}; a whole {title} checkpoint is needed")
    return file, shapes


def _text_part(file: WeightFile, version: int, defaults: Mapping[str, Any]) -> EncoderPart:
    if version == 2:
        prefix, rules, layout = OPEN_CLIP_PREFIX, open_clip_rules, open_clip_layout
    else:
        prefix, rules, layout = _clip_prefix(file.shapes), clip_rules, clip_layout
    shapes = below(file.shapes, prefix)
    if not shapes:
        raise UserError(f"{file.path} has no text encoder inside (no weights below {prefix})")
    with reading_sizes(file.path, prefix):
        config = {**defaults, **layout(shapes)}
        spare = spare_block(shapes, config["num_hidden_layers"]) if version == 2 else ""
    part = Part("text encoder", file, prefix, partial(build_text_encoder, config), rules, spare=spare)
    return EncoderPart.of_clip(part, config)


def spare_block(shapes: Shapes, used: int) -> str:
    """The start of the names of OpenCLIP's last block, which no picture depends on. Raises SizeError for a part of it.

    used: how many blocks are read. Empty when the file has no more than these.
    """
    last, first = f"{OPEN_CLIP_BLOCKS.format(used)}", OPEN_CLIP_BLOCKS.format(0)
    if not has(shapes, last):
        return ""
    lost = [name for own in below(shapes, first) if (name := last + own) not in shapes]
    if lost:
        raise SizeError("is incomplete: it lacks", lost[0])
    return last


def _clip_prefix(shapes: Shapes) -> str:
    """Some old files leave out the `text_model.` level."""
    with_level = any(name.startswith(CLIP_PREFIX) for name in shapes)
    return CLIP_PREFIX if with_level else CLIP_PREFIX.removesuffix("text_model.")


def _file_version(shapes: Shapes) -> int | None:
    """1 or 2, by the layout of the text encoder, else by the width that the U-Net attends to."""
    if any(name.startswith(OPEN_CLIP_PREFIX) for name in shapes):
        return 2
    if any(name.startswith(CLIP_PREFIX.removesuffix("text_model.")) for name in shapes):
        return 1
    return CONTEXT_DIMS.get(context_dim(shapes) or 0)


def _check_version(path: str, found: int | None, asked: int) -> None:
    if found == 2 and asked == 1:
        raise UserError(
            f"{path} is a Stable Diffusion 2.x model: add --v2 (and --v_parameterization if it is a 768-v one)"
        )
    if found == 1 and asked == 2:
        raise UserError(f"{path} is a Stable Diffusion 1.x model: leave out --v2")


def check_channels(path: Path, config: Mapping[str, Any], edits: bool) -> None:
    """Raises UserError for a U-Net that reads more than noised latents, and with `edits` a reference picture."""
    channels = config.get("in_channels", LATENT_CHANNELS)
    if channels == EDIT_CHANNELS and not edits:
        raise UserError(f"{path} is an edit model ({channels} input channels): add --task edit")
    if channels not in (LATENT_CHANNELS, EDIT_CHANNELS):
        raise UserError(f"{path} is an inpainting model ({channels} input channels, not 4): it cannot be trained here")


# ---- configurations from shapes -------------------------------------------------------------------------------------


def input_channels(shapes: Shapes) -> dict[str, int]:
    """The part of the U-Net's config about its input. Published names, without prefix."""
    return {"in_channels": shape_of(shapes, "input_blocks.0.0.weight", 4)[1]}


def unet_layout(shapes: Shapes, version: int) -> dict[str, Any]:
    """The part of the U-Net's config that the shapes tell. Published names, without prefix."""
    levels = input_levels(shapes)
    widths = [shape_of(shapes, f"input_blocks.{own[-1]}.0.in_layers.2.weight", 4)[0] for own in levels]
    layers = [len(own) for own in levels]
    attends = [any(has(shapes, f"input_blocks.{index}.1.") for index in own) for own in levels]
    result: dict[str, Any] = {
        **input_channels(shapes),
        "block_out_channels": widths,
        "layers_per_block": max(layers, default=0),
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "cross_attention_dim": context_dim(shapes),
        "use_linear_projection": any(len(s) == 2 for name, s in shapes.items() if name.endswith(".proj_in.weight")),
    }
    if version == 2:
        result["attention_head_dim"] = [max(1, width // HEAD_DIM) for width in widths]  # diffusers: heads per level
    return result


def input_levels(shapes: Shapes) -> list[list[int]]:
    """The numbers of the input blocks with residual blocks, level by level. Raises SizeError where one is missing."""
    levels: list[list[int]] = [[]]
    # blocks are unlike each other, so any tensor of one counts; the first of them is a convolution
    kinds: dict[int, str] = {}
    for found in filter(None, map(re.compile(r"input_blocks\.(\d{1,6})\.(0\.op\.|0\.)").match, shapes)):
        kinds[int(found[1])] = found[2]
    for index in range(1, max(kinds, default=0) + 1):
        if index not in kinds:
            start = f"input_blocks.{min(number for number in kinds if number > index)}."
            later = next(name for name in shapes if name.startswith(start))
            raise SizeError("is incomplete: it has", later, f", and lacks input_blocks.{index}.0.*")
        if kinds[index] == "0.op.":
            levels.append([])
        else:
            levels[-1].append(index)
    return [own for own in levels if own]


def clip_layout(shapes: Shapes) -> dict[str, Any]:
    """The part of the config of SD 1.x's text encoder that the shapes tell."""
    vocabulary, width = shape_of(shapes, "embeddings.token_embedding.weight", 2)
    return {
        **_text_layout(vocabulary, width, shape_of(shapes, "encoder.layers.0.mlp.fc1.weight", 2)[0]),
        "num_hidden_layers": depth(shapes, "encoder.layers.{}."),
        "pad_token_id": vocabulary - 1,
    }


def open_clip_layout(shapes: Shapes) -> dict[str, Any]:
    """The part of the config of SD 2.x's text encoder that the shapes tell, without the last block of the file.

    The model was trained on the output of the block before it.
    """
    vocabulary, width = shape_of(shapes, "token_embedding.weight", 2)
    blocks = depth(shapes, OPEN_CLIP_BLOCKS)
    return {
        **_text_layout(vocabulary, width, shape_of(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0]),
        "num_hidden_layers": blocks if blocks == CUT_OPEN_CLIP_BLOCKS else blocks - 1,
    }


def _text_layout(vocabulary: int, width: int, inner: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": max(1, width // HEAD_DIM),
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


# ---- modules --------------------------------------------------------------------------------------------------------


def unet_part(
    file: WeightFile,
    prefix: str,
    config: Mapping[str, Any],
    rules: Callable[[nn.Module], tuple[Rule, ...]],
    edits: bool,
) -> Part:
    """The U-Net in a file. edits: made to read a reference picture, if it does not."""
    grows = edits and config.get("in_channels", LATENT_CHANNELS) == LATENT_CHANNELS
    return Part("U-Net", file, prefix, partial(build_unet, config), rules, finish=grow_input if grows else None)


def build_unet(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(dict(config))


def build_text_encoder(config: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))
