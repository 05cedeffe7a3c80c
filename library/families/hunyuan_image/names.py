# SPDX-License-Identifier: Apache-2.0
"""Weight names of HunyuanImage-2.1: published names, those of other programs, and diffusers' own.

Published names: https://github.com/Tencent-Hunyuan/HunyuanImage-2.1. The order of the rows is that in adapter files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from library.key_tables import SWAP_HALVES, ModuleName, inside, named, repeated

REFINER = "context_embedder.token_refiner.refiner_blocks.{i}."
THEIR_REFINER = "txt_in.individual_token_refiner.blocks.{i}."
DOUBLE, THEIR_DOUBLE = "transformer_blocks.{i}.", "double_blocks.{i}."
SINGLE, THEIR_SINGLE = "single_transformer_blocks.{i}.", "single_blocks.{i}."

LAYERS = (("mlp.0", "linear_1"), ("mlp.2", "linear_2"))  # of an embedder
TIME, TEXT_TIME = "time_guidance_embed", "context_embedder.time_text_embed"
OUTSIDE = (
    named("byt5_in.layernorm", "context_embedder_2.norm"),
    *(named(f"byt5_in.fc{n}", f"context_embedder_2.linear_{n}") for n in (1, 2, 3)),
    named("img_in.proj", "x_embedder.proj"),
    named("txt_in.input_embedder", "context_embedder.proj_in"),
    *inside("txt_in.t_embedder", f"{TEXT_TIME}.timestep_embedder", LAYERS),
    *(named(f"txt_in.c_embedder.linear_{n}", f"{TEXT_TIME}.text_embedder.linear_{n}") for n in (1, 2)),
    *inside("time_in", f"{TIME}.timestep_embedder", LAYERS),
    *inside("time_r_in", f"{TIME}.timestep_embedder_r", LAYERS),
    *inside("guidance_in", f"{TIME}.guidance_embedder", LAYERS),
    named("final_layer.linear", "proj_out"),
    named("final_layer.adaLN_modulation.1", "norm_out.linear", op=SWAP_HALVES),
)


def _stream(start: str, norm: str, ours: tuple[str, str, str, str], norms: str, feed_forward: str) -> list[ModuleName]:
    """One stream of a double block, picture or text. ours: q, k, v and output of the attention."""
    *qkv, out = (f"{DOUBLE}attn.{name}" for name in ours)
    return [
        named(f"{start}_mod.linear", f"{DOUBLE}{norm}.linear"),
        named(f"{start}_attn_qkv", *qkv),
        *(named(f"{start}_attn_{n}_norm.weight", f"{DOUBLE}attn.{norms}_{n}.weight") for n in "qk"),
        named(f"{start}_attn_proj", out),
        named(f"{start}_mlp.fc1", f"{DOUBLE}{feed_forward}.net.0.proj"),
        named(f"{start}_mlp.fc2", f"{DOUBLE}{feed_forward}.net.2"),
    ]


PICTURE = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
DOUBLE_BLOCK = (
    *_stream(f"{THEIR_DOUBLE}img", "norm1", PICTURE, "norm", "ff"),
    *_stream(f"{THEIR_DOUBLE}txt", "norm1_context", TEXT, "norm_added", "ff_context"),
)
SINGLE_BLOCK = (
    named(
        f"{THEIR_SINGLE}linear1",
        f"{SINGLE}attn.to_q", f"{SINGLE}attn.to_k", f"{SINGLE}attn.to_v", f"{SINGLE}proj_mlp",
    ),
    named(f"{THEIR_SINGLE}linear2", f"{SINGLE}proj_out"),
    *(named(f"{THEIR_SINGLE}{n}_norm.weight", f"{SINGLE}attn.norm_{n}.weight") for n in "qk"),
    named(f"{THEIR_SINGLE}modulation.linear", f"{SINGLE}norm.linear"),
)  # fmt: skip
REFINER_BLOCK = (
    *(named(f"{THEIR_REFINER}norm{n}", f"{REFINER}norm{n}") for n in (1, 2)),
    named(f"{THEIR_REFINER}self_attn_qkv", *(f"{REFINER}attn.to_{n}" for n in "qkv")),
    named(f"{THEIR_REFINER}self_attn_proj", f"{REFINER}attn.to_out.0"),
    named(f"{THEIR_REFINER}mlp.fc1", f"{REFINER}ff.net.0.proj"),
    named(f"{THEIR_REFINER}mlp.fc2", f"{REFINER}ff.net.2"),
    named(f"{THEIR_REFINER}adaLN_modulation.1", f"{REFINER}norm_out.linear"),
)


def hunyuan_names(double: int, single: int, refiners: int) -> list[ModuleName]:
    """The table for these numbers of blocks. The base model has neither time_r_in nor guidance_in."""
    return [
        *repeated(double, DOUBLE_BLOCK),
        *repeated(single, SINGLE_BLOCK),
        *OUTSIDE,
        *repeated(refiners, REFINER_BLOCK),
    ]


# ---- other programs -------------------------------------------------------------------------------------------------

# parts of published names -> ComfyUI's, in this order
COMFY = (
    ("_in.mlp.0", "_in.in_layer"),
    ("_in.mlp.2", "_in.out_layer"),
    ("t_embedder.mlp.0", "t_embedder.in_layer"),
    ("t_embedder.mlp.2", "t_embedder.out_layer"),
    ("c_embedder.linear_1", "c_embedder.in_layer"),
    ("c_embedder.linear_2", "c_embedder.out_layer"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("_mod.linear", "_mod.lin"),
    (".modulation.linear", ".modulation.lin"),
    ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"),
    ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
    (".q_norm.weight", ".norm.query_norm.scale"),
    (".k_norm.weight", ".norm.key_norm.scale"),
    ("_attn_qkv", "_attn.qkv"),
    ("_attn_proj", "_attn.proj"),
)
SPLIT = {  # ends of fused layers -> those of their parts
    "_attn_qkv": ("_attn_q", "_attn_k", "_attn_v"),
    ".linear1": (".linear1_q", ".linear1_k", ".linear1_v", ".linear1_mlp"),
    ".linear2": (".linear2.fc",),
}


def comfy_path(published: str) -> str:
    """ComfyUI's name for a layer or tensor: `double_blocks.0.img_mlp.fc1` is `double_blocks.0.img_mlp.0`."""
    for part, name in COMFY:
        published = published.replace(part, name)
    return published


def in_comfy_names(table: Iterable[ModuleName]) -> Iterator[ModuleName]:
    """The table for files with ComfyUI's names."""
    return (ModuleName(comfy_path(name.published), name.ours, name.op) for name in table)


def split_apart(table: Iterable[ModuleName]) -> Iterator[ModuleName]:
    """The table for files of a model that ran on several GPUs, in which q, k, v and mlp are separate layers."""
    for name in table:
        end = next((end for end in SPLIT if name.published.endswith(end) and "_blocks." in name.published), None)
        if end is None:
            yield name
        else:
            start = name.published.removesuffix(end)
            yield from (ModuleName(start + own, (ours,), name.op) for own, ours in zip(SPLIT[end], name.ours))
