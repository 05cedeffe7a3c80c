# SPDX-License-Identifier: Apache-2.0
"""The parts of Anima: transformer with LLM adapter, Qwen3-0.6B and the VAE of Qwen-Image, from files or folders.

A single file has no configuration. configs/models/anima.json has what all models share; widths, heads and counts are
read from the shapes, so models of other sizes load too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from library.errors import UserError, raise_problems
from library.families.anima.modules import build_denoiser
from library.families.anima.names import ADAPTER, CONDITIONER, anima_names
from library.families.anima.options import TOKEN_LENGTH, AnimaOptions
from library.families.family import ModelParts
from library.families.own_files import class_named, require_own_file, require_own_folder
from library.key_tables import Rule, Shapes, expand
from library.weights.kl_vae import VAE_FILES
from library.weights.language_models import language_encoder
from library.weights.loading import PIPELINE_FILES, Part, locate, own_names, part_file, read_json, shipped_config
from library.weights.qwen_vae import qwen_vae_part
from library.weights.sizes import below, depth, has, reading_sizes, shape_of
from library.weights.weight_files import JoinedFile, WeightFile, open_weights

QWEN3 = "qwen3"  # name of the text encoder, and of its states in a Cond: (B, length, width)
LATENT_CHANNELS = 16
PREFIXES = ("net.", "model.diffusion_model.", "diffusion_model.", "")
ADAPTER_PREFIXES = (*(f"{prefix}{ADAPTER}." for prefix in PREFIXES), "")  # in a file of --llm_adapter_path
QWEN3_PREFIX = "text_encoders.qwen3_06b.transformer."
TRANSFORMER_CLASS, CONDITIONER_CLASS = "CosmosTransformer3DModel", "AnimaTextConditioner"
# Entries of their config.json that are read here
TRANSFORMER_KEYS = ("in_channels", "attention_head_dim", "text_embed_dim")
CONDITIONER_KEYS = ("source_dim", "target_dim", "target_vocab_size")
MODEL_FILES = (*PIPELINE_FILES, "transformer/*.safetensors", f"{CONDITIONER}/*.safetensors")
QWEN3_FILES = ("text_encoder/*.safetensors", "*.safetensors", "*/*.json", "*.json", "*/*.txt", "*.txt")
EXTRAS = (r"pos_embedder\..+",)  # tables of positions, which the model computes itself
PUBLISHED_DEPTHS = {2048: {"num_layers": 28}}


@dataclass(frozen=True, kw_only=True)
class AnimaParts(ModelParts):
    """Where each module comes from."""

    conditioner: Mapping[str, Any]  # configuration of the text conditioner
    qwen3_path: Path


def open_parts(options: AnimaOptions) -> AnimaParts:
    """Read headers and configurations only. Raises UserError for files of another kind and for missing parts."""
    path = _locate_model(options)
    adapter = locate(options.llm_adapter_path, "--llm_adapter_path", MODEL_FILES) if options.llm_adapter_path else None
    denoiser, transformer, conditioner = _denoiser(path, adapter, options)
    raise_problems(_missing(path, options))
    qwen3 = _inside(locate(options.qwen3, "--qwen3", QWEN3_FILES) if options.qwen3 else path, "text_encoder")
    vae = locate(options.vae, "--vae", VAE_FILES) if options.vae else path
    encoder = language_encoder("qwen3", qwen3, option="--qwen3", prefixes=("", QWEN3_PREFIX))
    return AnimaParts(
        path=path, denoiser=denoiser, config=transformer, conditioner=conditioner, vae=qwen_vae_part(vae),
        encoders={QWEN3: encoder}, qwen3_path=qwen3,
    )  # fmt: skip


def _locate_model(options: AnimaOptions) -> Path:
    """File or folder of the model. Of a hub repository, only what is not given by another option is downloaded."""
    files = list(MODEL_FILES)
    files += [] if options.qwen3 else ["text_encoder/*.safetensors"]
    files += [] if options.vae else ["vae/*.safetensors"]
    return locate(options.pretrained_model_name_or_path or "", "--pretrained_model_name_or_path", files)


def _missing(path: Path, options: AnimaOptions) -> Iterator[str]:
    """A line for each part that is neither given nor in the model."""
    wanted = (
        ("--qwen3", options.qwen3, "text_encoder", "Qwen3-0.6B: give its file or folder"),
        ("--vae", options.vae, "vae", "VAE: give the file of Qwen-Image's (qwen_image_vae.safetensors)"),
    )
    for option, given, folder, what in wanted:
        if not given and not (path / folder).is_dir():
            yield f"{option} is missing: {path} has no {what}"


def _inside(path: Path, folder: str) -> Path:
    return path / folder if (path / folder).is_dir() else path


# ---- denoiser -------------------------------------------------------------------------------------------------------


def _denoiser(path: Path, adapter: Path | None, options: AnimaOptions) -> tuple[Part, dict[str, Any], dict[str, Any]]:
    """The denoiser, and the configurations of its two models. adapter: of --llm_adapter_path."""
    if path.is_dir():
        return _folders(path, adapter, options)
    file = open_weights(path)
    require_own_file(file, "anima")
    if has(file.shapes, "transformer_blocks.", f"{CONDITIONER}."):
        raise UserError(f"{path} has the names of diffusers: give the folder that holds transformer and {CONDITIONER}")
    prefix = next((prefix for prefix in PREFIXES if has(file.shapes, f"{prefix}blocks.")), "")
    if adapter is not None:
        file = JoinedFile(path, {f"{prefix}{ADAPTER}.": _adapter(adapter), "": (file, "")})
    shapes = below(file.shapes, prefix)
    if not has(shapes, f"{ADAPTER}."):
        raise UserError(f"{path} has no LLM adapter ({ADAPTER}.*): give its file with --llm_adapter_path")
    with reading_sizes(path, prefix):
        transformer = layout(shapes)
    if (channels := transformer["in_channels"]) != LATENT_CHANNELS:
        raise UserError(f"{path} is another model of this design: it reads {channels} channels, not {LATENT_CHANNELS}")
    with reading_sizes(file.source(f"{prefix}{ADAPTER}."), f"{prefix}{ADAPTER}."):
        conditioner = conditioner_layout(below(shapes, f"{ADAPTER}."))
    return _part(file, prefix, transformer, conditioner, options, published=True)


def _adapter(path: Path, option: str = "--llm_adapter_path: ") -> tuple[WeightFile, str]:
    """The weights of an LLM adapter, alone or in a whole model, and the prefix of its names there."""
    folder = _inside(path, CONDITIONER)
    file = part_file(folder) if folder.is_dir() else open_weights(folder)
    start = next((start for start in ADAPTER_PREFIXES if has(file.shapes, f"{start}embed.")), None)
    if start is None:
        raise UserError(f"{option}{path} is no LLM adapter of Anima: it lacks embed.weight")
    return file, start


def _folders(path: Path, adapter: Path | None, options: AnimaOptions) -> tuple[Part, dict[str, Any], dict[str, Any]]:
    """The two folders of diffusers, both in a pipeline's folder or beside each other."""
    require_own_folder(path, "anima")
    transformer = _inside(path, "transformer")
    conditioner = _inside(path if transformer != path else path.parent, CONDITIONER)
    configs = []
    for folder, kind, keys in (
        (transformer, TRANSFORMER_CLASS, TRANSFORMER_KEYS),
        (conditioner, CONDITIONER_CLASS, CONDITIONER_KEYS),
    ):
        if not (folder / "config.json").is_file() or (folder.name != CONDITIONER and kind == CONDITIONER_CLASS):
            raise UserError(f"{path} is no Anima folder: it has no folders transformer and {CONDITIONER}")
        found = class_named(folder / "config.json") or kind
        if found != kind:
            raise UserError(f"{folder} holds a {found}, not a {kind}")
        config = read_json(folder / "config.json")
        if lacking := next((key for key in keys if key not in config), None):
            raise UserError(f"{folder / 'config.json'} is incomplete: it lacks {lacking}")
        configs.append(config)
    file = part_file(transformer)
    weights = _adapter(adapter) if adapter else _adapter(conditioner, "")
    both = JoinedFile(file.path, {"transformer.": (file, ""), f"{CONDITIONER}.": weights})
    return _part(both, "", configs[0], configs[1], options, published=False)


