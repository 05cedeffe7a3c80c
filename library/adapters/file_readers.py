# SPDX-License-Identifier: Apache-2.0
"""Readers for every kind of adapter that a file may hold, for inference and merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.formats.adapter_files import by_module
from library.adapters.formats.layer_tensors import BIAS_ADDED
from library.adapters.kind import LayerReader
from library.adapters.layers.factor import FactorSettings
from library.adapters.layers.loha import LoHaLayer
from library.adapters.layers.lokr import LoKrLayer, LokrSettings
from library.adapters.layers.lora import LoRALayer, LoraSettings
from library.adapters.layers.norm import NormLayer
from library.adapters.layers.oft import OFTLayer, OftSettings
from library.adapters.layers.rewrite import RewriteLayer
from library.adapters.target_spec import TargetSpec

OFT = "oft_"  # prefix of names in OFT files of sd-scripts, in place of lora_


@dataclass(frozen=True)
class ReaderWithSettings:
    """A layer class with settings of its own, since a network for inference may hold layers of several kinds."""

    layer: LayerReader
    settings: Any

    def claims(self, names: set[str]) -> bool:
        return self.layer.claims(names)

    def from_tensors(self, target: TargetSpec, tensors: Mapping[str, Tensor], settings: Any) -> AdapterLayer:
        return self.layer.from_tensors(target, tensors, self.settings)


# DyLoRA and LoRA-FA files are LoRA files. Where alpha is 0, rotations of LyCORIS have no bound; those of sd-scripts do
# not turn at all.
READERS = (
    ReaderWithSettings(LoRALayer, LoraSettings()),
    ReaderWithSettings(LoHaLayer, FactorSettings()),
    ReaderWithSettings(LoKrLayer, LokrSettings()),
    ReaderWithSettings(NormLayer, LoraSettings()),
    ReaderWithSettings(RewriteLayer, None),
)
OFT_READERS = (ReaderWithSettings(OFTLayer, OftSettings()),)


def reader_of(name: str, own: Mapping[str, Tensor]) -> ReaderWithSettings | None:
    """The reader for a layer of a file; None for an unknown kind."""
    readers: Sequence[ReaderWithSettings] = OFT_READERS if name.startswith(OFT) else READERS
    return next((reader for reader in readers if reader.claims(set(own))), None)


def pieces(own: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of a layer, split into adapters: a change of the bias may stand beside any kind."""
    if BIAS_ADDED not in own or len(own) == 1 or "diff" in own:
        return [dict(own)]
    rest = {name: value for name, value in own.items() if name != BIAS_ADDED}
    return [rest, {BIAS_ADDED: own[BIAS_ADDED]}]


def is_readable(weights: Mapping[str, Tensor]) -> bool:
    """Whether `READERS` read every layer of a file."""
    layers = by_module(weights).values()
    return bool(layers) and all(any(reader.claims(set(own)) for reader in READERS) for own in layers)
