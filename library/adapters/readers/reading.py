# SPDX-License-Identifier: Apache-2.0
"""What a program reads of an adapter file: which keys belong to which layer of a model, and which it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from library.adapters.formats.layers import ALPHA, DORA, DOWN, MID, UP
from library.adapters.formats.tables import BY_NAME, Index, Layer, blocks_in, index_of
from library.adapters.readers.formulas import KINDS, Kind

# Ending of a key -> what it is, in kohya's words
SUFFIXES = {
    "lora_down.weight": DOWN, "lora_up.weight": UP, "lora_mid.weight": MID, "alpha": ALPHA, "dora_scale": DORA,
    "lora_A.weight": DOWN, "lora_B.weight": UP, "lora.down.weight": DOWN, "lora.up.weight": UP,
    "lora_linear_layer.down.weight": DOWN, "lora_linear_layer.up.weight": UP, "lora_magnitude_vector": DORA,
    "lora_magnitude_vector.weight": DORA,
    **{name: name for kind in KINDS.values() for name in kind.suffixes()},
}  # fmt: skip
BY_LENGTH = sorted(SUFFIXES, key=len, reverse=True)

# Name of a model family -> the table of its names
ARCHITECTURES = {"chroma": "flux"}


@dataclass(frozen=True)
class Model:
    """The model that a file is for: a name in `format_tables.BY_NAME`, or "chroma"; with so many blocks."""

    name: str
    index: Index

    @classmethod
    def of(cls, name: str, keys: Iterable[str]) -> Model:
        return cls(name, index_of(BY_NAME[ARCHITECTURES.get(name, name)], blocks_in(keys)))

    def layers(self) -> Iterable[Layer]:
        places = (place.layer for place in self.index.places.values())
        return {layer.kohya: layer for layer in places}.values()


@dataclass(frozen=True)
class Slot:
    """A published layer, or one of the parts that it has in diffusers."""

    layer: Layer
    part: int | None = None


Names = Mapping[str, Slot]  # what stands before the ending of a key


@dataclass(frozen=True)
class Entry:
    """The tensors of one layer, as a program takes them."""

    slot: Slot
    kind: Kind
    tensors: dict[str, Tensor]

    @property
    def eps(self) -> float:
        """Rounding unit of the precision in which the file stores them."""
        return max(torch.finfo(value.dtype).eps for value in self.tensors.values())


@dataclass
class Reading:
    """entries: kohya name -> what changes that layer. unread: keys. refused: why nothing of the file is used."""

    decompose: str
    entries: dict[str, list[Entry]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    refused: str | None = None

    def add(self, entry: Entry) -> None:
        self.entries.setdefault(entry.slot.layer.kohya, []).append(entry)


@dataclass(frozen=True)
class Program:
    """A program that loads adapters. models: those that it has."""

    name: str
    models: frozenset[str]
    read: Callable[[Mapping[str, Tensor], Model], Reading]


def split_key(key: str) -> tuple[str, str]:
    """(what stands before the ending, the ending); no ending where it is unknown."""
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
    """Every layer whose prefix is a name, and whose tensors are of one of these kinds; other keys are unread."""
    known = set(endings)
    for prefix, keys in grouped(tensors).items():
        slot = names.get(prefix)
        own = {SUFFIXES[e]: tensors[key] for e, key in keys.items() if e in known}
        kind = next((KINDS[name] for name in kinds if KINDS[name].claims(own)), None)
        if slot is None or kind is None:
            reading.unread += keys.values()
            continue
        used = {name: value for name, value in own.items() if name in kind.suffixes()}
        reading.unread += [key for e, key in keys.items() if e not in known or SUFFIXES[e] not in used]
        reading.add(Entry(slot, kind, used))
