# SPDX-License-Identifier: Apache-2.0
"""Names of the layers of SANA in adapter files."""

from __future__ import annotations

from collections.abc import Collection

from library.adapters.formats.architecture import READS_STATES, Architecture, FileFacts, beginning
from library.families.file_facts import file_facts
from library.families.sana import SHEET
from library.families.sana.names import sana_names
from library.families.text_encoder_names import GEMMA2

BLOCKS = "blocks_"


def sana_facts(names: Collection[str], v_prediction: bool) -> FileFacts:
    """SANA-1.5 by its norms of queries; without names SANA."""
    return file_facts(SHEET, "sana1.5" if any(name.endswith(".attn.q_norm.weight") for name in names) else "sana")


TABLES = (
    Architecture(
        "sana", "SANA", sana_names, (GEMMA2,), sana_facts, beginning(BLOCKS),
        inputs={READS_STATES: frozenset({1152, 2240})},
    ),
)  # fmt: skip
