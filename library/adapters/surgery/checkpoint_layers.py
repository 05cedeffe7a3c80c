# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint in published names holds the layers that adapter files name, found without building the model.

A layer is a tensor of the file, or some rows of one: OpenCLIP has q, k and v in one matrix where adapters have three.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from library.adapters.file_readers import OFT
from library.adapters.formats.architecture import (
    Architecture,
    Encoder,
    NameIndex,
    PublishedLayer,
    blocks_in,
    index_of,
)
from library.key_tables import Shapes, part_rows
from library.weights.weight_files import WeightFile

DENOISER_PREFIXES = ("model.diffusion_model.", "", "diffusion_model.", "net.")
TEXT_LEVEL = "text_model."  # of CLIP; some old files leave it out
TEXT_PROJECTION = "text_projection"  # of CLIP, outside of that level
MOST_ENCODER_BLOCKS = 32  # of CLIP-G: a file of the denoiser alone does not tell how deep the text encoders are
# A text encoder in a file of its own
ALONE_PREFIXES = ("", "model.")
IN_PROJECTION = ("q", "k", "v")


@dataclass(frozen=True)
class WeightLocation:
    """Where a layer lies: its tensors, and which rows of them (None: all)."""

    weight: str
    bias: str
    rows: slice | None = None
    transposed: bool = False
    swapped: bool = False  # the halves of the rows stand in the other order

    def of(self, whole: Tensor) -> Tensor:
        """The layer's weight in the tensor of the file."""
        own = whole if self.rows is None else whole[self.rows]
        own = torch.cat(own.chunk(2)[::-1]) if self.swapped else own
        return own.T if self.transposed else own

    def put(self, whole: Tensor, own: Tensor) -> Tensor:
        """The tensor of the file with this weight in the layer's place."""
        own = own.T if self.transposed else own
        own = torch.cat(own.chunk(2)[::-1]) if self.swapped else own
        if self.rows is None:
            return own
        found = whole.clone()
        found[self.rows] = own
        return found


