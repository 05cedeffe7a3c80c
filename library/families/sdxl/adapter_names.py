# SPDX-License-Identifier: Apache-2.0
"""Names of the layers of Stable Diffusion XL in adapter files."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from library.adapters.formats.architecture import ALL_READERS, Architecture, FileFacts
from library.families.file_facts import file_facts
from library.families.sd.adapter_names import (
    ATTENTION,
    CONVOLUTIONS,
    READS_TEXT,
    UNET_OUTSIDE,
    UnetShape,
    unet_names,
)
from library.families.sdxl import SHEET
from library.families.text_encoder_names import CLIP_G, CLIP_L

LABELS = ("add_embedding.linear_1", "add_embedding.linear_2")
SDXL_UNET = UnetShape((0, 2, 10), 10, (10, 2, 0), (*UNET_OUTSIDE, *LABELS))


def sdxl_facts(names: Collection[str], v_prediction: bool) -> FileFacts:
    """Adapters that the tools write say "diffusers", unlike those of a training."""
    return replace(file_facts(SHEET, "sdxl"), implementation="diffusers")


TABLES = (
    Architecture(
        "sdxl", "Stable Diffusion XL", lambda blocks: unet_names(SDXL_UNET), (CLIP_L, CLIP_G), sdxl_facts,
        ATTENTION, CONVOLUTIONS, peft="unet", readers=ALL_READERS,
        inputs={READS_TEXT: frozenset({2048}), "te1_.+self_attn_[qkv]_proj$": frozenset({768})},
    ),
)  # fmt: skip
