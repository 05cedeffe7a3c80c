# SPDX-License-Identifier: Apache-2.0
"""OFT files: kohya's (sd-scripts and this program read them) and ComfyUI's, which has the same rotations.

kohya   oft_unet_<path>.oft_blocks, or .oft_blocks.0, .oft_blocks.1 for the parts of a fused layer; alpha: the bound of
        the rotation, times the rows of the layer
comfy   diffusion_model.<path>.oft_blocks; parts of a fused layer have their names in diffusers; alpha: the bound itself
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from library.adapters.formats.adapter_files import by_module
from library.adapters.formats.architecture import NameIndex, PublishedLayer, Tables, blocks_in, index_of
from library.adapters.formats.recognition import OFT_PREFIX
from library.errors import UserError, first_names

LORA = "lora_unet_"
BLOCKS, ALPHA = "oft_blocks", "alpha"


def is_oft(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are rotations that this program can have written; LyCORIS has names of its own for its OFT."""
    return any(key.startswith(OFT_PREFIX) for key in tensors) or any(
        key.endswith(f".{BLOCKS}") and "." in key.removesuffix(f".{BLOCKS}") for key in tensors
    )


def is_bounded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether this is a comfy file of nothing but rotations with a bound: those have names in kohya's format."""
    own = _by_path(tensors)
    return bool(own) and all(set(found) == {BLOCKS, ALPHA} and bool(found[ALPHA].any()) for found in own.values())


def convert_oft(tensors: Mapping[str, Tensor], to: str, tables: Tables) -> dict[str, Tensor]:
    """The tensors in format `to`: kohya or comfy. tables: the architectures that are possible.

    Raises UserError for layers without a name there.
    """
    is_kohya = any(key.startswith(OFT_PREFIX) for key in tensors)
    if to == "peft":
        raise UserError(f"OFT has no names in other formats than kohya and comfy: {first_names([*tensors])}")
    own = by_module(tensors) if is_kohya else _by_path(tensors)
    index = _index([path.replace(OFT_PREFIX, LORA) for path in own], tables)
    if is_kohya == (to == "kohya"):
        return dict(tensors)
    return _to_comfy(own, index) if is_kohya else _to_kohya(own, index)


def _by_path(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer's path in a comfy file -> suffix -> tensor."""
    own: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        path, _, suffix = key.rpartition(".")
        own.setdefault(path, {})[suffix] = value
    return own


def _index(paths: list[str], tables: Tables) -> NameIndex:
    indices = [index_of(architecture, blocks_in(paths)) for architecture in tables]
    unknown = {id(index): [path for path in paths if index.find(path) is None] for index in indices}
    index = min(indices, key=lambda index: len(unknown[id(index)]))
    if unknown[id(index)]:
        count, names = len(unknown[id(index)]), first_names(unknown[id(index)])
        raise UserError(f"{count} layers of the OFT file are not in {index.architecture.title}: {names}")
    return index


def _to_comfy(own: Mapping[str, Mapping[str, Tensor]], index: NameIndex) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, tensors in own.items():
        place = index.find(path.replace(OFT_PREFIX, LORA))
        assert place is not None
        blocks = [value for name, value in tensors.items() if name.startswith(BLOCKS)]
        for name, value in zip(_comfy_names(place.layer, len(blocks)), blocks, strict=True):
            found[f"{name}.{BLOCKS}"] = value
            if ALPHA in tensors:
                found[f"{name}.{ALPHA}"] = _times(tensors[ALPHA], _rows(value))
    return found


def _comfy_names(layer: PublishedLayer, count: int) -> tuple[str, ...]:
    if count == 1:
        return (layer.comfy,)
    if count != len(layer.parts):
        raise UserError(f"{layer.kohya}: {count} rotations of one layer have no names in the comfy format")
    return layer.parts


def _to_kohya(own: Mapping[str, Mapping[str, Tensor]], index: NameIndex) -> dict[str, Tensor]:
    found: dict[str, dict[str, Tensor]] = {}
    for path, tensors in own.items():
        place = index.find(path)
        assert place is not None
        blocks, bound = tensors[BLOCKS], tensors.get(ALPHA)
        if bound is None or not float(bound):
            raise UserError(f"{path}: an OFT without a bound (alpha) has no name in the kohya format")
        layer = found.setdefault(place.layer.kohya.replace(LORA, OFT_PREFIX), {ALPHA: _times(bound, 1 / _rows(blocks))})
        numbered = index.architecture.numbered_oft
        layer[f"{BLOCKS}.{place.part or 0}" if numbered else BLOCKS] = blocks
    return {f"{name}.{suffix}": value for name, layer in found.items() for suffix, value in layer.items()}


def _rows(blocks: Tensor) -> int:
    return blocks.shape[0] * blocks.shape[1]


def _times(alpha: Tensor, factor: float) -> Tensor:
    """In float32, whatever the weights are in: a bound of a few thousandths has few digits in half precision."""
    return (alpha.double() * factor).to(torch.float32)
