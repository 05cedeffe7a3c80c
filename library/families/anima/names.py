# SPDX-License-Identifier: Apache-2.0
"""Weight names of Anima: published names (Cosmos-Predict2 with an LLM adapter), and those of diffusers' two models.

Published names: https://github.com/nvidia-cosmos/cosmos-predict2, https://huggingface.co/circlestone-labs/Anima. The
order of the rows is the order in adapter files.
"""

from __future__ import annotations

from library.key_tables import ModuleName, named, repeated

ADAPTER, CONDITIONER = "llm_adapter", "text_conditioner"  # published and diffusers names of one model
BLOCK, OURS = "blocks.{i}.", "transformer.transformer_blocks.{i}."
ADAPTER_BLOCK, OUR_ADAPTER_BLOCK = f"{ADAPTER}.{BLOCK}", f"{CONDITIONER}.{BLOCK}"

BEFORE = (
    named("x_embedder.proj.1", "transformer.patch_embed.proj"),
    named("t_embedder.1.linear_1", "transformer.time_embed.t_embedder.linear_1"),
    named("t_embedder.1.linear_2", "transformer.time_embed.t_embedder.linear_2"),
)
AFTER = (
    named("final_layer.linear", "transformer.proj_out"),
    named("final_layer.adaln_modulation.1", "transformer.norm_out.linear_1"),
    named("final_layer.adaln_modulation.2", "transformer.norm_out.linear_2"),
    named("t_embedding_norm", "transformer.time_embed.norm"),
)
ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
LINEARS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0", "q_norm": "norm_q",
           "k_norm": "norm_k"}  # fmt: skip
TRANSFORMER_BLOCK = (
    *(
        named(f"{BLOCK}{part}.{theirs}", f"{OURS}{own}.{ours}")
        for part, own in ATTENTIONS.items()
        for theirs, ours in LINEARS.items()
    ),
    named(f"{BLOCK}mlp.layer1", f"{OURS}ff.net.0.proj"),
    named(f"{BLOCK}mlp.layer2", f"{OURS}ff.net.2"),
    *(
        named(f"{BLOCK}adaln_modulation_{part}.{i}", f"{OURS}{norm}.linear_{i}")
        for part, norm in (("self_attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3"))
        for i in (1, 2)
    ),
)
CONDITIONER_BLOCK = tuple(
    named(ADAPTER_BLOCK + layer, OUR_ADAPTER_BLOCK + layer)
    for layer in (*(f"{part}.{name}_proj" for part in ATTENTIONS for name in "qkvo"), "mlp.0", "mlp.2")
)
CONDITIONER_REST = (
    named(f"{ADAPTER}.in_proj", f"{CONDITIONER}.in_proj"),
    named(f"{ADAPTER}.out_proj", f"{CONDITIONER}.out_proj"),
    named(ADAPTER, CONDITIONER),
)


def anima_names(layers: int, adapter_layers: int) -> list[ModuleName]:
    """The table for these numbers of blocks of the transformer and of the LLM adapter."""
    return [
        *BEFORE,
        *repeated(adapter_layers, CONDITIONER_BLOCK),
        *CONDITIONER_REST,
        *repeated(layers, TRANSFORMER_BLOCK),
        *AFTER,
    ]
