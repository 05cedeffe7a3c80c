# SPDX-License-Identifier: Apache-2.0
"""How a program reads an adapter file: which keys it assigns to layers of a model, and which it ignores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from library.adapters.formats.architecture import (
    LayerPart,
    NameIndex,
    PublishedLayer,
    Tables,
    blocks_in,
    index_of,
    table_named,
)
from library.adapters.formats.layer_tensors import ALPHA, DORA, DOWN, MID, UP
from library.adapters.readers.formulas import FORMULAS, Formula

# Ending of a key -> what it is, in kohya's words
SUFFIXES = {
    "lora_down.weight": DOWN, "lora_up.weight": UP, "lora_mid.weight": MID, "alpha": ALPHA, "dora_scale": DORA,
    "lora_A.weight": DOWN, "lora_B.weight": UP, "lora.down.weight": DOWN, "lora.up.weight": UP,
    "lora_linear_layer.down.weight": DOWN, "lora_linear_layer.up.weight": UP, "lora_magnitude_vector": DORA,
    "lora_magnitude_vector.weight": DORA,
    **{name: name for kind in FORMULAS.values() for name in kind.suffixes()},
}  # fmt: skip
BY_LENGTH = sorted(SUFFIXES, key=len, reverse=True)


@dataclass(frozen=True)
class NamedModel:
    """The model that a file is for, by the name of its architecture or of a variant, and the names of its layers."""

    name: str
    index: NameIndex

    @classmethod
    def of(cls, name: str, keys: Iterable[str], tables: Tables) -> NamedModel:
        """The model with as many blocks as the keys of a file need."""
        table = table_named(tables, name)
        if table is None:
            raise ValueError(f"no table of layer names for {name}")
        return cls(name, index_of(table, blocks_in(keys)))

    def formats(self, program: str) -> frozenset[str]:
        """The formats of this model's files whose names a program takes; none where it has no such model."""
        return self.index.architecture.readers.get(program, frozenset())

    def layers(self) -> Iterable[PublishedLayer]:
        places = (place.layer for place in self.index.places.values())
        return {layer.kohya: layer for layer in places}.values()


Names = Mapping[str, LayerPart]  # what stands before the ending of a key


@dataclass(frozen=True)
class ReadLayer:
    """The tensors of one layer, as a program takes them."""

    place: LayerPart
    formula: Formula
    tensors: dict[str, Tensor]

    @property
    def eps(self) -> float:
        """Rounding unit of the precision in which the file stores them."""
        return max(torch.finfo(value.dtype).eps for value in self.tensors.values())


@dataclass
class Reading:
    """What a program reads of a file.

    entries: kohya name -> changes of that layer. unread: keys that it ignores. refused: why it does not use the file.
    """

    decompose: str
    entries: dict[str, list[ReadLayer]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    refused: str | None = None

    def add(self, entry: ReadLayer) -> None:
        self.entries.setdefault(entry.place.layer.kohya, []).append(entry)


@dataclass(frozen=True)
class Program:
    """A program that loads adapters."""

    name: str
    read: Callable[[Mapping[str, Tensor], NamedModel], Reading]


def split_key(key: str) -> tuple[str, str]:
    """(prefix, ending) of a key; the ending is empty where it is unknown."""
    for ending in BY_LENGTH:
        if key.endswith(f".{ending}"):
            return key[: -len(ending) - 1], ending
    return key, ""


def grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Prefix -> ending -> key."""
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        prefix, ending = split_key(key)
        found.setdefault(prefix, {})[ending] = key
    return found


def take(
    reading: Reading, tensors: Mapping[str, Tensor], names: Names, kinds: Iterable[str], endings: Iterable[str]
) -> None:
    """Read every layer whose prefix is a name and whose tensors are of one of these kinds; other keys are unread."""
    known = set(endings)
    for prefix, keys in grouped(tensors).items():
        place = names.get(prefix)
        own = {SUFFIXES[e]: tensors[key] for e, key in keys.items() if e in known}
        formula = next((FORMULAS[name] for name in kinds if FORMULAS[name].claims(own)), None)
        if place is None or formula is None:
            reading.unread += keys.values()
            continue
        used = {name: value for name, value in own.items() if name in formula.suffixes()}
        reading.unread += [key for e, key in keys.items() if e not in known or SUFFIXES[e] not in used]
        reading.add(ReadLayer(place, formula, used))
