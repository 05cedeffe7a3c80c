# SPDX-License-Identifier: Apache-2.0
"""The model families by name. Imports no torch, so that --help can read a family's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.families.flux.options import FluxFineTuneOptions, FluxFlowOptions, FluxOptions
from library.families.lumina.options import LuminaFlowOptions, LuminaOptions
from library.families.sd.options import SDFineTuneOptions, SDOptions
from library.families.sd3.options import SD3FineTuneOptions, SD3FlowOptions, SD3Options
from library.families.sdxl.options import SDXLFineTuneOptions, SDXLOptions


@dataclass(frozen=True)
class FamilyEntry:
    """Where a family's class is, and which option groups of a method it replaces by its own."""

    path: str  # "module:Class"
    option_groups: Mapping[str, type]
    title: str  # as a user calls the models
    networks: Mapping[str, str]  # kind of adapters -> the --network_module for these models


# kinds that are made for every architecture, and those of U-Nets
EVERYWHERE = {kind: f"networks.{kind}" for kind in ("lora_fa", "dylora", "loha", "lokr")}
OF_UNETS = {kind: f"networks.{kind}" for kind in ("lora", "oft", "control_net_lllite")} | EVERYWHERE

FAMILIES: dict[str, FamilyEntry] = {
    "sd": FamilyEntry(
        "library.families.sd.model:StableDiffusion",
        {"model": SDOptions, "finetune": SDFineTuneOptions},
        "Stable Diffusion 1.x and 2.x",
        OF_UNETS,
    ),
    "sdxl": FamilyEntry(
        "library.families.sdxl.model:StableDiffusionXL",
        {"model": SDXLOptions, "finetune": SDXLFineTuneOptions},
        "Stable Diffusion XL",
        OF_UNETS,
    ),
    "flux": FamilyEntry(
        "library.families.flux.model:Flux",
        {"model": FluxOptions, "objective": FluxFlowOptions, "finetune": FluxFineTuneOptions},
        "FLUX.1 and Chroma",
        {"lora": "networks.lora_flux", "oft": "networks.oft_flux"} | EVERYWHERE,
    ),
    "lumina": FamilyEntry(
        "library.families.lumina.model:Lumina",
        {"model": LuminaOptions, "objective": LuminaFlowOptions},
        "Lumina-Image 2.0",
        {"lora": "networks.lora_lumina"} | EVERYWHERE,
    ),
    "sd3": FamilyEntry(
        "library.families.sd3.model:StableDiffusion3",
        {"model": SD3Options, "objective": SD3FlowOptions, "finetune": SD3FineTuneOptions},
        "Stable Diffusion 3 and 3.5",
        {"lora": "networks.lora_sd3"} | EVERYWHERE,
    ),
}


def misfit(family: str, module: str) -> str | None:
    """Reason why a network module does not fit the models of a family, naming the one that does.

    None: it fits, or it is not ours, and then only the model itself can tell.
    """
    own = FAMILIES[family].networks
    others = {
        entry.title: kind for entry in FAMILIES.values() for kind, name in entry.networks.items() if name == module
    }
    if module in own.values() or not others:
        return None
    kind = next(iter(others.values()))
    fitting = own[kind] if kind in own else f"{', '.join(own.values())} (there is no {kind} for these models)"
    made_for = " and ".join(others)
    return f"--network_module {module} is for {made_for}; for {FAMILIES[family].title} give {fitting}"
