# SPDX-License-Identifier: Apache-2.0
"""The header of a .safetensors file: strictly read, for it may be damaged or hostile.

Format of safetensors: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from library.errors import UserError
from library.text_files import parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
LARGEST = 1 << 63  # number of a header
METADATA = "__metadata__"


class TensorEntry(NamedTuple):
    """Where one tensor lies, in bytes from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsHeader(NamedTuple):
    """What a file says of its tensors."""

    metadata: dict[str, str]
    entries: dict[str, TensorEntry]
    start: int  # of the data in the file


def read_header(path: Path) -> SafetensorsHeader:
    """Raises UserError when the file is not a safetensors file, is damaged or is cut short."""
    with path.open("rb") as file:
        head = file.read(64)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 10 or head[8:9] != b"{" or length > MAX_HEADER_BYTES:
            raise UserError(f"{path} is not a safetensors file: {_looks_like(head)}")
        file.seek(8)
        raw = file.read(length)
        size = file.seek(0, 2)
    if len(raw) < length:
        raise UserError(f"{path} is cut short inside its header; download or copy it again")
    try:
        content = parse_json(raw, finite=True)
    except ValueError as error:
        problem = f"its header is not readable ({error}); download or copy it again"
        raise UserError(f"{path} is damaged: {problem}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: its header is not a table of tensors")
    metadata = content.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path} is damaged: {METADATA} of its header is not a table of strings")
    header = SafetensorsHeader(
        metadata, {name: _entry(path, name, value) for name, value in content.items()}, 8 + length
    )
    _check_places(path, header, size)
    return header


def _entry(path: Path, name: str, value: Any) -> TensorEntry:
    if not name.isprintable():
        raise UserError(f"{path} is damaged: a tensor in its header is called {reprlib.repr(name)}")
    try:
        kind, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        is_whole = all(type(number) is int and 0 <= number < LARGEST for number in (*shape, begin, end))
        known = DTYPES.get(kind)
    except (KeyError, TypeError, ValueError):
        is_whole, known = False, None
    if not is_whole:
        raise UserError(f"{path} is damaged: its header says {reprlib.repr(value)} of {_short(name)}")
    if known is None:
        raise UserError(f"{path}: {_short(name)} is stored as {reprlib.repr(kind)}, which is not read here or damaged")
    needed = known.itemsize * math.prod(shape)
    if end - begin != needed:
        needs = str(needed) if needed < LARGEST else "more than there are"
        raise UserError(f"{path} is damaged: {_short(name)} has {end - begin} bytes, its shape needs {needs}")
    return TensorEntry(known, shape, begin, end)


def _short(name: str) -> str:
    return name if len(name) < 200 else f"{name[:200]}..."


def _check_places(path: Path, header: SafetensorsHeader, size: int) -> None:
    """The tensors lie inside the file, one after the other."""
    end, before = 0, ""
    for name, entry in sorted(header.entries.items(), key=lambda item: item[1][2:]):
        if entry.begin < end and entry.begin != entry.end:
            raise UserError(f"{path} is damaged: {_short(name)} lies over {_short(before)} in it")
        end, before = max(end, entry.end), name
    if size < header.start + end:
        needed = header.start + end
        raise UserError(f"{path} is cut short: {size} of {needed} bytes are there; download or copy it again")


def _looks_like(head: bytes) -> str:
    """Guess from the first bytes what a file that is not a safetensors file is."""
    kinds = {
        b"version https://git-lfs": "it is a git-lfs pointer; fetch the file itself (git lfs pull)",
        b"<": "it looks like a web page; download the file itself",
        b"PK\x03\x04": "it is a torch checkpoint; rename it to .ckpt",
        b"\x80": "it is a pickle; rename it to .ckpt",
    }
    if not head:
        return "it is empty; download or copy it again"
    return next((text for start, text in kinds.items() if head.startswith(start)), "it does not begin like one")
