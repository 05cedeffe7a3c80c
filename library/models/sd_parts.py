# SPDX-License-Identifier: Apache-2.0
"""The parts of a Stable Diffusion 1.x / 2.x model: U-Net, VAE and text encoder of a single file or a diffusers folder.

A single file holds no configuration: version 1 or 2 gives configs/models/sd1.json or sd2.json, and every width and
count is read from the shapes, so that models of other sizes load too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from library.errors import UserError
from library.models import kl_vae
from library.models.detect import context_dim, foreign_file, foreign_pipeline
from library.models.loading import Part, own_names, part_file, read_json, shipped_config
from library.models.weight_files import WeightFile, open_weights
from library.names.keys import Shapes
from library.names.sd import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    clip_rules,
    open_clip_rules,
    unet_rules,
)

CONTEXT_DIMS = {768: 1, 1024: 2}
CUT_OPEN_CLIP_BLOCKS = 23  # files that left out the last block already; whole ones have 24
HEAD_DIM = 64  # of the attention heads of SD 2.x's U-Net and of both text encoders


@dataclass(frozen=True)
class SDParts:
    """Where each module comes from. `scheduler` is the noise schedule's configuration."""

    path: Path
    version: int
    unet: Part
    vae: Part
    text_encoder: Part
    text_layers: int
    text_vocabulary: int  # rows of the token embedding
    text_width: int  # of the states
    scheduler: Mapping[str, Any]


def open_parts(path: Path, *, version: int, vae: Path | None) -> SDParts:
    """Reads headers and configurations only. Raises UserError for files of another architecture or version."""
    try:
        return _open_folder(path, version, vae) if path.is_dir() else _open_file(path, version, vae)
    except KeyError as error:  # a size is read from a weight or an entry of config.json that is not there
        raise UserError(f"{path} is incomplete: it lacks {error.args[0]}") from None


# ---- diffusers folder -----------------------------------------------------------------------------------------------


def _open_folder(path: Path, version: int, vae: Path | None) -> SDParts:
    _check_folder(path)
    defaults = shipped_config(f"sd{version}")
    unet_config = read_json(path / "unet" / "config.json")
    _check_version(str(path), CONTEXT_DIMS.get(unet_config.get("cross_attention_dim", 0)), version)
    _check_channels(str(path), unet_config.get("in_channels", 4))
    text_file = part_file(path / "text_encoder")
    text_config = read_json(path / "text_encoder" / "config.json")
    prefix = "text_model." if any(name.startswith("text_model.") for name in text_file.shapes) else ""
    scheduler_file = path / "scheduler" / "scheduler_config.json"
    return SDParts(
        path,
        version,
        unet=Part("U-Net", part_file(path / "unet"), "", lambda: build_unet(unet_config), own_names),
        vae=kl_vae.vae_part(vae or path, defaults["vae"]),
        text_encoder=Part("text encoder", text_file, prefix, lambda: build_text_encoder(text_config), clip_rules),
        text_layers=text_config["num_hidden_layers"],
        text_vocabulary=text_config["vocab_size"],
        text_width=text_config["hidden_size"],
        scheduler=read_json(scheduler_file) if scheduler_file.is_file() else defaults["scheduler"],
    )


def _check_folder(path: Path) -> None:
    index = path / "model_index.json"
    pipeline = str(read_json(index).get("_class_name", "")) if index.is_file() else ""
    foreign = foreign_pipeline(pipeline)
    if foreign:
        raise UserError(f"{path} is {foreign}")
    missing = [part for part in ("unet", "text_encoder") if not (path / part).is_dir()]
    if missing:
        raise UserError(f"{path} is no Stable Diffusion folder: {' and '.join(missing)} missing there")


# ---- single file ----------------------------------------------------------------------------------------------------


def _open_file(path: Path, version: int, vae: Path | None) -> SDParts:
    file = open_weights(path)
    foreign = foreign_file(file.shapes)
    if foreign:
        raise UserError(f"{path} is {foreign}")
    unet_shapes = _below(file.shapes, UNET_PREFIX)
    if "input_blocks.0.0.weight" not in unet_shapes:
        raise UserError(f"{path} has no weights below {UNET_PREFIX}; a whole Stable Diffusion checkpoint is needed")
    _check_version(str(path), _file_version(file.shapes), version)
    _check_channels(str(path), unet_shapes["input_blocks.0.0.weight"][1])
    defaults = shipped_config(f"sd{version}")
    unet_config = {**defaults["unet"], **unet_layout(unet_shapes, version)}
    text_encoder, text_config = _text_part(file, version, defaults["text_encoder"])
    return SDParts(
        path,
        version,
        unet=Part("U-Net", file, UNET_PREFIX, lambda: build_unet(unet_config), unet_rules),
        vae=kl_vae.vae_part(vae, defaults["vae"]) if vae else kl_vae.published_part(file, defaults["vae"]),
        text_encoder=text_encoder,
        text_layers=text_config["num_hidden_layers"],
        text_vocabulary=text_config["vocab_size"],
        text_width=text_config["hidden_size"],
        scheduler=defaults["scheduler"],
    )


