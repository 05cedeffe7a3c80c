# SPDX-License-Identifier: Apache-2.0
"""Conversion of named tensors to bytes and back; the way back makes no copy."""

from __future__ import annotations

import functools
import json
import math
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "uint8": torch.uint8,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64  # bytes; a tensor of any dtype can be a view of the bytes read

Tensors = Mapping[str, Tensor]


def view_bytes(data: Tensor) -> memoryview:
    """The memory of a uint8 tensor on the CPU."""
    return memoryview(data.numpy())  # type: ignore[arg-type]


class Packed(NamedTuple):
    """A record as bytes: consecutive parts, and the JSON layout needed to split them."""

    parts: list[memoryview]
    length: int
    checksum: int
    layout: str


def pack(tensors: Tensors) -> Packed:
    """The bytes of the tensors, each padded to ALIGNMENT. Raises ValueError for a dtype that is not in DTYPES."""
    parts: list[memoryview] = []
    layout, length, checksum = [], 0, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"a tensor of dtype {tensor.dtype} cannot be stored")
        layout.append((name, NAMES[tensor.dtype], tuple(tensor.shape)))
        data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        for part in (view_bytes(data), memoryview(bytes(-data.numel() % ALIGNMENT))):
            if part.nbytes:
                parts.append(part)
                length += part.nbytes
                checksum = zlib.crc32(part, checksum)
    return Packed(parts, length, checksum, json.dumps(layout))


@functools.lru_cache(maxsize=4096)
def _slices(layout: str) -> tuple[tuple[str, torch.dtype, tuple[int, ...], int, int], ...]:
    """(name, dtype, shape, first byte, end byte) of every tensor of a layout."""
    result, start = [], 0
    for name, dtype_name, shape in json.loads(layout):
        if any(type(side) is not int or side < 0 for side in shape):
            raise ValueError(f"a tensor of shape {shape}")
        dtype = DTYPES[dtype_name]
        end = start + dtype.itemsize * math.prod(shape)
        result.append((name, dtype, tuple(shape), start, end))
        start = end + -end % ALIGNMENT
    return tuple(result)


@functools.lru_cache(maxsize=4096)
def layout_bytes(layout: str) -> int | None:
    """Length of a record of this layout; None if `pack` could not have written it."""
    try:
        slices = _slices(layout)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not all(type(name) is str for name, *_ in slices):
        return None
    end = slices[-1][-1] if slices else 0
    return end + -end % ALIGNMENT


def unpack(buffer: Tensor, layout: str) -> dict[str, Tensor]:
    """Named views of the bytes (uint8, 1-dim), the inverse of `pack`."""
    return {name: buffer[start:end].view(dtype).view(shape) for name, dtype, shape, start, end in _slices(layout)}
