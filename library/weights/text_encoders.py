# SPDX-License-Identifier: Apache-2.0
"""CLIP and T5 as text encoders: where their weights lie, and how large they are. Others: `language_models`.

A source is a .safetensors file with transformers' names (as ComfyUI ships them: float32, half precision or fp8), a
transformers folder, or a checkpoint that holds several models, each below a prefix. The shapes in a file tell its
sizes; what no shape tells comes from configs/models, or from the folder's config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.key_tables import Rule, Shapes
from library.memory.precision import never_in_float16
from library.weights.loading import Part, own_names, part_file, read_json, shipped_config
from library.weights.sizes import below, depth, has, reading_sizes, shape_of
from library.weights.weight_files import CompletedFile, WeightFile, open_weights

CLIP, T5, GEMMA2 = "CLIP text encoder", "T5 text encoder", "Gemma 2 text encoder"
QWEN3, QWEN25_VL, MISTRAL = "Qwen3 text encoder", "Qwen2.5-VL text encoder", "Mistral text encoder"
CLIP_HEAD = 64  # width of an attention head
CLIP_LEVEL = "text_model."
CLIP_MARK = "embeddings.token_embedding.weight"
CLIP_LAYERS, T5_LAYERS = "encoder.layers.", "encoder.block."  # starts of the names of their layers
T5_MARK = "encoder.block.0.layer.0.SelfAttention.q.weight"
UMT5_MARK = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
# what each layer of a language model has in its own kind, or in those of later rows too
LANGUAGE_MARKS = {
    GEMMA2: "pre_feedforward_layernorm.weight",
    QWEN3: "self_attn.q_norm.weight",
    QWEN25_VL: "self_attn.q_proj.bias",
    MISTRAL: "self_attn.q_proj.weight",
}
PROJECTION = "text_projection.weight"
LEGACY_EOS = 2  # in old config.json files of CLIP, whatever its vocabulary

# What a file that is not the wanted encoder is, by the end of a name in it. Earlier rows win.
KINDS = (
    ("joint_blocks.0.x_block.attn.qkv.weight", "an SD3 checkpoint"),
    ("double_stream_modulation_img.lin.weight", "a FLUX.2 checkpoint"),
    ("double_blocks.0.img_attn.qkv.weight", "a FLUX.1 checkpoint"),
    ("double_blocks.0.img_attn_qkv.weight", "a HunyuanImage-2.1 checkpoint"),
    ("cap_embedder.0.weight", "a Lumina checkpoint"),
    ("blocks.0.adaln_modulation_self_attn.1.weight", "an Anima checkpoint"),
    ("input_blocks.0.0.weight", "a Stable Diffusion checkpoint"),
    (T5_MARK, f"a {T5}"),
    (CLIP_MARK, f"a {CLIP}"),
    ("transformer.resblocks.0.attn.in_proj_weight", "a text encoder in OpenCLIP's own names"),
    *((f"layers.0.{mark}", f"a {what}") for what, mark in LANGUAGE_MARKS.items()),
    ("decoder.conv_in.weight", "a VAE"),
    ("decoder.upsamples.0.residual.0.gamma", "a VAE"),
)


@dataclass(frozen=True)
class EncoderPart:
    """A text encoder that is not loaded yet: `part.load` makes the module, frozen and in evaluation mode."""

    part: Part
    layers: int
    vocabulary: int  # rows of the token embedding
    width: int  # of the states

    @classmethod
    def of_clip(cls, part: Part, config: Mapping[str, Any]) -> EncoderPart:
        """A CLIP whose whole configuration is known."""
        return cls(part, config["num_hidden_layers"], config["vocab_size"], config["hidden_size"])

    def published(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's tensors under transformers' names, CLIP's below `text_model.`, for a file of its own."""
        seen: set[int] = set()
        tensors = {}
        for name, tensor in module.state_dict().items():
            published = _clip_name(name) if self.part.what == CLIP else name
            tensors[published] = tensor.clone() if tensor.data_ptr() in seen else tensor  # T5's embedding has two names
            seen.add(tensor.data_ptr())
        return tensors


# ---- CLIP -----------------------------------------------------------------------------------------------------------


