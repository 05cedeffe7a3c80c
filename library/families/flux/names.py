# SPDX-License-Identifier: Apache-2.0
"""Weight names of FLUX.1 and of Chroma, which is FLUX.1 with another guidance: published names, and diffusers' own.

Published names: https://github.com/black-forest-labs/flux, https://huggingface.co/lodestones/Chroma. The order of the
rows is the order in adapter files.
"""

from __future__ import annotations

from library.key_tables import SWAP_HALVES, ModuleName, named, repeated

DOUBLE, THEIR_DOUBLE = "transformer_blocks.{i}.", "double_blocks.{i}."
SINGLE, THEIR_SINGLE = "single_transformer_blocks.{i}.", "single_blocks.{i}."

OUTSIDE = (
    named("img_in", "x_embedder"),
    named("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    named("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    named("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    named("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    named("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    named("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    named("txt_in", "context_embedder"),
    named("final_layer.linear", "proj_out"),
    named("final_layer.adaLN_modulation.1", "norm_out.linear", op=SWAP_HALVES),
)
DOUBLE_BLOCK = (
    named(f"{THEIR_DOUBLE}img_mod.lin", f"{DOUBLE}norm1.linear"),
    named(f"{THEIR_DOUBLE}img_attn.qkv", f"{DOUBLE}attn.to_q", f"{DOUBLE}attn.to_k", f"{DOUBLE}attn.to_v"),
    named(f"{THEIR_DOUBLE}img_attn.norm.query_norm.scale", f"{DOUBLE}attn.norm_q.weight"),
    named(f"{THEIR_DOUBLE}img_attn.norm.key_norm.scale", f"{DOUBLE}attn.norm_k.weight"),
    named(f"{THEIR_DOUBLE}img_attn.proj", f"{DOUBLE}attn.to_out.0"),
    named(f"{THEIR_DOUBLE}img_mlp.0", f"{DOUBLE}ff.net.0.proj"),
    named(f"{THEIR_DOUBLE}img_mlp.2", f"{DOUBLE}ff.net.2"),
    named(f"{THEIR_DOUBLE}txt_mod.lin", f"{DOUBLE}norm1_context.linear"),
    named(
        f"{THEIR_DOUBLE}txt_attn.qkv",
        f"{DOUBLE}attn.add_q_proj",
        f"{DOUBLE}attn.add_k_proj",
        f"{DOUBLE}attn.add_v_proj",
    ),
    named(f"{THEIR_DOUBLE}txt_attn.norm.query_norm.scale", f"{DOUBLE}attn.norm_added_q.weight"),
    named(f"{THEIR_DOUBLE}txt_attn.norm.key_norm.scale", f"{DOUBLE}attn.norm_added_k.weight"),
    named(f"{THEIR_DOUBLE}txt_attn.proj", f"{DOUBLE}attn.to_add_out"),
    named(f"{THEIR_DOUBLE}txt_mlp.0", f"{DOUBLE}ff_context.net.0.proj"),
    named(f"{THEIR_DOUBLE}txt_mlp.2", f"{DOUBLE}ff_context.net.2"),
)
SINGLE_BLOCK = (
    named(
        f"{THEIR_SINGLE}linear1",
        f"{SINGLE}attn.to_q", f"{SINGLE}attn.to_k", f"{SINGLE}attn.to_v", f"{SINGLE}proj_mlp",
    ),
    named(f"{THEIR_SINGLE}linear2", f"{SINGLE}proj_out"),
    named(f"{THEIR_SINGLE}norm.query_norm.scale", f"{SINGLE}attn.norm_q.weight"),
    named(f"{THEIR_SINGLE}norm.key_norm.scale", f"{SINGLE}attn.norm_k.weight"),
    named(f"{THEIR_SINGLE}modulation.lin", f"{SINGLE}norm.linear"),
)  # fmt: skip
GUIDANCE_LAYER = (
    named("distilled_guidance_layer.in_proj", "distilled_guidance_layer.in_proj"),
    named("distilled_guidance_layer.out_proj", "distilled_guidance_layer.out_proj"),
)
GUIDANCE_STEP = (
    named("distilled_guidance_layer.layers.{i}.in_layer", "distilled_guidance_layer.layers.{i}.linear_1"),
    named("distilled_guidance_layer.layers.{i}.out_layer", "distilled_guidance_layer.layers.{i}.linear_2"),
    named("distilled_guidance_layer.norms.{i}.scale", "distilled_guidance_layer.norms.{i}.weight"),
)


def flux_names(double: int, single: int, guidance_layers: int = 0) -> list[ModuleName]:
    """The table for so many double and single blocks; guidance_layers: Chroma's, 0 for FLUX.1.

    Chroma lacks some of the rows (modulations, time, vector and guidance embedders).
    """
    outside = [*OUTSIDE, *GUIDANCE_LAYER] if guidance_layers else [*OUTSIDE]
    return [
        *repeated(double, DOUBLE_BLOCK),
        *repeated(single, SINGLE_BLOCK),
        *outside,
        *repeated(guidance_layers, GUIDANCE_STEP),
    ]