def _text_part(file: WeightFile, version: int, defaults: Mapping[str, Any]) -> tuple[Part, dict[str, Any]]:
    if version == 2:
        prefix, rules, layout = OPEN_CLIP_PREFIX, open_clip_rules, open_clip_layout
    else:
        prefix, rules, layout = _clip_prefix(file.shapes), clip_rules, clip_layout
    shapes = _below(file.shapes, prefix)
    if not shapes:
        raise UserError(f"{file.path} has no text encoder inside (no weights below {prefix})")
    config = {**defaults, **layout(shapes)}
    return Part("text encoder", file, prefix, lambda: build_text_encoder(config), rules), config


def _clip_prefix(shapes: Shapes) -> str:
    """Some old files leave out the `text_model.` level."""
    with_level = any(name.startswith(CLIP_PREFIX) for name in shapes)
    return CLIP_PREFIX if with_level else CLIP_PREFIX.removesuffix("text_model.")


def _below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}


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


def _check_channels(path: str, channels: int) -> None:
    if channels != 4:
        raise UserError(
            f"{path} is an inpainting or edit model ({channels} input channels, not 4): it cannot be trained here"
        )


# ---- configurations from shapes -------------------------------------------------------------------------------------


def unet_layout(shapes: Shapes, version: int) -> dict[str, Any]:
    """The part of the U-Net's config that the shapes tell. Published names, without prefix."""
    widths: list[int] = []
    layers: list[int] = []
    attends: list[bool] = []
    index, starts_level = 1, True
    while True:
        resnet, attention = f"input_blocks.{index}.0.in_layers.2.weight", f"input_blocks.{index}.1.norm.weight"
        if f"input_blocks.{index}.0.op.weight" in shapes:
            starts_level = True
        elif resnet in shapes:
            if starts_level:
                widths, layers, attends = [*widths, 0], [*layers, 0], [*attends, False]
                starts_level = False
            widths[-1], layers[-1], attends[-1] = shapes[resnet][0], layers[-1] + 1, attention in shapes
        else:
            break
        index += 1
    result: dict[str, Any] = {
        "block_out_channels": widths,
        "layers_per_block": layers[0] if layers else 0,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "cross_attention_dim": context_dim(shapes),
        "use_linear_projection": _projects_linearly(shapes),
    }
    if version == 2:
        result["attention_head_dim"] = [max(1, width // HEAD_DIM) for width in widths]  # diffusers: heads per level
    return result


def _projects_linearly(shapes: Shapes) -> bool:
    return any(len(shape) == 2 for name, shape in shapes.items() if name.endswith(".proj_in.weight"))


def clip_layout(shapes: Shapes) -> dict[str, Any]:
    """The part of the config of SD 1.x's text encoder that the shapes tell."""
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    return {
        **_text_layout(vocabulary, width, shapes["encoder.layers.0.mlp.fc1.weight"][0]),
        "num_hidden_layers": _count(shapes, "encoder.layers.{}.mlp.fc1.weight"),
        "pad_token_id": vocabulary - 1,
    }


def open_clip_layout(shapes: Shapes) -> dict[str, Any]:
    """The same for SD 2.x. The last block of the file is left out: the model was trained on the output before it."""
    vocabulary, width = shapes["token_embedding.weight"]
    blocks = _count(shapes, "transformer.resblocks.{}.mlp.c_fc.weight")
    return {
        **_text_layout(vocabulary, width, shapes["transformer.resblocks.0.mlp.c_fc.weight"][0]),
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


def _count(shapes: Shapes, name: str) -> int:
    count = 0
    while name.format(count) in shapes:
        count += 1
    return count


# ---- modules --------------------------------------------------------------------------------------------------------


def build_unet(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    module: Any = UNet2DConditionModel.from_config(dict(config))
    return module


def build_text_encoder(config: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))
