# SPDX-License-Identifier: Apache-2.0
"""Names of the layers of Anima in adapter files."""

from __future__ import annotations

from collections.abc import Collection

from library.adapters.formats.architecture import (
    EVERY_FORMAT,
    READERS,
    READS_STATES,
    Architecture,
    Encoder,
    FileFacts,
    beginning,
)
from library.families.anima import SHEET
from library.families.anima.names import anima_names
from library.families.file_facts import file_facts
from library.families.text_encoder_names import gemma2_paths


def anima_facts(names: Collection[str], v_prediction: bool) -> FileFacts:
    return file_facts(SHEET, "anima")


QWEN3 = Encoder(
    "lora_te", "text_encoders.qwen3_06b.transformer.model", "text_encoder", gemma2_paths, flat_in_comfy=True
)  # fmt: skip
TABLES = (
    Architecture(
        "anima", "Anima", lambda blocks: anima_names(blocks, blocks), (QWEN3,), anima_facts,
        beginning(r"blocks_\d+_(?:self_attn|cross_attn|mlp)_"), peft="", comfy_alpha=False,
        inputs={READS_STATES: frozenset({2048})}, readers=READERS | {"diffusers": EVERY_FORMAT - {"kohya"}},
    ),
)  # fmt: skip
