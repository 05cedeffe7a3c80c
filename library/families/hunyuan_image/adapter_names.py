# SPDX-License-Identifier: Apache-2.0
"""Names of the layers of HunyuanImage-2.1 in adapter files. ComfyUI's names differ from the published ones."""

from __future__ import annotations

from collections.abc import Collection

from library.adapters.formats.architecture import READS_STATES, Architecture, FileFacts, beginning
from library.families.file_facts import file_facts
from library.families.hunyuan_image import SHEET
from library.families.hunyuan_image.names import comfy_path, hunyuan_names
from library.key_tables import ModuleName

DOUBLE, SINGLE = "double_blocks_", "single_blocks_"


def denoiser_layers(blocks: int) -> list[ModuleName]:
    return [name for name in hunyuan_names(blocks, blocks, blocks) if not name.published.endswith("_norm.weight")]


def hunyuan_facts(names: Collection[str], v_prediction: bool) -> FileFacts:
    distilled = any("guidance_in." in name for name in names)
    return file_facts(SHEET, "distilled" if distilled else "base", size=1024)  # as sd-scripts writes it


TABLES = (
    Architecture(
        "hunyuan_image", "HunyuanImage-2.1", denoiser_layers, (), hunyuan_facts, beginning(DOUBLE, SINGLE),
        fused={4: (1.0, 1.0, 1.0, 4.0)}, comfy_path=comfy_path,
        inputs={READS_STATES: frozenset({3584}), "_mlp_fc2$": frozenset({14336}), "_linear2$": frozenset({17920})},
    ),
)  # fmt: skip