def clip_encoder(
    path: Path | WeightFile, *, option: str, projection: bool, prefixes: Sequence[str] = ("",), config: str = "clip_l"
) -> EncoderPart:
    """A CLIPTextModel, or with `projection` a CLIPTextModelWithProjection (`text_embeds`).

    path: file, opened or not, or folder. option: for messages. prefixes: of the names in a file, the first that is
    there counts. config: of configs/models, for what a file does not say: "clip_l" (quick GELU) or "clip_g" (GELU).
    A file of CLIP-L without a projection has none of its own: its pooled states are used as they are.
    """
    file, folder_config = open_source(path)
    starts = [f"{prefix}{level}" for prefix in prefixes for level in (CLIP_LEVEL, "")]
    prefix = find_prefix(file, option, starts, lambda start: has(file.shapes, f"{start}{CLIP_LAYERS}"), CLIP_MARK, CLIP)
    level = CLIP_LEVEL if prefix.endswith(CLIP_LEVEL) else ""
    prefix = prefix.removesuffix(level)
    shapes = below(file.shapes, prefix)
    with reading_sizes(file.path, prefix, option):
        sizes = clip_layout(shapes, level)
    _check_clip_width(file.path if isinstance(path, WeightFile) else path, option, config, sizes["hidden_size"])
    full = {
        **shipped_config(config),
        **sizes,
        **folder_config.get("text_config", folder_config),
        "attention_dropout": 0.0,
    }
    if full["eos_token_id"] == LEGACY_EOS:
        full["eos_token_id"] = sizes["eos_token_id"]
    settings = f"{full['hidden_act']} {full['num_attention_heads']} {full['eos_token_id']}"
    if projection and PROJECTION not in shapes and config == "clip_l":
        full["projection_dim"], settings = sizes["hidden_size"], f"{settings} without projection"
        file = CompletedFile(file, {prefix + PROJECTION: torch.eye(sizes["hidden_size"])})
    build = _build_projected_clip if projection else _build_clip
    part = Part(CLIP, file, prefix, partial(build, full), partial(_clip_rules, level=level), settings)
    return EncoderPart(part, full["num_hidden_layers"], sizes["vocab_size"], sizes["hidden_size"])


def _check_clip_width(path: Path, option: str, config: str, width: int) -> None:
    """The two published sizes are easily taken for each other; other widths pass."""
    other = next(name for name in ("clip_g", "clip_l") if name != config)
    if width == shipped_config(other)["hidden_size"]:
        own, names = shipped_config(config)["hidden_size"], {"clip_l": "CLIP-L", "clip_g": "CLIP-G"}
        raise UserError(f"{option}: {path} is {names[other]} (width {width}); {names[config]} has {own}")


def clip_layout(shapes: Shapes, level: str = "") -> dict[str, Any]:
    """The part of the config that the shapes tell. `level`: before all names but the projection's."""
    vocabulary, width = shape_of(shapes, f"{level}{CLIP_MARK}", 2)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, f"{level}encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": depth(shapes, f"{level}encoder.layers.{{}}."),
        "num_attention_heads": max(1, width // CLIP_HEAD),
        "max_position_embeddings": shape_of(shapes, f"{level}embeddings.position_embedding.weight", 2)[0],
        "projection_dim": [*shapes.get(PROJECTION, ()), width][0],
        "bos_token_id": vocabulary - 2,  # start and end token are the last ones of every published vocabulary
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def _build_clip(config: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))


def _build_projected_clip(config: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(config)))


def _clip_name(name: str) -> str:
    """The name with the level `text_model.`, which a CLIPTextModel of transformers 5 does not have."""
    return name if name.startswith((CLIP_LEVEL, PROJECTION)) else CLIP_LEVEL + name


def _clip_rules(module: nn.Module, level: str) -> tuple[Rule, ...]:
    return tuple(
        Rule(name if name == PROJECTION else level + name.removeprefix(CLIP_LEVEL), (name,))
        for name in module.state_dict()
    )


# ---- T5 -------------------------------------------------------------------------------------------------------------


