# SPDX-License-Identifier: Apache-2.0
"""Names of the layers of SANA in adapter files: those of diffusers, the only ones that programs read."""

from __future__ import annotations

import re
from collections.abc import Collection

from library.adapters.formats.architecture import READERS, READS_STATES, Architecture, FileFacts
from library.families.file_facts import file_facts
from library.families.sana import SHEET
from library.families.sana.names import sana_names
from library.families.text_encoder_names import GEMMA2
from library.key_tables import ModuleName, named

BLOCKS = "transformer_blocks_"


def sana_layers(blocks: int) -> list[ModuleName]:
    """Every module of a denoiser with this number of blocks."""
    return [named(own, own) for name in sana_names(blocks) for own in name.ours]


def sana_facts(names: Collection[str], v_prediction: bool) -> FileFacts:
    """Tell SANA-1.5 by its norms of queries; SANA if there are no names."""
    normed = any(name.endswith((".norm_q.weight", ".q_norm.weight")) for name in names)
    return file_facts(SHEET, "sana1.5" if normed else "sana")


TABLES = (
    Architecture(
        "sana", "SANA", sana_layers, (GEMMA2,), sana_facts, re.compile(f"lora_unet_{BLOCKS}.+_to_[qkv]"),
        inputs={READS_STATES: frozenset({1152, 2240})}, readers={"diffusers": READERS["diffusers"]},
    ),
)  # fmt: skip
