# SPDX-License-Identifier: Apache-2.0
"""Files of weights: names and shapes first (milliseconds), then tensor by tensor, in the file's dtype or another.

A tensor that is wanted as it lies in the file is mapped: it takes memory only where it is touched, and no copy is made.
A tensor that is wanted in another dtype is read and cast alone, so the peak is what is kept plus one tensor.
Format of safetensors: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
READ_NUMBERS = 1 << 20  # numbers that are read at a time when they are cast
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)


class WeightFile(ABC):
    """Named tensors of one file, or of the parts of a split one."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    is_float8: bool = False  # whether weights of it are stored in 8 bits: nothing computes in them

    @abstractmethod
    def tensor(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """One tensor; integers keep their dtype. Without a cast it is mapped if possible: do not overwrite the file."""


class SafetensorsFile(WeightFile):
    """A .safetensors file. Raises UserError when it is not one, or is cut short."""

    def __init__(self, path: Path):
        self.path = path
        header, self._start = _read_header(path)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._entries = {name: _Entry.read(path, name, value) for name, value in header.items()}
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        needed = self._start + max((entry.end for entry in self._entries.values()), default=0)
        size = path.stat().st_size
        if size < needed:
            raise UserError(f"{path} is cut short: {size} of {needed} bytes are there; download or copy it again")
        self._mapped: Any = None  # torch.UntypedStorage

    def tensor(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        entry = self._entries[name]
        wanted = _wanted_dtype(entry.dtype, dtype)
        stays = wanted == entry.dtype or torch.device(device).type != "cpu"  # another device casts faster than we read
        aligned = (self._start + entry.begin) % entry.dtype.itemsize == 0
        tensor = self._map(entry) if stays and aligned else self._read(entry, wanted)
        return tensor.to(device).to(wanted)

    def _map(self, entry: _Entry) -> Tensor:
        if self._mapped is None:
            # a private mapping: training in place changes our pages, never the file
            self._mapped = torch.UntypedStorage.from_file(str(self.path), False, self.path.stat().st_size)
        # a storage of its own for each tensor: saving one must not drag the whole file along
        flat = torch.asarray(self._mapped[self._start + entry.begin : self._start + entry.end], dtype=torch.uint8)
        return flat.view(entry.dtype).reshape(entry.shape)

    def _read(self, entry: _Entry, dtype: torch.dtype) -> Tensor:
        """Read and cast through a small buffer, so that nothing but the result takes memory."""
        result = torch.empty(entry.shape, dtype=dtype)
        flat, buffer = result.view(-1), torch.empty(READ_NUMBERS, dtype=entry.dtype)
        with self.path.open("rb") as file:
            file.seek(self._start + entry.begin)
            for part in flat.split(READ_NUMBERS) if len(flat) else ():
                source = buffer[: len(part)]
                file.readinto(source.view(torch.uint8).numpy().data)
                part.copy_(source)
        return result


class _Entry:
    """Where one tensor lies, in bytes from the end of the header."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], begin: int, end: int):
        self.dtype, self.shape, self.begin, self.end = dtype, shape, begin, end

    @classmethod
    def read(cls, path: Path, name: str, value: Any) -> _Entry:
        try:
            dtype, shape = DTYPES[value["dtype"]], tuple(int(n) for n in value["shape"])
            begin, end = (int(n) for n in value["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path} is damaged: its header says {value!r} of {name}") from None
        count = dtype.itemsize
        for n in shape:
            count *= n
        if begin < 0 or end - begin != count:
            raise UserError(f"{path} is damaged: {name} has {end - begin} bytes, its shape needs {count}")
        return cls(dtype, shape, begin, end)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header, and where the data start."""
    with path.open("rb") as file:
        head = file.read(64)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 10 or head[8:9] != b"{" or length > MAX_HEADER_BYTES:
            raise UserError(f"{path} is not a safetensors file: {_looks_like(head)}")
        file.seek(8)
        raw = file.read(length)
    if len(raw) < length:
        raise UserError(f"{path} is cut short inside its header; download or copy it again")
    try:
        header = json.loads(raw)
    except ValueError:
        raise UserError(f"{path} is damaged: its header is not readable; download or copy it again") from None
    return header, 8 + length


def _looks_like(head: bytes) -> str:
    """What a file that is no safetensors file seems to be, from its first bytes."""
    kinds = {
        b"version https://git-lfs": "it is a git-lfs pointer; fetch the file itself (git lfs pull)",
        b"<": "it looks like a web page; download the file itself",
        b"PK\x03\x04": "it is a torch checkpoint; rename it to .ckpt",
        b"\x80": "it is a pickle; rename it to .ckpt",
    }
    if not head:
        return "it is empty; download or copy it again"
    return next((text for start, text in kinds.items() if head.startswith(start)), "it does not begin like one")


class TensorsFile(WeightFile):
    """Tensors that are already there: a torch checkpoint."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]):
        self.path = path
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def tensor(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        tensor = self._tensors[name]
        return tensor.to(device=device, dtype=_wanted_dtype(tensor.dtype, dtype))


class CompletedFile(WeightFile):
    """A file together with tensors that it lacks."""

    def __init__(self, file: WeightFile, more: Mapping[str, Tensor]):
        self.path, self.is_float8, self._file = file.path, file.is_float8, file
        self._more = TensorsFile(file.path, more)
        self.shapes = {**self._more.shapes, **file.shapes}

    def tensor(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        file = self._file if name in self._file.shapes else self._more
        return file.tensor(name, dtype, device)


class SplitFile(WeightFile):
    """Weights split over several files by an index (`{"weight_map": {name: file}}`)."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._places: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not readable as an index of weight files") from None
        self._files = {name: open_weights(path.parent / name) for name in sorted(set(self._places.values()))}
        lost = [n for n, file in self._places.items() if n not in self._files[file].shapes]
        if lost:
            raise UserError(f"{path}: {self._places[lost[0]]} lacks {lost[0]}, which the index says is there")
        self.shapes = {name: self._files[file].shapes[name] for name, file in self._places.items()}

    def tensor(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        return self._files[self._places[name]].tensor(name, dtype, device)


def open_weights(path: Path) -> WeightFile:
    """The reader for a file, by its ending. Raises UserError when it is missing, damaged or of another kind."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.name.endswith(".index.json"):
        return SplitFile(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _open_torch(path)
    raise UserError(f"{path}: weights are read from {', '.join(WEIGHT_SUFFIXES)} files")


def _wanted_dtype(stored: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    return asked if asked is not None and stored.is_floating_point else stored


# ---- torch checkpoints ----------------------------------------------------------------------------------------------


class _Ignored:
    """Stands for a class that a checkpoint only names (Lightning's callbacks are listed by class)."""


INERT_NAMES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
)


def _open_torch(path: Path) -> TensorsFile:
    """A .ckpt / .pt file, read without running any code of it. Its tensors may lie below `state_dict`."""
    inert: list[Any] = [(_Ignored, name) for name in INERT_NAMES]
    try:
        with torch.serialization.safe_globals(inert), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {_refusal(str(error))}; use the .safetensors file of this model") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        raise UserError(f"{path} is damaged or no torch checkpoint; download or copy it again") from None
    tensors = _find_tensors(content)
    if not tensors:
        raise UserError(f"{path} holds no named weights, so it is no model")
    return TensorsFile(path, tensors)


def _is_zip(path: Path) -> bool:
    """True for the layout that torch writes since 1.6; only that one can be mapped."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _refusal(message: str) -> str:
    """What torch did not want to load, from the middle of its long message."""
    named = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", message)
    if named:
        return f"it wants to run code ({named.group(1)}), which a model file has no need of"
    return "it is damaged, or holds more than tensors"


def _find_tensors(content: Any) -> dict[str, Tensor]:
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        return {}
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
