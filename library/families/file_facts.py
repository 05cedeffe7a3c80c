# SPDX-License-Identifier: Apache-2.0
"""What files that the LoRA tools write say about their model, from the data sheet of its family."""

from __future__ import annotations

from library.adapters.formats.architecture import FileFacts
from library.families.sheet import Sheet


def file_facts(sheet: Sheet, variant: str, *, size: int | None = None) -> FileFacts:
    """The facts of a variant. size: modelspec.resolution, in pixels of a side; None: that of previews."""
    known = sheet.variants[variant]
    facts = known.facts
    return FileFacts(
        facts.base_model_version,
        facts.architecture,
        facts.implementation,
        facts.prediction_type,
        size or known.preview.size,
        sheet.networks["lora"],
        facts.checkpoint_implementation or facts.implementation,
    )
