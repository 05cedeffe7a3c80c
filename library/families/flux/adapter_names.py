# SPDX-License-Identifier: Apache-2.0
"""Names of the layers of FLUX.1 and Chroma in adapter files."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from library.adapters.formats.architecture import ALL_READERS, READS_STATES, Architecture, FileFacts, beginning
from library.families.chroma import SHEET as CHROMA
from library.families.file_facts import file_facts
from library.families.flux import SHEET
from library.families.flux.names import flux_names
from library.families.text_encoder_names import CLIP_L, T5_XXL
from library.key_tables import ModuleName

DOUBLE, SINGLE = "double_blocks_", "single_blocks_"


def flux_denoiser(blocks: int) -> list[ModuleName]:
    return [n for n in flux_names(blocks, blocks, guidance_layers=blocks) if not n.published.endswith(".scale")]


def flux_facts(names: Collection[str], v_prediction: bool) -> FileFacts:
    """FLUX.1 dev, schnell or Chroma, by the layers of a checkpoint; without names FLUX.1 dev."""
    if any("distilled_guidance_layer." in name for name in names):
        return file_facts(CHROMA, "chroma")
    is_dev = not names or any("guidance_in." in name for name in names)
    return file_facts(SHEET, "dev" if is_dev else "schnell")


TABLES = (
    Architecture(
        "flux", "FLUX.1 or Chroma", flux_denoiser,
        (CLIP_L, replace(T5_XXL, peft="text_encoder_2", aliases=("lora_te2",))),
        flux_facts, beginning(DOUBLE, SINGLE),
        fused={4: (1.0, 1.0, 1.0, 4.0)}, numbered_oft=True,
        inputs={READS_STATES: frozenset({3072}), "_mlp_2$": frozenset({12288}), "_linear2$": frozenset({15360})},
        variants=("chroma",), readers=ALL_READERS,
    ),
)  # fmt: skip
