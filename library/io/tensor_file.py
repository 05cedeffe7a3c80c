# SPDX-License-Identifier: Apache-2.0
"""Writer of the safetensors format, tensor by tensor: 8 bytes of header length, JSON header, tensor data.

In contrast to the safetensors package, this keeps one tensor in memory at a time, reports the system's error code when
the disk is full, and defines the order of the data, on which the hashes of `metadata.py` depend. Reading is done by the
package. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.byte_paths import plain_path
from library.io.atomic import SaveError

# torch dtype -> name in the header, in the order in which safetensors writes them (widest alignment first)
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def ordered_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensor names in file order: by dtype, widest first, then by name."""
    rank = {dtype: i for i, dtype in enumerate(DTYPE_NAMES)}
    return sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the tensor data: length and JSON header, padded with spaces to a multiple of 8."""
    table: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in ordered_names(tensors):
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def data_chunks(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The raw little-endian bytes of the tensors, in file order."""
    for name in ordered_names(tensors):
        flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data


def data_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Number of bytes of all tensor data."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write the file. Returns the sha256 of its tensor data. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        file.write(header_bytes(tensors, metadata))
        for chunk in data_chunks(tensors):
            file.write(chunk)
            digest.update(chunk)
    return digest.hexdigest()


def check_safetensors(path: Path, expected_digest: str) -> None:
    """Read a file back with the safetensors package and compare the sha256 of its tensor data.

    Raises SaveError when it differs from `expected_digest`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with plain_path(path) as readable, safe_open(readable, framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        raise SaveError(f"{path.parent}: what was written does not read back: {error}") from error
    if data_digest(path) != expected_digest:
        raise SaveError(f"{path.parent}: what was written reads back with other content")


def data_digest(path: Path) -> str:
    """sha256 of the tensor data of a safetensors file on disk."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + length)
        return stream_digest(file)


def stream_digest(file, chunk: int = 1 << 20) -> str:
    """sha256 of the rest of an open binary file."""
    digest = hashlib.sha256()
    while block := file.read(chunk):
        digest.update(block)
    return digest.hexdigest()
