# SPDX-License-Identifier: Apache-2.0
"""Names of the example's layers in adapter files."""

from __future__ import annotations

from collections.abc import Collection

from library.adapters.formats.architecture import Architecture, FileFacts, beginning
from library.families.file_facts import file_facts
from library.families.text_encoder_names import CLIP_L
from tests.families.example_family import SHEET
from tests.families.example_family.names import example_names


def example_facts(names: Collection[str], v_prediction: bool) -> FileFacts:
    return file_facts(SHEET, "example")


TABLES = (Architecture("example", "Example 1", example_names, (CLIP_L,), example_facts, beginning("blocks_")),)
