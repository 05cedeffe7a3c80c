# SPDX-License-Identifier: Apache-2.0
"""Reader of the per-picture latent files of sd-scripts: `<stem>_<W>x<H>_sd.npz` with float32 arrays.

Arrays: `latents` (C h w, not scaled), `original_size` (width, height of the picture), `crop_ltrb`, `latents_flipped`
(with flip_aug), `alpha_mask` (H W). Families other than SD and SDXL add `_<h>x<w>` to every array name.

The header of an array is parsed here, not by numpy, and checked before its bytes are read: no file can take more memory
than the arrays that are wanted, or run code.
"""

from __future__ import annotations

import math
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from library.data.caches.store import CHECKED_BYTES, TensorStore
from library.data.caches.store_index import FileRow
from library.data.encoding import LatentJob
from library.errors import UserError, first_names
from library.log import get_logger
from library.types import LatentSpec

log = get_logger()
DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, OSError, ValueError, EOFError, KeyError,
    NotImplementedError,  # a compression that Python does not know
    RuntimeError,  # an encrypted file
    TypeError,  # a dtype that numpy does not know
)  # fmt: skip
NPY_MAGIC = b"\x93NUMPY"
NPY_HEADER = re.compile(  # as numpy writes it: the dtype, the order of the bytes, the shape
    r"\{'descr': '([<>|=]?[a-zA-Z]\d{1,9})', 'fortran_order': (True|False), 'shape': \(([\d, ]{0,200})\), \}\s*"
)
GOOD = b"valid"  # in place of a digest
MOST_HEADER = 10_000  # bytes
FLOATS, NUMBERS = "f", "iuf"  # kinds of dtypes


@dataclass(frozen=True)
class Wanted:
    """What a file must contain to be used. Sizes: latent (height, width); picture (width, height)."""

    latent_size: tuple[int, int]
    original_size: tuple[int, int]
    flipped: bool
    mask: bool


class NotUsable(Exception):
    """The file does not fit the job; `damaged`: it cannot even be read."""

    def __init__(self, reason: str, *, damaged: bool = False) -> None:
        super().__init__(reason)
        self.damaged = damaged


def read(path: str, spec: LatentSpec, wanted: Wanted) -> tuple[Tensor, Tensor | None]:
    """The unscaled latents (C h w float32), and the mask (H W float32 in [0, 1]). Raises NotUsable with the reason."""
    height, width = wanted.latent_size
    suffix = f"_{height}x{width}" if spec.npz_sized_keys else ""
    pixels = (height * spec.factor, width * spec.factor)
    shapes = {"original_size": (2,), "alpha_mask": pixels}
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as file:
            absent = [name + suffix for name in _names(wanted) if f"{name}{suffix}.npy" not in file.namelist()]
            if absent:
                raise NotUsable(f"has no {' and no '.join(absent)}")
            for name in _names(wanted):
                shape = shapes.get(name, (spec.channels, height, width))
                arrays[name] = _array(file, name + suffix, shape, NUMBERS if name == "original_size" else FLOATS)
    except DAMAGED as error:
        raise NotUsable(
            f"damaged ({str(error).partition(chr(10))[0] or type(error).__name__})", damaged=True
        ) from error
    latents = arrays["latents_flipped" if wanted.flipped else "latents"]
    if tuple(arrays["original_size"].tolist()) != wanted.original_size:
        raise NotUsable(
            f"made for a picture of {arrays['original_size'].tolist()}, this one has {wanted.original_size}"
        )
    if not np.isfinite(latents).all():
        raise NotUsable("values that are not finite")
    mask = torch.from_numpy(arrays["alpha_mask"].astype(np.float32)) if wanted.mask else None
    if mask is not None and not bool(((mask >= 0) & (mask <= 1)).all()):
        raise NotUsable("alpha_mask with values outside of 0 to 1")
    if mask is not None and wanted.flipped:
        mask = mask.flip(-1)
    return torch.from_numpy(latents.astype(np.float32)), mask


def _array(file: zipfile.ZipFile, name: str, shape: tuple[int, ...], kinds: str) -> np.ndarray:
    """Read one array. Raises NotUsable, before its bytes are read, if it is not the wanted one; and DAMAGED errors."""
    packed = file.getinfo(f"{name}.npy").compress_type
    if packed not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # all that numpy writes
        raise ValueError(f"{name} is compressed in a way that numpy does not use")
    with file.open(f"{name}.npy") as member:
        start = member.read(8)
        size = int.from_bytes(member.read(2 if start[6:7] == b"\1" else 4), "little")
        text = member.read(min(size, MOST_HEADER)).decode("latin-1")
        header = NPY_HEADER.fullmatch(text)
        if start[:6] != NPY_MAGIC or header is None:
            raise ValueError(f"{name} is not an array of numbers")
        dtype = np.dtype(header[1])
        found = tuple(int(side) for side in header[3].replace(" ", "").split(",") if side)
        if found != shape:
            raise NotUsable(f"{name.partition('_flipped')[0]} of shape {found}, needed are {shape}")
        if dtype.kind not in kinds:
            raise NotUsable(f"{name.partition('_flipped')[0]} of dtype {dtype}")
        wanted = math.prod(shape) * dtype.itemsize
        data = member.read(wanted + 1)  # zipfile compares the checksum at the end
        if len(data) != wanted:
            raise ValueError(f"{name} has another length than its header says")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if header[2] == "True" else "C")


