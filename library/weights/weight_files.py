# SPDX-License-Identifier: Apache-2.0
"""Files of weights: names and shapes first (milliseconds), then tensor by tensor, in the file's dtype or another.

A tensor that is wanted as it lies in the file is mapped: it takes memory only where it is touched, and no copy is made.
A tensor that is wanted in another dtype is read and cast alone, so the peak is what is kept plus one tensor.
Scales that files of 8-bit weights have beside them are applied here: no reader of weights meets one.
Format of safetensors: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.byte_paths import plain_path
from library.errors import UserError, first_names
from library.text_files import parse_json
from library.weights.safetensors_header import TensorEntry, read_header
from library.weights.torch_files import named_tensors, read_pickle

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
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
        """Files that its weights are read from."""
        return (self.path,)

    def source(self, name: str) -> Path:
        """The file that a name belongs to, whether it is there or not: for messages."""
        return self.path

    @abstractmethod
    def release(self) -> None:
        """Let go of the file's mapping: what it takes of memory is given back when the last tensor of it is gone."""

    @abstractmethod
    def tensor(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """One tensor; integers keep their dtype. Without a cast it is mapped if possible: do not overwrite the file."""

    def copy(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """`tensor`, but never mapped: for a tensor of which only another arrangement is kept."""
        return self.tensor(name, dtype, device)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of `tensor(name)`."""
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
        self.metadata, self._entries, self._start = read_header(path)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.is_float8 = any(entry.dtype in FLOAT8 for entry in self._entries.values())
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

    def _map(self, entry: TensorEntry) -> Tensor:
        if self._mapped is None:
            # a private mapping: training in place changes our pages, never the file
            with plain_path(self.path) as path:
                self._mapped = torch.UntypedStorage.from_file(path, False, self.path.stat().st_size)
        # a storage of its own for each tensor: saving one must not drag the whole file along
        flat = torch.asarray(self._mapped[self._start + entry.begin : self._start + entry.end], dtype=torch.uint8)
        return flat.view(entry.dtype).reshape(entry.shape)

    def _read(self, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
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
            places = parse_json(path.read_bytes())["weight_map"]
            names = sorted(set(places.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is not readable as an index of weight files") from None
        if not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path} is not readable as an index of weight files: its weight_map names none")
        outside = [name for name in names if not name.isprintable() or Path(name).name != name or "\\" in name]
        if outside:
            raise UserError(f"{path} names {outside[0][:200]!r}: the files of an index lie beside it")
        files = {name: _open_file(path.parent / name) for name in names}
        # what the index leaves out is in the model all the same
        return cls(path, files, {**_places(path, files), **places})

    @classmethod
    def of_parts(cls, path: Path, names: Sequence[str]) -> SplitFile:
        """By the names of all parts, which are beside `path`, one of them."""
        missing = [name for name in names if not (path.parent / name).is_file()]
        if missing:
            raise UserError(f"{path} is one of {len(names)} parts, and {first_names(missing)} is not beside it")
        files = {name: _open_file(path.parent / name) for name in names}
        return cls(path, files, _places(path, files))

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


class JoinedFile(WeightFile):
    """Several files as one. parts: start of names here -> a file, and what its names begin with instead.

    A name belongs to the first start that it has.
    """

    def __init__(self, path: Path, parts: Mapping[str, tuple[WeightFile, str]]):
        self.path, self._parts = path, parts
        names = (
            start + name.removeprefix(own)
            for start, (file, own) in parts.items()
            for name in file.shapes
            if name.startswith(own)
        )
        places = {name: self._place(name) for name in names}
        self.shapes = {name: file.shapes[own] for name, (file, own) in places.items() if own in file.shapes}
        self.is_float8 = any(file.is_float8 for file, _ in parts.values())

    def _place(self, name: str) -> tuple[WeightFile, str]:
        start = next(start for start in self._parts if name.startswith(start))
        file, own = self._parts[start]
        return file, own + name.removeprefix(start)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(path for file, _ in self._parts.values() for path in file.files)

    def source(self, name: str) -> Path:
        return self._place(name)[0].path

    def release(self) -> None:
        for file, _ in self._parts.values():
            file.release()

    def tensor(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        file, own = self._place(name)
        return file.tensor(own, dtype, device)

    def copy(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        file, own = self._place(name)
        return file.copy(own, dtype, device)

    def dtype(self, name: str) -> torch.dtype:
        file, own = self._place(name)
        return file.dtype(own)

    def stored(self, name: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor] | None:
        file, own = self._place(name)
        return file.stored(own, device)


def _places(path: Path, files: Mapping[str, WeightFile]) -> dict[str, str]:
    """The file of each name. Raises UserError for a name that two files have."""
    places: dict[str, str] = {}
    for part, file in files.items():
        for name in file.shapes:
            if name in places:
                raise UserError(f"{path}: {name} is in both {places[name]} and {part}: they are not of one model")
            places[name] = part
    return places


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
    try:
        if path.suffix == ".safetensors":
            return SafetensorsFile(path)
        if path.suffix in PICKLE_SUFFIXES:
            return _open_torch(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    raise UserError(f"{path}: weights are read from {', '.join(WEIGHT_SUFFIXES)} files")


def _wanted_dtype(stored: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    return asked if asked is not None and stored.is_floating_point else stored


def _open_torch(path: Path) -> TensorsFile:
    """A .ckpt / .pt file, read without running any code of it. Its tensors may lie below `state_dict`."""
    content = read_pickle(path)
    tensors = named_tensors(path, content)
    if not tensors:
        raise UserError(f"{path} holds no named weights, so it is no model")
    counts = {name: content[name] for name in COUNTS if isinstance(content.get(name), int)}
    return TensorsFile(path, tensors, counts)
