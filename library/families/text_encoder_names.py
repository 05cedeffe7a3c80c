# SPDX-License-Identifier: Apache-2.0
"""Text encoders that several families have: the layers that adapters may be on, and their names in files."""

from __future__ import annotations

from collections.abc import Iterator

from library.adapters.formats.architecture import Encoder
from library.weights.clip_names import OPEN_CLIP_BLOCK

TEXT_PROJECTION = "text_projection"  # of CLIP, outside of its level text_model
OPEN_CLIP_NAMES = {ours: theirs for theirs, ours in OPEN_CLIP_BLOCK}


def clip_paths(blocks: int) -> Iterator[str]:
    for i in range(blocks):
        block = f"text_model.encoder.layers.{i}"
        yield from (f"{block}.self_attn.{name}_proj" for name in ("k", "v", "q", "out"))
        yield from (f"{block}.{name}" for name in ("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"))
    yield "text_model.final_layer_norm"


def clip_with_projection_paths(blocks: int) -> Iterator[str]:
    yield from clip_paths(blocks)
    yield TEXT_PROJECTION


def t5_paths(blocks: int) -> Iterator[str]:
    for i in range(blocks):
        block = f"encoder.block.{i}.layer"
        yield from (f"{block}.0.{name}" for name in ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v"))
        yield from (f"{block}.{name}" for name in ("0.SelfAttention.o", "0.layer_norm", "1.layer_norm"))
        yield from (f"{block}.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo"))
    yield "encoder.final_layer_norm"


def gemma2_paths(blocks: int) -> Iterator[str]:
    for i in range(blocks):
        yield from (f"layers.{i}.self_attn.{name}_proj" for name in "qkvo")
        yield from (f"layers.{i}.mlp.{name}_proj" for name in ("gate", "up", "down"))


CLIP_L_IN_CHECKPOINTS = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
CLIP_L = Encoder(
    "lora_te1", "text_encoders.clip_l.transformer", "text_encoder", clip_with_projection_paths,
    checkpoint=CLIP_L_IN_CHECKPOINTS,
)  # fmt: skip
CLIP_G = Encoder(
    "lora_te2", "text_encoders.clip_g.transformer", "text_encoder_2", clip_with_projection_paths,
    open_clip=("conditioner.embedders.1.model.",), open_clip_names=OPEN_CLIP_NAMES,
)  # fmt: skip
T5_XXL = Encoder("lora_te3", "text_encoders.t5xxl.transformer", "text_encoder_3", t5_paths)
GEMMA2 = Encoder("lora_te", "text_encoders.gemma2_2b.transformer.model", "text_encoder", gemma2_paths)
