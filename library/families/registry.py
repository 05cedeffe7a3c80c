# SPDX-License-Identifier: Apache-2.0
"""The architectures: one row each. Imports no torch, so that --help can read the options of each."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from library.families.anima import SHEET as ANIMA
from library.families.chroma import SHEET as CHROMA
from library.families.flux import SHEET as FLUX
from library.families.flux2 import SHEET as FLUX2
from library.families.hunyuan_image import SHEET as HUNYUAN_IMAGE
from library.families.lumina import SHEET as LUMINA
from library.families.sana import SHEET as SANA
from library.families.sd import SHEET as SD
from library.families.sd3 import SHEET as SD3
from library.families.sdxl import SHEET as SDXL
from library.families.sheet import Sheet

if TYPE_CHECKING:
    from library.families.family import ModelFamily

# An architecture whose files have marks of another one as well stands behind that one.
SHEETS = (SD, SDXL, FLUX, CHROMA, FLUX2, LUMINA, ANIMA, SD3, SANA, HUNYUAN_IMAGE)
FAMILIES: dict[str, Sheet] = {sheet.name: sheet for sheet in SHEETS}


def with_scripts() -> dict[str, Sheet]:
    """The families that have scripts of their own."""
    return {name: sheet for name, sheet in FAMILIES.items() if sheet.scripts_of is None}


def scripts() -> dict[str, tuple[str, str]]:
    """Training script -> (method of library.cli, family)."""
    return {script: (method, name) for name, sheet in FAMILIES.items() for method, script in sheet.scripts.items()}


def command(sheet: Sheet) -> str:
    """What trains adapters for a family: "flux_train_network.py --model_type chroma"."""
    if sheet.scripts_of is None:
        return sheet.scripts["network"]
    owner = FAMILIES[sheet.scripts_of]
    return f"{command(owner)} --{owner.family_option} {sheet.name}"


def chosen(sheet: Sheet, options: Any) -> Sheet:
    """The family that the scripts of a family train with these options of the model."""
    return sheet if sheet.family_option is None else FAMILIES.get(getattr(options, sheet.family_option), sheet)


def family_class(sheet: Sheet) -> type[ModelFamily]:
    """The class of a family. Imports torch."""
    return pkgutil.resolve_name(sheet.path)


def open_family(sheet: Sheet, options: Any) -> ModelFamily:
    """The model that the scripts of a family train with these options of the model. Reads no file yet."""
    return family_class(chosen(sheet, options))(options)


def misfit(family: str, module: str) -> str | None:
    """Reason why a network module does not fit the models of a family, naming the one that does.

    None: it fits, or it is a third-party module, and then only the model itself can tell.
    """
    sheet = FAMILIES[family]
    own = sheet.networks
    others = dict(_takers(module))
    if module in own.values() or not others:
        return None
    kind = next(iter(others.values()))
    fitting = own[kind] if kind in own else f"{', '.join(own.values())} (there is no {kind} for these models)"
    return f"--network_module {module} is for {' and '.join(others)}; for {sheet.title} give {fitting}"


def _takers(module: str) -> Iterator[tuple[str, str]]:
    """The titles of the families that a network module is for, each with the kind of its adapters."""
    for sheet in with_scripts().values():
        for kind, name in sheet.networks.items():
            if name == module:
                yield sheet.title, kind
