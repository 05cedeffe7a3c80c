# SPDX-License-Identifier: Apache-2.0
"""Files of adapters, read and converted with the names of layers of every family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from library.adapters.formats import conversion, recognition
from library.adapters.formats.architecture import Architecture, PublishedLayer
from library.adapters.surgery import tool_files
from library.adapters.surgery.tool_files import LoraFile
from library.families.adapters import adapter_tables

TABLES = adapter_tables()
BY_NAME: dict[str, Architecture] = {table.name: table for table in TABLES}


def among_tables(among: Sequence[str] | None) -> list[Architecture] | None:
    return None if among is None else [BY_NAME[name] for name in among]


def convert(
    tensors: Mapping[str, Tensor], to: str, *, architecture: str | None = None, **more: Any
) -> dict[str, Tensor]:
    return conversion.convert(tensors, to, TABLES if architecture is None else [BY_NAME[architecture]], **more)


def to_kohya(tensors: Mapping[str, Tensor], *, among: Sequence[str] | None = None, **more: Any) -> dict[str, Tensor]:
    return conversion.to_kohya(tensors, TABLES, among=among_tables(among), **more)


def read_adapter(path: str | Path, among: Sequence[str] | None = None, **more: Any) -> dict[str, Tensor]:
    return conversion.read_adapter(path, TABLES, among_tables(among), **more)


def header(tensors: Mapping[str, Tensor], to: str) -> dict[str, str]:
    return conversion.header(tensors, to, TABLES)


def dora_norms(tensors: Mapping[str, Tensor], weight_of: Callable[[str], Tensor | None]) -> conversion.Norms:
    return conversion.dora_norms(tensors, weight_of, TABLES)


def layers_in(tensors: Mapping[str, Tensor]) -> dict[str, PublishedLayer]:
    return conversion.layers_in(tensors, TABLES)


def format_of(tensors: Mapping[str, Tensor], among: Sequence[str] | None = None) -> str:
    return recognition.format_of(tensors, TABLES, among_tables(among))


def architecture_of(tensors: Mapping[str, Tensor], among: Sequence[str] | None = None) -> str:
    return recognition.architecture_of(tensors, among_tables(among) or TABLES).name


def read_lora(path: str, architecture: str | None = None) -> LoraFile:
    return tool_files.read_lora(path, TABLES, None if architecture is None else BY_NAME[architecture])
