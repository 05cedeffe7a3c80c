# SPDX-License-Identifier: Apache-2.0
"""Names of the layers of Stable Diffusion 3 and 3.5 in adapter files."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from library.adapters.formats.architecture import (
    EVERY_FORMAT,
    READERS,
    READS_STATES,
    Architecture,
    FileFacts,
    beginning,
)
from library.families.file_facts import file_facts
from library.families.sd3 import SHEET
from library.families.sd3.names import sd3_names
from library.families.text_encoder_names import CLIP_G, CLIP_L, T5_XXL
from library.key_tables import SWAP_HALVES, ModuleName

BLOCKS = "joint_blocks_"
LARGE_BLOCKS = 38  # joint blocks of SD 3.5 Large


def sd3_denoiser(blocks: int) -> list[ModuleName]:
    """A file does not say how many blocks the model has: `PublishedLayer.swaps` finds the last one by its shape."""
    last = ".context_block.adaLN_modulation.1"
    return [replace(n, op=SWAP_HALVES) if n.published.endswith(last) else n for n in sd3_names(blocks)]


def sd3_facts(names: Collection[str], v_prediction: bool) -> FileFacts:
    """SD3 medium, SD3.5 medium or large, by the layers of a checkpoint; without names SD3 medium."""
    if any(".attn2." in name for name in names):
        return file_facts(SHEET, "5-medium")
    if any(f"joint_blocks.{LARGE_BLOCKS - 1}." in name for name in names):
        return file_facts(SHEET, "5-large")
    return file_facts(SHEET, "medium")


TABLES = (
    Architecture(
        "sd3", "Stable Diffusion 3 or 3.5", sd3_denoiser, (CLIP_L, CLIP_G, T5_XXL), sd3_facts, beginning(BLOCKS),
        inputs={READS_STATES: frozenset({1536, 2432})}, not_in_last_block="context_block_attn_proj",
        readers=READERS | {"ComfyUI": EVERY_FORMAT, "Forge": READERS["ComfyUI"]},
    ),
)  # fmt: skip
