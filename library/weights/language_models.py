# SPDX-License-Identifier: Apache-2.0
"""Language models as text encoders: Gemma 2, Qwen3, Mistral, and the text part of Qwen2.5-VL.

Sources are those of `text_encoders`. Output layers and vision towers are never loaded, nor are layers above the states
that are read. Sizes come from the shapes in a file; everything else comes from configs/models or from the folder's
config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.key_tables import Shapes
from library.weights.loading import Part, own_names, shipped_config
from library.weights.sizes import below, depth, has, reading_sizes, shape_of
from library.weights.text_encoders import (
    GEMMA2,
    LANGUAGE_MARKS,
    MISTRAL,
    QWEN3,
    QWEN25_VL,
    EncoderPart,
    find_prefix,
    open_source,
)
from library.weights.weight_files import WeightFile

# Prefixes of names in files: of transformers 5 and 4 for models with vision, of text-only models, and none
LEVELS = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")  # names of the same setting in different versions
VISION = ("visual.", "model.visual.")


@dataclass(frozen=True)
class LanguageModel:
    """A kind of language model."""

    what: str  # for messages, and the key of LANGUAGE_MARKS
    config: str  # of configs/models
    classes: tuple[str, str]  # in transformers: the configuration, and the model without its output layer
    head: int  # width of an attention head
    settings: tuple[str, ...] = ("head_dim", "rms_norm_eps", "rope_parameters")  # settings that its states depend on


KINDS = {
    "gemma2": LanguageModel(
        GEMMA2, "gemma2", ("Gemma2Config", "Gemma2Model"), 256, ("head_dim", "query_pre_attn_scalar")
    ),
    "qwen3": LanguageModel(QWEN3, "qwen3", ("Qwen3Config", "Qwen3Model"), 128),
    "qwen2.5_vl": LanguageModel(QWEN25_VL, "qwen25_vl", ("Qwen2_5_VLTextConfig", "Qwen2_5_VLTextModel"), 128),
    "mistral": LanguageModel(MISTRAL, "mistral", ("MistralConfig", "MistralModel"), 128),
}


def language_encoder(
    kind: str, path: Path | WeightFile, *, option: str, prefixes: Sequence[str] = ("",), layers: int | None = None
) -> EncoderPart:
    """A language model of KINDS without its output layer.

    path: file, opened or not, or folder. option: for messages. prefixes: of the names in a file, before one of LEVELS.
    layers: number of layers to load, without the last norm: `hidden_states[layers]` is then that of the whole model,
    not normalised. None: the whole model. Raises UserError for a file of another kind or a model with fewer layers.
    """
    model = KINDS[kind]
    file, folder_config = open_source(path)
    starts = [f"{prefix}{level}" for prefix in prefixes for level in LEVELS]
    mark = f"layers.0.{LANGUAGE_MARKS[model.what]}"
    prefix = find_prefix(
        file, option, starts, lambda start: _kind_below(file.shapes, start) == model.what, mark, model.what
    )
    if kind == "qwen3" and has(file.shapes, *VISION):
        raise UserError(f"{option}: {file.path} is a Qwen3-VL model; a {model.what} is needed")
    shapes = below(file.shapes, prefix)
    with reading_sizes(file.path, prefix, option):
        sizes = language_layout(shapes, model.head)
        full = {**_fixed(model, sizes, folder_config), "attention_dropout": 0.0}
    found = sizes["num_hidden_layers"]
    if layers is not None and found < layers:
        raise UserError(f"{option}: {file.path} has {found} layers, and the states of layer {layers} are needed")
    extras = () if layers is None else (rf"layers\.({'|'.join(map(str, range(layers, found)))})\..+", r"norm\.weight")
    settings = " ".join(str(full.get(key)) for key in model.settings)
    part = Part(model.what, file, prefix, partial(_build, full, kind, layers), own_names, settings, extras=extras)
    return EncoderPart(part, found if layers is None else layers, sizes["vocab_size"], sizes["hidden_size"])


def gemma2_encoder(path: Path, *, option: str, prefixes: Sequence[str] = ("",)) -> EncoderPart:
    """Gemma 2 with all of its layers. Arguments as in `language_encoder`."""
    return language_encoder("gemma2", path, option=option, prefixes=prefixes)


def _kind_below(shapes: Shapes, start: str) -> str | None:
    """The kind of the model below `start`. Any of its layers tells, so a single missing tensor does not matter."""
    names = [name for name in shapes if name.startswith(f"{start}layers.")]
    return next((what for what, mark in LANGUAGE_MARKS.items() if any(n.endswith(f".{mark}") for n in names)), None)


def _fixed(model: LanguageModel, sizes: Mapping[str, Any], folder: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration. A folder's config.json overrides the shapes, which override the shipped one."""
    own = folder.get("text_config", folder)
    shipped = shipped_config(model.config)
    if any(name in own for name in ROPE):
        shipped = {name: value for name, value in shipped.items() if name not in ROPE}
    full = {**shipped, **sizes, **own}
    sections = full.get("rope_parameters") or {}
    if "mrope_section" in sections and "rope_parameters" not in own:  # smaller heads than published
        side = 3 * full["head_dim"] // 16
        full["rope_parameters"] = {**sections, "mrope_section": [full["head_dim"] // 2 - 2 * side, side, side]}
    return {name: value for name, value in full.items() if name not in ("model_type", "vision_config")}


def language_layout(shapes: Shapes, head: int) -> dict[str, Any]:
    """The part of the configuration that the shapes tell. A model narrower than one `head` has a single key head."""
    vocabulary, width = shape_of(shapes, "embed_tokens.weight", 2)
    queries, keys = (shape_of(shapes, f"layers.0.self_attn.{n}_proj.weight", 2)[0] for n in "qk")
    norm = "layers.0.self_attn.q_norm.weight"
    size = shape_of(shapes, norm, 1)[0] if norm in shapes else head if keys % head == 0 else keys
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, "layers.0.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": depth(shapes, "layers.{}."),
        "num_attention_heads": queries // size,
        "num_key_value_heads": keys // size,
        "head_dim": size,
    }


def _build(config: Mapping[str, Any], kind: str, layers: int | None) -> nn.Module:
    import transformers

    config_class, model_class = (getattr(transformers, name) for name in KINDS[kind].classes)
    if layers is None:
        module: nn.Module = model_class(config_class.from_dict(dict(config)))
        return module
    types = config.get("layer_types")
    cut = {"num_hidden_layers": layers} | ({"layer_types": types[:layers]} if types else {})
    module = model_class(config_class.from_dict({**config, **cut}))
    module.norm = nn.Identity()
    return module


def language_states(encoder: Any, ids: Tensor, words: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """States (B, length, width) after each of `layers`, as `hidden_states` of transformers counts them.

    ids: (B, length). words: (B, length) bool, False at padding, which no token attends to. The mask has four dimensions
    because transformers uses such a mask as it is: for one with two, the host waits to see whether it can be left out.
    """
    mask = words
    if encoder.config._attn_implementation == "sdpa":
        place = torch.arange(ids.shape[1], device=ids.device)
        mask = words[:, None, None] & (place[:, None] >= place)
    states = encoder(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    return [states[layer] for layer in layers]
