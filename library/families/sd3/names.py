# SPDX-License-Identifier: Apache-2.0
"""Weight names of SD3 and SD3.5: published names, and diffusers' own.

Published names: https://github.com/Stability-AI/sd3-ref (mmditx.py). The order
of the rows is the order in adapter files.
"""

from __future__ import annotations

from dataclasses import replace

from library.key_tables import SWAP_HALVES, ModuleName, named, repeated

OURS, X, CONTEXT = "transformer_blocks.{i}.", "joint_blocks.{i}.x_block.", "joint_blocks.{i}.context_block."

OUTSIDE = (
    named("context_embedder", "context_embedder"),
    named("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    named("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    named("x_embedder.proj", "pos_embed.proj"),
    named("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    named("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    named("final_layer.adaLN_modulation.1", "norm_out.linear", op=SWAP_HALVES),
    named("final_layer.linear", "proj_out"),
    named("pos_embed", "pos_embed.pos_embed"),
)
BLOCK = (
    named(f"{CONTEXT}attn.qkv", f"{OURS}attn.add_q_proj", f"{OURS}attn.add_k_proj", f"{OURS}attn.add_v_proj"),
    named(f"{CONTEXT}attn.proj", f"{OURS}attn.to_add_out"),
    named(f"{CONTEXT}attn.ln_q", f"{OURS}attn.norm_added_q"),
    named(f"{CONTEXT}attn.ln_k", f"{OURS}attn.norm_added_k"),
    named(f"{CONTEXT}mlp.fc1", f"{OURS}ff_context.net.0.proj"),
    named(f"{CONTEXT}mlp.fc2", f"{OURS}ff_context.net.2"),
    named(f"{CONTEXT}adaLN_modulation.1", f"{OURS}norm1_context.linear"),
    named(f"{X}attn.qkv", f"{OURS}attn.to_q", f"{OURS}attn.to_k", f"{OURS}attn.to_v"),
    named(f"{X}attn.proj", f"{OURS}attn.to_out.0"),
    named(f"{X}attn.ln_q", f"{OURS}attn.norm_q"),
    named(f"{X}attn.ln_k", f"{OURS}attn.norm_k"),
    named(f"{X}attn2.qkv", f"{OURS}attn2.to_q", f"{OURS}attn2.to_k", f"{OURS}attn2.to_v"),
    named(f"{X}attn2.proj", f"{OURS}attn2.to_out.0"),
    named(f"{X}attn2.ln_q", f"{OURS}attn2.norm_q"),
    named(f"{X}attn2.ln_k", f"{OURS}attn2.norm_k"),
    named(f"{X}mlp.fc1", f"{OURS}ff.net.0.proj"),
    named(f"{X}mlp.fc2", f"{OURS}ff.net.2"),
    named(f"{X}adaLN_modulation.1", f"{OURS}norm1.linear"),
)


def sd3_names(blocks: int) -> list[ModuleName]:
    """The table for so many joint blocks. In the last one the context's modulation has only shift and scale."""
    last = f"joint_blocks.{blocks - 1}.context_block.adaLN_modulation.1"
    block = repeated(blocks, BLOCK)
    return [*(replace(name, op=SWAP_HALVES) if name.published == last else name for name in block), *OUTSIDE]
