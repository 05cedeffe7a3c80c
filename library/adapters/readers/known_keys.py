# SPDX-License-Identifier: Apache-2.0
"""The keys of an adapter file that each program knows, determined without the base model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from library.adapters.formats.architecture import Tables
from library.adapters.formats.conversion import architecture_of, convert
from library.adapters.formats.oft_files import is_oft
from library.adapters.readers.comparison import PROGRAMS
from library.adapters.readers.reading import NamedModel, Program
from library.errors import UserError, first_names


def key_lines(tensors: Mapping[str, Tensor], tables: Tables) -> list[str]:
    """One line per program that has such a model; none where no architecture has all of the layers."""
    try:
        name = architecture_of(_as_lora(tensors, tables), tables).name
    except UserError:
        return []
    model = NamedModel.of(name, tensors, tables)
    return [f"{program.name}: {_line(program, tensors, model)}" for program in PROGRAMS if model.formats(program.name)]


def _as_lora(tensors: Mapping[str, Tensor], tables: Tables) -> dict[str, Tensor]:
    """Keys that the architecture is found by: OFT layers under the names of LoRA."""
    if not is_oft(tensors):
        return dict(tensors)
    own = convert(tensors, "kohya", tables)
    names = (key.partition(".")[0].replace("oft_unet_", "lora_unet_") for key in own)
    return {f"{name}.alpha": value for name, value in zip(names, own.values())}


def _line(program: Program, tensors: Mapping[str, Tensor], model: NamedModel) -> str:
    reading = program.read(tensors, model)
    if reading.refused:
        return f"refuses the file: {reading.refused}"
    if not reading.entries:
        return "loads nothing of the file"
    if reading.unread:
        return f"leaves {len(reading.unread)} of {len(tensors)} keys: {first_names(reading.unread)}"
    return "knows every key"
