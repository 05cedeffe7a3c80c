# SPDX-License-Identifier: Apache-2.0
"""Weight names of Lumina-Image 2.0 (NextDiT): published names, and diffusers' own.

Published names: https://github.com/Alpha-VLLM/Lumina-Image-2.0. The order of the rows is the order in adapter files.
"""

from __future__ import annotations

from collections.abc import Iterator

from library.key_tables import ModuleName, named, repeated

OUTSIDE = (
    named("x_embedder", "x_embedder"),
    named("t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
    named("t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
    named("cap_embedder.0", "time_caption_embed.caption_embedder.0"),
    named("cap_embedder.1", "time_caption_embed.caption_embedder.1"),
    named("final_layer.linear", "norm_out.linear_2"),
    named("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
)
SAME = ("ffn_norm1", "ffn_norm2")


def _block(group: str, *, modulated: bool) -> Iterator[ModuleName]:
    block = f"{group}.{{i}}."
    yield named(f"{block}attention.qkv", f"{block}attn.to_q", f"{block}attn.to_k", f"{block}attn.to_v")
    yield named(f"{block}attention.out", f"{block}attn.to_out.0")
    yield named(f"{block}attention.q_norm", f"{block}attn.norm_q")
    yield named(f"{block}attention.k_norm", f"{block}attn.norm_k")
    yield from (named(f"{block}feed_forward.w{n}", f"{block}feed_forward.linear_{n}") for n in (1, 2, 3))
    yield from (named(f"{block}{name}", f"{block}{name}") for name in SAME)
    yield named(f"{block}attention_norm1", f"{block}norm1.norm" if modulated else f"{block}norm1")
    yield named(f"{block}attention_norm2", f"{block}norm2")
    if modulated:
        yield named(f"{block}adaLN_modulation.1", f"{block}norm1.linear")


def lumina_names(layers: int, refiners: int) -> list[ModuleName]:
    """The table for so many layers, and so many refiner blocks of each of the two kinds."""
    return [
        *repeated(refiners, _block("context_refiner", modulated=False)),
        *repeated(refiners, _block("noise_refiner", modulated=True)),
        *repeated(layers, _block("layers", modulated=True)),
        *OUTSIDE,
    ]
