# SPDX-License-Identifier: Apache-2.0
"""Names of the layers of FLUX.2 in adapter files. FLUX.1 has layers of other widths under the same names."""

from __future__ import annotations

from collections.abc import Collection

from library.adapters.formats.architecture import EVERY_FORMAT, READS_STATES, Architecture, FileFacts, beginning
from library.families.file_facts import file_facts
from library.families.flux.adapter_names import DOUBLE, SINGLE
from library.families.flux2 import SHEET, VARIANTS
from library.families.flux2.names import flux2_names
from library.key_tables import ModuleName


def flux2_denoiser(blocks: int) -> list[ModuleName]:
    return [name for name in flux2_names(blocks, blocks) if not name.published.endswith(".scale")]


def flux2_facts(names: Collection[str], v_prediction: bool) -> FileFacts:
    """Tell dev by its guidance and klein by its number of blocks; klein 4B if there are no names."""
    if any("guidance_in." in name for name in names):
        return file_facts(SHEET, "dev")
    return file_facts(SHEET, "klein-9b" if any("double_blocks.5." in name for name in names) else "klein-4b")


TABLES = (
    Architecture(
        "flux2", "FLUX.2", flux2_denoiser, (), flux2_facts, beginning(DOUBLE, SINGLE), comfy_alpha=False,
        readers={"ComfyUI": EVERY_FORMAT, "diffusers": EVERY_FORMAT},
        inputs={
            READS_STATES: frozenset(variant.width for variant in VARIANTS.values()),
            "_mlp_2$": frozenset({9216, 18432}),  # klein 9B's are as wide as those of FLUX.1
            "_linear2$": frozenset({12288, 16384, 24576}),
        },
    ),
)  # fmt: skip
