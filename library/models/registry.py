# SPDX-License-Identifier: Apache-2.0
"""The model families by name. Imports no torch, so that --help can read a family's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.models.flux_options import FluxFineTuneOptions, FluxOptions
from library.models.lumina_options import LuminaOptions
from library.models.options import SDOptions
from library.models.sd3_options import SD3FineTuneOptions, SD3Options
from library.models.sd_options import SDFineTuneOptions
from library.models.sdxl_options import SDXLFineTuneOptions, SDXLOptions
from library.objectives.flow_options import FluxFlowOptions, LuminaFlowOptions, SD3FlowOptions


@dataclass(frozen=True)
class FamilyEntry:
    """Where a family's class is, and which option groups of a method it replaces by its own."""

    path: str  # "module:Class"
    option_groups: Mapping[str, type]


FAMILIES: dict[str, FamilyEntry] = {
    "sd": FamilyEntry("library.models.sd:StableDiffusion", {"model": SDOptions, "finetune": SDFineTuneOptions}),
    "sdxl": FamilyEntry(
        "library.models.sdxl:StableDiffusionXL", {"model": SDXLOptions, "finetune": SDXLFineTuneOptions}
    ),
    "flux": FamilyEntry(
        "library.models.flux:Flux",
        {"model": FluxOptions, "objective": FluxFlowOptions, "finetune": FluxFineTuneOptions},
    ),
    "lumina": FamilyEntry("library.models.lumina:Lumina", {"model": LuminaOptions, "objective": LuminaFlowOptions}),
    "sd3": FamilyEntry(
        "library.models.sd3:StableDiffusion3",
        {"model": SD3Options, "objective": SD3FlowOptions, "finetune": SD3FineTuneOptions},
    ),
}
