# SPDX-License-Identifier: Apache-2.0
"""Files of weights: names and shapes first (milliseconds), then tensor by tensor, in the file's dtype or another.

A tensor that is wanted as it lies in the file is mapped: it takes memory only where it is touched, and no copy is made.
A tensor that is wanted in another dtype is read and cast alone, so the peak is what is kept plus one tensor.
Scales that files of 8-bit weights have beside them are applied here: no reader of weights meets one.
Format of safetensors: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import pickle
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.byte_paths import plain_path
from library.errors import UserError, first_names
from library.text_files import parse_json

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
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
READ_NUMBERS = 1 << 20  # numbers that are read at a time when they are cast
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
COUNTS = ("epoch", "global_step")  # numbers that a .ckpt has beside its tensors
PART_NAME = re.compile(r"(.+)-\d{5}-of-(\d{5})(\..+)")


class WeightFile(ABC):
    """Named tensors of one file, or of the parts of a split one."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    is_float8: bool = False  # whether weights of it are stored in 8 bits: nothing computes in them
    counts: Mapping[str, int] = {}  # what a .ckpt says of its training: "epoch", "global_step"

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that its weights are read from."""
        return (self.path,)

    @abstractmethod
    def release(self) -> None:
        """Let go of the file's mapping: what it takes of memory is given back when the last tensor of it is gone."""

    @abstractmethod
    def tensor(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """One tensor; integers keep their dtype. Without a cast it is mapped if possible: do not overwrite the file."""

    def copy(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """The same, not mapped: for a tensor of which only another arrangement is kept."""
        return self.tensor(name, dtype, device)

    def dtype(self, name: str) -> torch.dtype:
        """Of `tensor(name)`."""
        return self.tensor(name).dtype

    def stored(self, name: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor] | None:
        """An fp8 matrix as it lies in the file, and a float32 scale for each of its rows; None for any other tensor."""
        if not self.is_float8 or len(self.shapes[name]) < 2:
            return None
        data = self.tensor(name)  # mapped where possible: any other tensor is not read
        return (data.to(device), torch.ones(len(data), device=device)) if data.dtype in FLOAT8 else None


class SafetensorsFile(WeightFile):
    """A .safetensors file. Raises UserError when it is not one, or is cut short."""

    def __init__(self, path: Path):
        self.path = path
        header, self._start = _read_header(path)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._entries = {name: _Entry.read(path, name, value) for name, value in header.items()}
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.is_float8 = any(entry.dtype in FLOAT8 for entry in self._entries.values())
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

    def copy(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        entry = self._entries[name]
        return self._read(entry, _wanted_dtype(entry.dtype, dtype)).to(device)

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def release(self) -> None:
        self._mapped = None

    def _map(self, entry: _Entry) -> Tensor:
        if self._mapped is None:
            # a private mapping: training in place changes our pages, never the file
            with plain_path(self.path) as path:
                self._mapped = torch.UntypedStorage.from_file(path, False, self.path.stat().st_size)
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
        header = parse_json(raw)
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

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], counts: Mapping[str, int] | None = None):
        self.path, self.counts = path, counts or {}
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.is_float8 = any(tensor.dtype in FLOAT8 for tensor in tensors.values())

    def tensor(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        tensor = self._tensors[name]
        return tensor.to(device=device, dtype=_wanted_dtype(tensor.dtype, dtype))

    def release(self) -> None:
        """Nothing: these tensors cannot be read a second time."""


class CompletedFile(WeightFile):
    """A file together with tensors that it lacks."""

    def __init__(self, file: WeightFile, more: Mapping[str, Tensor]):
        self.path, self.is_float8, self._file = file.path, file.is_float8, file
        self._more = TensorsFile(file.path, more)
        self.shapes = {**self._more.shapes, **file.shapes}

    @property
    def files(self) -> tuple[Path, ...]:
        return self._file.files

    def release(self) -> None:
        self._file.release()

    def tensor(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        return self._holder(name).tensor(name, dtype, device)

    def dtype(self, name: str) -> torch.dtype:
        return self._holder(name).dtype(name)

    def _holder(self, name: str) -> WeightFile:
        return self._file if name in self._file.shapes else self._more

    def stored(self, name: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor] | None:
        return (self._file if name in self._file.shapes else self._more).stored(name, device)


class SplitFile(WeightFile):
    """Weights split over several files. places: the file of each name."""

    def __init__(self, path: Path, files: Mapping[str, WeightFile], places: Mapping[str, str]):
        self.path = path
        self._files, self._places = files, places
        lost = [name for name, file in places.items() if name not in files[file].shapes]
        if lost:
            raise UserError(f"{path}: {places[lost[0]]} lacks {lost[0]}, which the index says is there")
        self.shapes = {name: files[file].shapes[name] for name, file in places.items()}
        self.is_float8 = any(file.is_float8 for file in files.values())

    @classmethod
    def of_index(cls, path: Path) -> SplitFile:
        """By an index file (`{"weight_map": {name: file}}`)."""
        try:
            places: dict[str, str] = parse_json(path.read_bytes())["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not readable as an index of weight files") from None
        return cls(path, {name: _open_file(path.parent / name) for name in sorted(set(places.values()))}, places)

    @classmethod
    def of_parts(cls, path: Path, names: Sequence[str]) -> SplitFile:
        """By the names of all parts, which are beside `path`, one of them."""
        missing = [name for name in names if not (path.parent / name).is_file()]
        if missing:
            raise UserError(f"{path} is one of {len(names)} parts, and {first_names(missing)} is not beside it")
        files = {name: _open_file(path.parent / name) for name in names}
        return cls(path, files, {name: part for part, file in files.items() for name in file.shapes})

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path, *(file.path for file in self._files.values()))

    def release(self) -> None:
        for file in self._files.values():
            file.release()

    def tensor(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        return self._files[self._places[name]].tensor(name, dtype, device)

    def dtype(self, name: str) -> torch.dtype:
        return self._files[self._places[name]].dtype(name)


# ---- scaled 8-bit weights -------------------------------------------------------------------------------------------

# ComfyUI's names beside `<module>.weight`: the older ones, and those of its `comfy_quant` files
SCALES = ("scale_weight", "weight_scale")
SCALE_EXTRAS = ("scale_input", "input_scale", "comfy_quant")  # of computing in 8 bits, which is not done here
SCALE_MARKER = "scaled_fp8"  # an empty tensor that says which kind of 8 bits the file has
FLOAT8_FORMATS = ("float8_e4m3fn", "float8_e5m2")


class ScaledFile(WeightFile):
    """A file whose matrices are `weight * scale`, shown as if it held the products."""

    def __init__(self, file: WeightFile):
        self.path, self._file = file.path, file
        self._scales = {
            f"{name.rpartition('.')[0]}.weight": name for name in file.shapes if name.rpartition(".")[2] in SCALES
        }
        extras = {*SCALES, *SCALE_EXTRAS, SCALE_MARKER}
        self.shapes = {name: shape for name, shape in file.shapes.items() if name.rpartition(".")[2] not in extras}
        self.is_float8 = True
        self._check()

    @property
    def files(self) -> tuple[Path, ...]:
        return self._file.files

    def release(self) -> None:
        self._file.release()

    def _check(self) -> None:
        """Other formats of `comfy_quant`, such as 4 bits, have the same names for other things."""
        for name in (n for n in self._file.shapes if n.endswith(".comfy_quant")):
            text = self._file.tensor(name).numpy().tobytes()
            try:
                kind = parse_json(text)["format"]
            except (ValueError, KeyError, TypeError):
                kind = "unreadable"
            if kind not in FLOAT8_FORMATS:
                known = " and ".join(FLOAT8_FORMATS)
                raise UserError(f"{self.path}: {name} says that weights are stored as {kind}; {known} can be read")

    def tensor(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Scaled tensors are multiplied in float32, and are float32 without a dtype."""
        if name not in self._scales:
            return self._file.tensor(name, dtype, device)
        scale = self._file.tensor(self._scales[name], torch.float32, device)
        weight = self._file.tensor(name, torch.float32, device)
        if scale.numel() == 1:
            scale = scale.reshape(())
        elif scale.shape == weight.shape[:1]:  # one per row
            scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
        return (weight * scale).to(dtype or torch.float32)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._scales else self._file.dtype(name)

    def stored(self, name: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor] | None:
        found = self._file.stored(name, device)
        if found is None or name not in self._scales:
            return found
        data, ones = found
        scale = self._file.tensor(self._scales[name], torch.float32, device).flatten()
        return (data, scale * ones) if len(scale) in (1, len(ones)) else None


# ---- opening --------------------------------------------------------------------------------------------------------


def open_weights(path: Path) -> WeightFile:
    """The reader for a file, by its name. Raises UserError when it is missing, damaged or of another kind.

    One part of a split file (`x-00001-of-00003.safetensors`) stands for all of them.
    """
    if path.name.endswith(".index.json") and path.is_file():
        return _unscaled(SplitFile.of_index(path))
    part = PART_NAME.fullmatch(path.name)
    if part is None or not path.is_file():
        return _unscaled(_open_file(path))
    start, count, ending = part.groups()
    names = [f"{start}-{i:05d}-of-{count}{ending}" for i in range(1, int(count) + 1)]
    return _unscaled(SplitFile.of_parts(path, names))


def _unscaled(file: WeightFile) -> WeightFile:
    ends = {name.rpartition(".")[2] for name in file.shapes}
    return ScaledFile(file) if ends & {*SCALES, SCALE_MARKER} else file


def _open_file(path: Path) -> WeightFile:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
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
        with torch.serialization.safe_globals(inert), warnings.catch_warnings(), plain_path(path) as readable:
            warnings.simplefilter("ignore")  # about the pickle's protocol
            content = torch.load(readable, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {_refusal(str(error))}; use the .safetensors file of this model") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        raise UserError(f"{path} is damaged or no torch checkpoint; download or copy it again") from None
    tensors = _find_tensors(content)
    if not tensors:
        raise UserError(f"{path} holds no named weights, so it is no model")
    counts = {name: content[name] for name in COUNTS if isinstance(content.get(name), int)}
    return TensorsFile(path, tensors, counts)


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
