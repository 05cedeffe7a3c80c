# SPDX-License-Identifier: Apache-2.0
"""Weight names of FLUX.2: published names, and diffusers' own.

Published names: https://github.com/black-forest-labs/flux2. The order of the rows is the order in adapter files.
"""

from __future__ import annotations

from library.key_tables import SWAP_HALVES, ModuleName, named, repeated

DOUBLE, THEIR_DOUBLE = "transformer_blocks.{i}.", "double_blocks.{i}."
SINGLE, THEIR_SINGLE = "single_transformer_blocks.{i}.", "single_blocks.{i}."

OUTSIDE = (
    named("img_in", "x_embedder"),
    named("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
    named("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
    named("guidance_in.in_layer", "time_guidance_embed.guidance_embedder.linear_1"),
    named("guidance_in.out_layer", "time_guidance_embed.guidance_embedder.linear_2"),
    named("txt_in", "context_embedder"),
    named("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
    named("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
    named("single_stream_modulation.lin", "single_stream_modulation.linear"),
    named("final_layer.linear", "proj_out"),
    named("final_layer.adaLN_modulation.1", "norm_out.linear", op=SWAP_HALVES),
)
DOUBLE_BLOCK = (
    named(f"{THEIR_DOUBLE}img_attn.qkv", f"{DOUBLE}attn.to_q", f"{DOUBLE}attn.to_k", f"{DOUBLE}attn.to_v"),
    named(f"{THEIR_DOUBLE}img_attn.norm.query_norm.scale", f"{DOUBLE}attn.norm_q.weight"),
    named(f"{THEIR_DOUBLE}img_attn.norm.key_norm.scale", f"{DOUBLE}attn.norm_k.weight"),
    named(f"{THEIR_DOUBLE}img_attn.proj", f"{DOUBLE}attn.to_out.0"),
    named(f"{THEIR_DOUBLE}img_mlp.0", f"{DOUBLE}ff.linear_in"),
    named(f"{THEIR_DOUBLE}img_mlp.2", f"{DOUBLE}ff.linear_out"),
    named(f"{THEIR_DOUBLE}txt_attn.qkv", *(f"{DOUBLE}attn.add_{name}_proj" for name in "qkv")),
    named(f"{THEIR_DOUBLE}txt_attn.norm.query_norm.scale", f"{DOUBLE}attn.norm_added_q.weight"),
    named(f"{THEIR_DOUBLE}txt_attn.norm.key_norm.scale", f"{DOUBLE}attn.norm_added_k.weight"),
    named(f"{THEIR_DOUBLE}txt_attn.proj", f"{DOUBLE}attn.to_add_out"),
    named(f"{THEIR_DOUBLE}txt_mlp.0", f"{DOUBLE}ff_context.linear_in"),
    named(f"{THEIR_DOUBLE}txt_mlp.2", f"{DOUBLE}ff_context.linear_out"),
)
SINGLE_BLOCK = (
    named(f"{THEIR_SINGLE}linear1", f"{SINGLE}attn.to_qkv_mlp_proj"),
    named(f"{THEIR_SINGLE}linear2", f"{SINGLE}attn.to_out"),
    named(f"{THEIR_SINGLE}norm.query_norm.scale", f"{SINGLE}attn.norm_q.weight"),
    named(f"{THEIR_SINGLE}norm.key_norm.scale", f"{SINGLE}attn.norm_k.weight"),
)


def flux2_names(double: int, single: int) -> list[ModuleName]:
    """The table for `double` double and `single` single blocks. klein has no guidance embedder."""
    return [*repeated(double, DOUBLE_BLOCK), *repeated(single, SINGLE_BLOCK), *OUTSIDE]
