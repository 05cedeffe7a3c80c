# SPDX-License-Identifier: Apache-2.0
"""The parts of HunyuanImage-2.1: denoiser, Qwen2.5-VL, ByT5 and VAE, each from its own file or folder or the model's.

A single file has no configuration. configs/models/hunyuan_image.json has what all models share; widths, heads and
counts are read from the shapes, so models of other sizes load too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from library.errors import UserError, raise_problems
from library.families.detect import PREFIXES
from library.families.family import ModelParts
from library.families.hunyuan_image import BYT5, QWEN
from library.families.hunyuan_image.forward import use_device_masks
from library.families.hunyuan_image.names import hunyuan_names, in_comfy_names, split_apart
from library.families.hunyuan_image.options import HunyuanImageOptions
from library.families.own_files import require_own_file, require_own_folder
from library.key_tables import ModuleName, Rule, Shapes, expand
from library.weights.hunyuan_vae import NEEDED, vae_part
from library.weights.language_models import language_encoder
from library.weights.loading import PIPELINE_FILES, Part, locate, part_file, read_json, shipped_config
from library.weights.sizes import SizeError, below, depth, has, reading_sizes, shape_of
from library.weights.text_encoders import t5_encoder
from library.weights.weight_files import open_weights

UNREAD_LAYERS = 2  # of Qwen2.5-VL, the last ones
MODEL_CLASS = "HunyuanImageTransformer2DModel"
PUBLISHED_DEPTHS = {3584: {"num_layers": 20, "num_single_layers": 40}}
MODEL_FILES = (*PIPELINE_FILES, "transformer/*.safetensors", "diffusion_pytorch_model*.safetensors")
# part -> its option, and its folder in a pipeline
SOURCES = {
    QWEN: ("--text_encoder", "text_encoder"),
    BYT5: ("--byt5", "text_encoder_2"),
    "vae": ("--vae", "vae"),
}


@dataclass(frozen=True, kw_only=True)
class HunyuanImageParts(ModelParts):
    """Where each module comes from."""

    places: Mapping[str, Path]  # file or folder of each of SOURCES


def open_parts(options: HunyuanImageOptions) -> HunyuanImageParts:
    """Read headers and configurations only. Of a hub id, only parts that no other option gives are downloaded.

    Raises UserError for files of another kind and for parts that are neither given nor in the model.
    """
    given = {QWEN: options.text_encoder, BYT5: options.byt5, "vae": options.vae}
    wanted = [f"{folder}/*.safetensors" for name, (_, folder) in SOURCES.items() if not given[name]]
    path = locate(
        options.pretrained_model_name_or_path or "", "--pretrained_model_name_or_path", (*MODEL_FILES, *wanted)
    )
    denoiser, config = _denoiser(path)
    places = {name: _place(path, given[name], *SOURCES[name]) for name in SOURCES}
    missing = (SOURCES[name][0] for name, place in places.items() if not place.exists())
    raise_problems(f"{option} is missing: {path} has none inside" for option in missing)
    whole = language_encoder("qwen2.5_vl", places[QWEN], option="--text_encoder")
    layers = max(1, whole.layers - UNREAD_LAYERS)
    encoders = {
        QWEN: language_encoder("qwen2.5_vl", places[QWEN], option="--text_encoder", layers=layers),
        BYT5: t5_encoder(places[BYT5], option="--byt5"),
    }
    vae = vae_part(places["vae"], "--vae")
    return HunyuanImageParts(path=path, denoiser=denoiser, config=config, vae=vae, encoders=encoders, places=places)


def _place(model: Path, given: str | None, option: str, folder: str) -> Path:
    """The file or folder of a part: the given one, else its folder in the model, which may not exist."""
    if not given:
        return model / folder
    place = locate(given, option, (f"{folder}/*", "*.safetensors*", "*.json"))
    return place / folder if (place / folder).is_dir() else place


# ---- denoiser -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Naming:
    """One way to name the weights in a file: beginnings of the names from which sizes are read."""

    picture: str = "img_in."
    double: str = "double_blocks.{}."
    single: str = "single_blocks.{}."
    refiner: str = "txt_in.individual_token_refiner.blocks.{}."
    guidance: str = "guidance_in."
    end: str = "time_r_in."  # embeds the time at which a step ends
    made_of: Callable[[Iterable[ModuleName]], Iterable[ModuleName]] = list  # the published table


NAMINGS = {
    "published": Naming(),
    "split": Naming(made_of=split_apart),
    "comfy": Naming(made_of=in_comfy_names),
    "diffusers": Naming(
        "x_embedder.",
        "transformer_blocks.{}.",
        "single_transformer_blocks.{}.",
        "context_embedder.token_refiner.refiner_blocks.{}.",
        "time_guidance_embed.guidance_embedder.",
        "time_guidance_embed.timestep_embedder_r.",
        lambda table: (ModuleName(own, (own,)) for name in table for own in name.ours),
    ),
}


def _denoiser(path: Path) -> tuple[Part, dict[str, Any]]:
    """The denoiser of a file or folder, and its configuration."""
    own: dict[str, Any] = {}
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if path.is_dir():
        require_own_folder(path, "hunyuan_image")
        own = read_json(folder / "config.json")
        if own.get("_class_name", MODEL_CLASS) != MODEL_CLASS:
            raise UserError(f"{folder} holds a {own['_class_name']}, not a {MODEL_CLASS}")
    file = part_file(folder) if path.is_dir() else open_weights(path)
    require_own_file(file, "hunyuan_image")
    with reading_sizes(file.path):
        prefix, naming = _naming(file.shapes)
    with reading_sizes(file.path, prefix):
        config = {**shipped_config("hunyuan_image"), **layout(below(file.shapes, prefix), naming), **own}
        patch = tuple(config["patch_size"])
    if patch != (1, 1):
        raise UserError(f"{file.path} is another model of this design: a token of it is not one latent pixel")
    if config["in_channels"] != NEEDED.channels:
        raise UserError(
            f"{file.path} is another model of this design: it reads {config['in_channels']} channels, not "
            f"{NEEDED.channels}"
        )
    build, rules = partial(build_denoiser, config), partial(denoiser_rules, naming=naming)
    part = Part("denoiser", file, prefix, build, rules, published_depths=PUBLISHED_DEPTHS)
    return part, config


def _naming(shapes: Shapes) -> tuple[str, str]:
    """The prefix of the names in a file, and which of NAMINGS they follow."""
    for prefix in ("", *PREFIXES):
        names = below(shapes, prefix)
        if has(names, NAMINGS["diffusers"].picture):
            return prefix, "diffusers"
        if has(names, NAMINGS["published"].picture):
            if any(".query_norm." in name for name in names):
                return prefix, "comfy"
            return prefix, "split" if any(".linear1_q." in name for name in names) else "published"
    raise SizeError("is incomplete: it lacks", f"{NAMINGS['published'].picture}proj.weight")


def layout(shapes: Shapes, naming: str) -> dict[str, Any]:
    """The part of the configuration that the shapes of a file without prefix tell. naming: one of NAMINGS."""
    names = NAMINGS[naming]
    rows = {row.ours[0]: row.published for row in names.made_of(hunyuan_names(1, 1, 1))}

    def size(module: str, axes: int) -> tuple[int, ...]:
        """The shape of a module's weight, or of a tensor, under its name in diffusers."""
        return shape_of(shapes, rows[module] if module.endswith(".weight") else f"{rows[module]}.weight", axes)

    hidden, channels, *patch = size("x_embedder.proj", len(shapes.get(f"{rows['x_embedder.proj']}.weight", range(4))))
    (head,) = size("transformer_blocks.0.attn.norm_q.weight", 1)
    return {
        "in_channels": channels,
        "out_channels": size("proj_out", 2)[0],
        "patch_size": patch,
        "num_layers": depth(shapes, names.double),
        "num_single_layers": depth(shapes, names.single),
        "num_refiner_layers": depth(shapes, names.refiner),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "text_embed_dim": size("context_embedder.proj_in", 2)[1],
        "text_embed_2_dim": size("context_embedder_2.linear_1", 2)[1],
        "rope_axes_dim": [head // 2, head // 2],
        "guidance_embeds": has(shapes, names.guidance),
        "use_meanflow": has(shapes, names.end),
    }


def build_denoiser(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import HunyuanImageTransformer2DModel

    module: Any = HunyuanImageTransformer2DModel.from_config(dict(config))
    use_device_masks(module)
    return module


def denoiser_rules(module: Any, naming: str = "published") -> tuple[Rule, ...]:
    """The names of a denoiser's tensors in a file. naming: one of NAMINGS."""
    config, tensors = module.config, module.state_dict()
    table = hunyuan_names(config.num_layers, config.num_single_layers, config.num_refiner_layers)
    return expand(NAMINGS[naming].made_of(table), tensors)
