# SPDX-License-Identifier: Apache-2.0
"""Weight names of CLIP text encoders: those of transformers and OpenCLIP, and ours (those of transformers).

Published names: transformers (CLIP-L), https://github.com/mlfoundations/open_clip (text encoder of SD 2.x, second text
encoder of SDXL).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.key_tables import COPY, TRANSPOSE, Rule, children_of

if TYPE_CHECKING:
    from torch import nn

OPEN_CLIP_PROJECTION = "text_projection"  # a bare parameter: states @ text_projection
PLAYGROUND_PROJECTION = "text_projection.weight"  # as Playground v2 writes it: a Linear's weight

OPEN_CLIP_BLOCK = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)


def clip_level(encoder: nn.Module) -> str:
    """transformers before 5 has everything of a CLIPTextModel below `text_model.`."""
    return "text_model." if "text_model" in dict(encoder.named_children()) else ""


def clip_rules(encoder: nn.Module) -> tuple[Rule, ...]:
    """CLIP-L of SD 1.x: transformers' names below `text_model.`, which is part of the file's prefix."""
    return tuple(Rule(name.removeprefix(clip_level(encoder)), (name,)) for name in encoder.state_dict())


def open_clip_rules(encoder: nn.Module) -> tuple[Rule, ...]:
    """OpenCLIP of SD 2.x: q, k and v are one matrix in the file."""
    level = clip_level(encoder)
    rules = [
        Rule("token_embedding.weight", (f"{level}embeddings.token_embedding.weight",)),
        Rule("positional_embedding", (f"{level}embeddings.position_embedding.weight",)),
    ]
    rules += [Rule(f"ln_final.{t}", (f"{level}final_layer_norm.{t}",)) for t in ("weight", "bias")]
    for i in range(children_of(encoder)(f"{level}encoder.layers")):
        block, ours = f"transformer.resblocks.{i}", f"{level}encoder.layers.{i}"
        for tensor in ("weight", "bias"):
            fused = tuple(f"{ours}.self_attn.{x}_proj.{tensor}" for x in "qkv")
            rules += [Rule(f"{block}.attn.in_proj_{tensor}", fused)]
            rules += [Rule(f"{block}.{a}.{tensor}", (f"{ours}.{b}.{tensor}",)) for a, b in OPEN_CLIP_BLOCK]
    return tuple(rules)


def clip_g_rules(encoder: nn.Module, projection: str = OPEN_CLIP_PROJECTION) -> tuple[Rule, ...]:
    """OpenCLIP of SDXL's second text encoder, with the projection of its pooled state under the given name."""
    op = TRANSPOSE if projection == OPEN_CLIP_PROJECTION else COPY
    return (*open_clip_rules(encoder), Rule(projection, ("text_projection.weight",), op))