def _names(wanted: Wanted) -> list[str]:
    names = ["latents_flipped" if wanted.flipped else "latents", "original_size"]
    return [*names, "alpha_mask"] if wanted.mask else names


class LegacyFiles:
    """The sd-scripts files that are used in place of records of one store.

    spec: format of the family's latents. scale: raw VAE latents (C h w) -> latents as the model expects them. dtype: of
    what `get` returns. masked_loss: mask pictures are read; these files never contain them. trust: a file that was
    valid once is not checked again.
    """

    def __init__(
        self,
        store: TensorStore,
        spec: LatentSpec,
        scale: Callable[[Tensor], Tensor],
        *,
        dtype: torch.dtype,
        masked_loss: bool,
        trust: bool,
    ) -> None:
        self.store, self.spec, self.scale, self.dtype = store, spec, scale, dtype
        self.masked_loss, self.trust = masked_loss, trust
        self._paths: dict[tuple, str] = {}

    def get(self, job: LatentJob) -> tuple[Tensor, Tensor | None] | None:
        """(latents C h w, mask 1 h w or None) if `unserved` found a valid file, else None. Raises UserError."""
        path = self._paths.get(_identity(job))
        if path is None:
            return None
        wanted = self._wanted(job)
        try:
            latents, mask = read(path, self.spec, wanted)
        except NotUsable as error:
            del self._paths[_identity(job)]
            self.store.set_file_rows([FileRow(_row_name(path, wanted), -1, -1, b"damaged")])
            raise UserError(f"{path}: {error}, since the start; start again and the picture is encoded") from None
        if mask is not None:
            mask = F.interpolate(mask[None, None], size=wanted.latent_size, mode="area")[0]
        return self.scale(latents).to(self.dtype), mask

    def unserved(self, jobs: Sequence[LatentJob]) -> list[LatentJob]:
        """The jobs without a valid file. Logs which files are damaged and which do not fit.

        If the files have at most CHECKED_BYTES together, all are read at every start. Otherwise each is read once: the
        store remembers by size and time that it was valid.
        """
        paths = {job.sample.legacy_latents for job in jobs}
        remembers = self.trust or sum(_size(path) for path in paths if path) > CHECKED_BYTES
        rest: list[LatentJob] = []
        damaged: list[str] = []
        unfit: list[str] = []
        good: list[FileRow] = []
        for job in jobs:
            path = job.sample.legacy_latents
            if path is None:
                rest.append(job)
                continue
            try:
                good += self._check(path, job, remembers)
                self._paths[_identity(job)] = path
            except NotUsable as error:
                rest.append(job)
                (damaged if error.damaged else unfit).append(f"{path} ({error})")
        self.store.set_file_rows(good)
        if damaged:
            log.warning(f"{len(damaged)} damaged latent files, their pictures are encoded: {first_names(damaged)}")
        if unfit:
            log.info(f"{len(unfit)} latent files do not fit, their pictures are encoded: {first_names(unfit)}")
        return rest

    def _check(self, path: str, job: LatentJob, remembers: bool) -> list[FileRow]:
        """Check that a file fits the job, unless that is known. Returns what to remember. Raises NotUsable."""
        wanted = self._wanted(job)
        try:
            now = os.stat(path)
        except OSError as error:
            raise NotUsable(error.strerror or str(error), damaged=True) from None
        if not stat.S_ISREG(now.st_mode):
            raise NotUsable("is not a file", damaged=True)
        if now.st_mtime_ns < job.sample.mtime_ns and not self.trust:
            raise NotUsable("older than the picture")
        name = _row_name(path, wanted)
        row = self.store.file_rows([name]).get(name)
        same = row is not None and (self.trust or (row.size, row.mtime_ns) == (now.st_size, now.st_mtime_ns))
        if row is not None and row.digest == GOOD and same and (remembers or _identity(job) in self._paths):
            return []
        read(path, self.spec, wanted)
        return [] if same else [FileRow(name, now.st_size, now.st_mtime_ns, GOOD)]

    def _wanted(self, job: LatentJob) -> Wanted:
        if self.masked_loss and job.sample.mask_path is not None:
            raise NotUsable("holds no mask picture")
        width, height = (side // self.spec.factor for side in job.bucket.reso)
        return Wanted((height, width), job.sample.size, job.flipped, job.sample.subset.images.alpha_mask)


def _row_name(path: str, wanted: Wanted) -> str:
    """Name under which the store remembers that the file was valid."""
    return f"{path}\x1f{wanted}"


def _size(path: str) -> int:
    """Size of a file in bytes; 0 if there is none, for which `_check` raises."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _identity(job: LatentJob) -> tuple:
    return job.sample.path, job.sample.mask_path, *job[1:], job.sample.subset.images
