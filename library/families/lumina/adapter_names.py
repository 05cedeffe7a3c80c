# SPDX-License-Identifier: Apache-2.0
"""Names of the layers of Lumina-Image 2.0 in adapter files."""

from __future__ import annotations

from collections.abc import Collection

from library.adapters.formats.architecture import READS_STATES, Architecture, FileFacts, beginning
from library.families.file_facts import file_facts
from library.families.lumina import SHEET
from library.families.lumina.names import lumina_names
from library.families.text_encoder_names import GEMMA2

NOISE, CONTEXT, LAYERS, FINAL = "noise_refiner_", "context_refiner_", "layers_", "final_layer_"


def lumina_facts(names: Collection[str], v_prediction: bool) -> FileFacts:
    return file_facts(SHEET, "lumina2")


TABLES = (
    Architecture(
        "lumina", "Lumina-Image 2.0", lambda blocks: lumina_names(blocks, blocks), (GEMMA2,), lumina_facts,
        beginning(CONTEXT, NOISE, LAYERS, FINAL),
        fused={3: (1.0, 1 / 3, 1 / 3)}, comfy_alpha=False, inputs={READS_STATES: frozenset({2304})},
    ),
)  # fmt: skip