def t5_encoder(path: Path, *, option: str, prefixes: Sequence[str] = ("",)) -> EncoderPart:
    """The encoder half of T5 1.1, a T5EncoderModel. Arguments as `clip_encoder`."""
    file, folder_config = open_source(path)
    prefix = find_prefix(file, option, prefixes, lambda start: has(file.shapes, f"{start}{T5_LAYERS}"), T5_MARK, T5)
    shapes = below(file.shapes, prefix)
    if UMT5_MARK in shapes:
        raise UserError(f"{option}: {path} is a UMT5 text encoder; a T5 v1.1 one is needed")
    embedding = next((n for n in ("shared.weight", "encoder.embed_tokens.weight") if n in shapes), "shared.weight")
    with reading_sizes(file.path, prefix, option):
        sizes = t5_layout(shapes, embedding)
    full = {**shipped_config("t5xxl"), **sizes, **folder_config, "dropout_rate": 0.0}
    part = Part(
        T5,
        file,
        prefix,
        partial(_build_t5, full),
        partial(_t5_rules, embedding=embedding),
        f"{full['feed_forward_proj']} {full['relative_attention_max_distance']}",
        _guard_t5,
    )
    return EncoderPart(part, full["num_layers"], sizes["vocab_size"], sizes["d_model"])


def t5_layout(shapes: Shapes, embedding: str = "shared.weight") -> dict[str, Any]:
    """The part of the config that the shapes tell."""
    vocabulary, width = shape_of(shapes, embedding, 2)
    attention, dense = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    buckets, heads = shape_of(shapes, f"{attention}.relative_attention_bias.weight", 2)
    gated = any(name.endswith((".wi_0.weight", ".wi_1.weight")) for name in shapes)
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shape_of(shapes, f"{attention}.q.weight", 2)[0] // heads,
        "d_ff": shape_of(shapes, f"{dense}.wo.weight", 2)[1],
        "num_layers": depth(shapes, f"{T5_LAYERS}{{}}."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }


def _build_t5(config: Mapping[str, Any]) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    module: Any = T5EncoderModel(T5Config.from_dict(dict(config)))
    module.encoder.embed_tokens = module.shared  # one embedding under two names
    return module


def _t5_rules(module: nn.Module, embedding: str) -> tuple[Rule, ...]:
    rules = [rule for rule in own_names(module) if rule.published.startswith("encoder.")]
    rules = [rule for rule in rules if rule.published != "encoder.embed_tokens.weight"]
    return (Rule(embedding, ("shared.weight",)), *rules)


def _guard_t5(module: nn.Module) -> None:
    """The output of a feed-forward layer (`wo`) exceeds float16 in the real T5: it is computed in float32 there.

    transformers keeps these weights in float32 instead, a fifth of the model, and casts their input to the weight's
    dtype, which a weight that is cast when it is used must not bring about.
    """
    for dense in [m for name, m in module.named_modules() if name.endswith(".DenseReluDense")]:
        never_in_float16(dense.get_submodule("wo"))
        dense.forward = _feed_forward(dense)


def _feed_forward(dense: Any) -> Callable[[Tensor], Tensor]:
    if "wi_0" in dict(dense.named_children()):
        return lambda x: dense.wo(dense.dropout(dense.act(dense.wi_0(x)) * dense.wi_1(x)))
    return lambda x: dense.wo(dense.dropout(dense.act(dense.wi(x))))


def t5_states(encoder: Any, ids: Tensor, words: Tensor | None) -> Tensor:
    """The last states (B, length, width) of T5 for ids (B, length).

    words: (B, length) bool, False at padding; None where nothing is padded. transformers reads a mask of two
    dimensions back to the host to see whether it can be left out, and takes one of four dimensions as it is.
    """
    if words is not None and encoder.config._attn_implementation == "sdpa":
        words = words[:, None, None].expand(-1, -1, ids.shape[1], -1)
    return encoder(ids, attention_mask=words).last_hidden_state


# ---- files and folders ----------------------------------------------------------------------------------------------


def open_source(path: Path | WeightFile) -> tuple[WeightFile, dict[str, Any]]:
    """The weights, and of a folder its config.json."""
    if isinstance(path, WeightFile):
        return path, {}
    if path.is_dir():
        return part_file(path), read_json(path / "config.json")
    return open_weights(path), {}


def find_prefix(
    file: WeightFile, option: str, starts: Sequence[str], fits: Callable[[str], bool], mark: str, wanted: str
) -> str:
    """The first of `starts` below which the encoder is. mark: a tensor that it has, for messages."""
    found = next((start for start in starts if fits(start)), None)
    if found is not None:
        return found
    for ending, kind in KINDS:
        if any(name.endswith(ending) for name in file.shapes):
            raise UserError(f"{option}: {file.path} is {kind} and has no {wanted} inside")
    raise UserError(f"{option}: {file.path} is no {wanted}: it has no weights of such a name ({starts[0]}{mark})")
