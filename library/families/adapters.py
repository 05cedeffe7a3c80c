# SPDX-License-Identifier: Apache-2.0
"""Layer names and targets of all families, for library.adapters, which knows no family.

    tensors = read_adapter("lora.safetensors", adapter_tables(), tables_of("flux"))
    network = load_network_module("networks.loha").create_network(1.0, 4, 1.0, None, encoders, denoiser)

They are in the modules `adapter_names` and `targets` of a family's package, which its sheet in the registry names.
"""

from __future__ import annotations

import functools
import importlib

from library.adapters.foreign.network_module import NetworkModule, import_network_module
from library.adapters.formats.architecture import Architecture, Tables
from library.adapters.options import BlockOptions, T5Options
from library.adapters.surgery.tool_files import KnownArchitectures
from library.adapters.targets import AnyFamily, FamilyTargets
from library.families.detect import architecture, foreign_file
from library.families.registry import FAMILIES
from library.key_tables import Shapes

# A file with adapters of text encoders only fits several families and is read as the first of them; others come after
FIRST = ("sd", "flux", "sdxl", "sd3")


def load_network_module(name: str) -> NetworkModule:
    """Load a --network_module by its dotted name. Raises UserError if it does not exist or is not a network module."""
    return import_network_module(name, every_family(), adapter_tables(), own_modules())


def own_modules() -> list[str]:
    """The network modules of this project."""
    return sorted({module for sheet in FAMILIES.values() for module in sheet.networks.values()})


@functools.cache
def adapter_tables() -> Tables:
    """The tables of layer names in adapter files, of every architecture."""
    names = sorted(FAMILIES, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    rooms = dict.fromkeys(_room(name) for name in names)
    tables = (table for room in rooms for table in _tables(room))
    return tuple(dict.fromkeys(tables))  # a family may share those of another


def tables_of(family: str) -> Tables | None:
    """The tables of one family, or None."""
    return _tables(_room(family)) or None


def known_architectures() -> KnownArchitectures:
    """What the LoRA tools need to know about the families."""

    def of_checkpoint(shapes: Shapes) -> Architecture | None:
        found = architecture(shapes)
        tables = None if found is None else tables_of(found.name)
        return next((table for table in tables or () if table.holds(shapes)), None)

    return KnownArchitectures(adapter_tables(), of_checkpoint, foreign_file)


@functools.cache
def every_family() -> AnyFamily:
    """The targets of all families, for the kinds of adapters that fit all of them."""
    rooms = dict.fromkeys(map(_room, FAMILIES))
    families = dict.fromkeys(map(_targets, rooms))
    sd = _targets(_room("sd"))
    others = tuple(targets for targets in families if targets is not sd)
    return AnyFamily(others, sd, {"blocks": BlockOptions, "t5": T5Options})


@functools.cache
def unets() -> AnyFamily:
    """The targets of the families with a U-Net."""
    return AnyFamily((_targets(_room("sdxl")),), _targets(_room("sd")), {"blocks": BlockOptions})


def _room(family: str) -> str:
    """The package of a family: "library.families.flux"."""
    return FAMILIES[family].path.partition(":")[0].rpartition(".")[0]


def _tables(room: str) -> tuple[Architecture, ...]:
    return importlib.import_module(f"{room}.adapter_names").TABLES


def _targets(room: str) -> FamilyTargets:
    return importlib.import_module(f"{room}.targets").TARGETS