class CheckpointLayers:
    """The layers that a file of weights has.

    encoder: the part of a comfy name ("clip_l") whose file this is alone; None for a file with a denoiser.
    """

    def __init__(self, architecture: Architecture, shapes: Shapes, *, encoder: str | None = None):
        self.architecture, self.shapes = architecture, shapes
        self.index: NameIndex = index_of(architecture, max(blocks_in(shapes), MOST_ENCODER_BLOCKS))
        found = ((layer, self._place(layer, encoder)) for layer in architecture.layers(blocks_in(shapes)))
        self.places = {layer.kohya: place for layer, place in found if place is not None}

    def canonical(self, name: str) -> PublishedLayer | None:
        """The layer that an adapter file means by `name`, whether this file has it or not."""
        place = self.index.find(f"lora_{name.removeprefix(OFT)}" if name.startswith(OFT) else name)
        return None if place is None or place.part is not None else place.layer

    def placed(self, name: str) -> tuple[PublishedLayer, WeightLocation | None] | None:
        """As `canonical`, and where the layer lies in this file; also for a part of a layer, as diffusers has it."""
        layer = self.canonical(name)
        if layer is not None:
            return layer, self.places.get(layer.kohya)
        found = self.index.find(name)
        if found is None or found.part is None:
            return None
        whole = self.places.get(found.layer.kohya)
        if whole is None:
            return found.layer, None
        rows, inputs, *_ = self.shape_of(whole)
        ends = [0, *itertools.accumulate(part_rows(rows, inputs, len(found.layer.parts)))]
        part = None if len(ends) == 2 else slice(ends[found.part], ends[found.part + 1])
        return found.layer, replace(whole, rows=part, swapped=found.layer.swaps(rows, inputs))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the weight of layer `name`."""
        return self.shape_of(self.places[name])

    def shape_of(self, place: WeightLocation) -> tuple[int, ...]:
        """Shape of the weight at a place."""
        shape = tuple(self.shapes[place.weight])
        shape = shape[::-1] if place.transposed else shape
        return shape if place.rows is None else (place.rows.stop - place.rows.start, *shape[1:])

    def weight(self, file: WeightFile, name: str, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """The weight of layer `name`."""
        place = self.places[name]
        return place.of(file.tensor(place.weight, dtype))

    def _place(self, layer: PublishedLayer, alone: str | None) -> WeightLocation | None:
        """The location of a layer. alone: the text encoder that is all the file holds."""
        prefixes: tuple[str, ...]
        if layer.encoder is None:
            prefixes = () if alone else DENOISER_PREFIXES
            return self._first(prefix + layer.published for prefix in prefixes)
        if alone:
            prefixes = ALONE_PREFIXES if f".{alone}." in f"{layer.encoder.comfy}." else ()
        else:
            prefixes = (*layer.encoder.checkpoint, f"{layer.encoder.comfy}.")
        short = layer.published.removeprefix(TEXT_LEVEL)
        found = self._first(f"{prefix}{path}" for prefix in prefixes for path in (layer.published, short))
        return found if found or alone else self._open_clip(layer, layer.encoder)

    def _first(self, paths: Iterator[str]) -> WeightLocation | None:
        return next((WeightLocation(f"{p}.weight", f"{p}.bias") for p in paths if f"{p}.weight" in self.shapes), None)

    def _open_clip(self, layer: PublishedLayer, encoder: Encoder) -> WeightLocation | None:
        """The same layer in OpenCLIP's names."""
        for prefix in encoder.open_clip:
            if layer.published == TEXT_PROJECTION:  # a matrix of its own, not a layer
                if prefix + TEXT_PROJECTION in self.shapes:
                    return WeightLocation(prefix + TEXT_PROJECTION, "", transposed=True)
                continue
            path, third = open_clip_path(layer.published, encoder.open_clip_names)
            if path.startswith(f"{unused_block(self.shapes, prefix, encoder.used_blocks)}."):
                continue
            if third is None:
                place = self._first(iter([prefix + path]))
            else:
                place = self._third(f"{prefix}{path}.in_proj_weight", f"{prefix}{path}.in_proj_bias", third)
            if place is not None:
                return place
        return None

    def _third(self, weight: str, bias: str, third: int) -> WeightLocation | None:
        if weight not in self.shapes:
            return None
        rows = self.shapes[weight][0] // len(IN_PROJECTION)
        return WeightLocation(weight, bias, slice(third * rows, (third + 1) * rows))


def unused_block(shapes: Shapes, prefix: str, used: int | None) -> str | None:
    """Name of the block behind the `used` ones, which no picture depends on, below `prefix`; None without one.

    The model was trained on the output before it, and some files leave it out.
    """
    if used is None:
        return None
    block = re.compile(re.escape(f"{prefix}transformer.resblocks.") + r"(\d+)\.")
    count = 1 + max((int(found[1]) for found in map(block.match, shapes) if found), default=-1)
    return None if count in (0, used) else f"transformer.resblocks.{count - 1}"


def open_clip_path(path: str, names: Mapping[str, str]) -> tuple[str, int | None]:
    """OpenCLIP's name of a layer that transformers calls `path`; for q, k and v the attention and which third it is.

    names: path within a block -> the same in OpenCLIP.
    """
    short = path.removeprefix(TEXT_LEVEL)
    if short == "final_layer_norm":
        return "ln_final", None
    number, _, inner = short.removeprefix("encoder.layers.").partition(".")
    block = f"transformer.resblocks.{number}"
    start, _, end = inner.rpartition(".")
    if start == "self_attn" and end[0] in IN_PROJECTION and end.endswith("_proj") and len(end) == len("q_proj"):
        return f"{block}.attn", IN_PROJECTION.index(end[0])
    return f"{block}.{names[inner]}", None
