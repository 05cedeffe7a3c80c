# SPDX-License-Identifier: Apache-2.0
"""Weight names of SANA: published names, and diffusers' own.

Published names: https://github.com/NVlabs/Sana. The order of the rows is the order in adapter files.
"""

from __future__ import annotations

from library.key_tables import ModuleName, inside, named, repeated

OUTSIDE = (
    named("x_embedder.proj", "patch_embed.proj"),
    named("t_embedder.mlp.0", "time_embed.emb.timestep_embedder.linear_1"),
    named("t_embedder.mlp.2", "time_embed.emb.timestep_embedder.linear_2"),
    named("t_block.1", "time_embed.linear"),
    named("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    named("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    named("attention_y_norm", "caption_norm"),
    named("final_layer.linear", "proj_out"),
    named("final_layer.scale_shift_table", "scale_shift_table"),
)
PUBLISHED_BLOCK, OWN_BLOCK = "blocks.{i}", "transformer_blocks.{i}"
BLOCK = (
    named(f"{PUBLISHED_BLOCK}.attn.qkv", *(f"{OWN_BLOCK}.attn1.to_{name}" for name in "qkv")),
    named(f"{PUBLISHED_BLOCK}.cross_attn.kv_linear", *(f"{OWN_BLOCK}.attn2.to_{name}" for name in "kv")),
    *inside(
        PUBLISHED_BLOCK,
        OWN_BLOCK,
        (
            ("attn.q_norm", "attn1.norm_q"),
            ("attn.k_norm", "attn1.norm_k"),
            ("attn.proj", "attn1.to_out.0"),
            ("cross_attn.q_linear", "attn2.to_q"),
            ("cross_attn.q_norm", "attn2.norm_q"),
            ("cross_attn.k_norm", "attn2.norm_k"),
            ("cross_attn.proj", "attn2.to_out.0"),
            ("mlp.inverted_conv.conv", "ff.conv_inverted"),
            ("mlp.depth_conv.conv", "ff.conv_depth"),
            ("mlp.point_conv.conv", "ff.conv_point"),
            ("scale_shift_table", "scale_shift_table"),
        ),
    ),
)


def sana_names(blocks: int) -> list[ModuleName]:
    """The table for this number of blocks."""
    return [*repeated(blocks, BLOCK), *OUTSIDE]