def _part(
    file: WeightFile, prefix: str, transformer: Mapping[str, Any], conditioner: Mapping[str, Any],
    options: AnimaOptions, *, published: bool,
) -> tuple[Part, dict[str, Any], dict[str, Any]]:  # fmt: skip
    length = max(TOKEN_LENGTH, options.t5_max_token_length)  # every text is padded to it, in every batch
    transformer = {**transformer, "max_size": shipped_config("anima")["max_size"]}
    conditioner = {**conditioner, "min_sequence_length": length}
    part = Part(
        "denoiser", file, prefix, partial(build_denoiser, transformer, conditioner),
        denoiser_rules if published else own_names, extras=EXTRAS, published_depths=PUBLISHED_DEPTHS,
    )  # fmt: skip
    return part, transformer, conditioner


def layout(shapes: Shapes) -> dict[str, Any]:
    """The configuration of a transformer in published names, without prefix."""
    fixed = shipped_config("anima")
    patch = fixed["patch_size"][1] * fixed["patch_size"][2]
    hidden, inputs = shape_of(shapes, "x_embedder.proj.1.weight", 2)
    head = shape_of(shapes, "blocks.0.self_attn.q_norm.weight", 1)[0]
    return {
        **fixed,
        "in_channels": inputs // patch - 1,
        "out_channels": shape_of(shapes, "final_layer.linear.weight", 2)[0] // patch,
        "num_attention_heads": hidden // head,
        "attention_head_dim": head,
        "num_layers": depth(shapes, "blocks.{}."),
        "mlp_ratio": shape_of(shapes, "blocks.0.mlp.layer1.weight", 2)[0] / hidden,
        "text_embed_dim": shape_of(shapes, "blocks.0.cross_attn.k_proj.weight", 2)[1],
        "adaln_lora_dim": shape_of(shapes, "blocks.0.adaln_modulation_self_attn.1.weight", 2)[0],
    }


def conditioner_layout(shapes: Shapes) -> dict[str, Any]:
    """The configuration of a text conditioner. Its names are the same in all files."""
    vocabulary, target = shape_of(shapes, "embed.weight", 2)
    inner, source = shape_of(shapes, "blocks.0.cross_attn.k_proj.weight", 2)
    width = shape_of(shapes, "blocks.0.mlp.0.weight", 2)
    return {
        "source_dim": source,
        "target_dim": target,
        "model_dim": width[1],
        "num_layers": depth(shapes, "blocks.{}."),
        "num_attention_heads": inner // shape_of(shapes, "blocks.0.cross_attn.q_norm.weight", 1)[0],
        "mlp_ratio": width[0] / width[1],
        "target_vocab_size": vocabulary,
        "use_self_attention": any(".self_attn." in name for name in shapes),
    }


def denoiser_rules(module: Any) -> tuple[Rule, ...]:
    """The published names of a denoiser's tensors."""
    table = anima_names(len(module.transformer.transformer_blocks), len(module.text_conditioner.blocks))
    return expand(table, module.state_dict())
