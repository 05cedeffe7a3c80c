# SPDX-License-Identifier: Apache-2.0
"""The per-picture latent files of sd-scripts: `<stem>_<W>x<H>_sd.npz` with float32 arrays. Read, never written.

Arrays: `latents` (C h w, not scaled), `original_size` (width, height of the picture), `crop_ltrb`, `latents_flipped`
(with flip_aug), `alpha_mask` (H W). Families other than SD and SDXL add `_<h>x<w>` to every array name.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from library.data.dataset import LatentJob
from library.data.store import TensorStore
from library.data.store_index import FileRow
from library.errors import UserError, first_names
from library.log import get_logger
from library.types import LatentSpec

log = get_logger()
DAMAGED = (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, KeyError, NotImplementedError)


@dataclass(frozen=True)
class Wanted:
    """What a file must contain to be used. Sizes: latent (height, width); picture (width, height)."""

    latent_size: tuple[int, int]
    original_size: tuple[int, int]
    flipped: bool
    mask: bool


@dataclass(frozen=True)
class LegacyLatents:
    """What was in the file: unscaled latents (C h w float32) and the mask (H W float32 in [0, 1])."""

    latents: Tensor
    mask: Tensor | None


class NotUsable(Exception):
    """The file does not fit; `damaged` says that it cannot even be read."""

    def __init__(self, reason: str, *, damaged: bool = False) -> None:
        super().__init__(reason)
        self.damaged = damaged


def read(path: str, spec: LatentSpec, wanted: Wanted) -> LegacyLatents:
    """The arrays that are wanted. Raises NotUsable saying what is wrong."""
    height, width = wanted.latent_size
    suffix = f"_{height}x{width}" if spec.npz_sized_keys else ""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name + suffix] for name in _names(wanted) if name + suffix in file.files}
    except DAMAGED as error:
        raise NotUsable(f"damaged ({error})", damaged=True) from error
    absent = [name + suffix for name in _names(wanted) if name not in arrays]
    if absent:
        raise NotUsable(f"has no {' and no '.join(absent)}")
    latents = arrays["latents_flipped" if wanted.flipped else "latents"]
    if latents.shape != (spec.channels, height, width):
        raise NotUsable(f"latents of shape {latents.shape}, needed are {(spec.channels, height, width)}")
    if tuple(arrays["original_size"].tolist()) != wanted.original_size:
        raise NotUsable(
            f"made for a picture of {arrays['original_size'].tolist()}, this one has {wanted.original_size}"
        )
    if not np.isfinite(latents).all():
        raise NotUsable("values that are not finite")
    mask = torch.from_numpy(arrays["alpha_mask"].astype(np.float32)) if wanted.mask else None
    if mask is not None and (mask.ndim != 2 or not torch.isfinite(mask).all()):
        raise NotUsable(f"alpha_mask of shape {tuple(mask.shape)}")
    if mask is not None and wanted.flipped:
        mask = mask.flip(-1)
    return LegacyLatents(torch.from_numpy(latents.astype(np.float32)), mask)


def _names(wanted: Wanted) -> list[str]:
    names = ["latents_flipped" if wanted.flipped else "latents", "original_size"]
    return [*names, "alpha_mask"] if wanted.mask else names


class LegacyFiles:
    """The files of sd-scripts that stand in for records of one store.

    spec: how the family's latents look. scale: raw VAE latents (C h w) -> latents as the model wants them. dtype: of
    what `get` gives. masked_loss: mask pictures are read; these files never hold them. trust: a file that was once
    good is not looked at again.
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
        """(latents C h w, mask 1 h w or None) where `unserved` found a valid file, else None. Raises UserError."""
        path = self._paths.get(_identity(job))
        if path is None:
            return None
        wanted = self._wanted(job)
        try:
            found = read(path, self.spec, wanted)
        except NotUsable as error:
            raise UserError(f"{path}: {error}, since the start; start again and the picture is encoded") from None
        mask = None
        if found.mask is not None:
            mask = F.interpolate(found.mask[None, None], size=wanted.latent_size, mode="area")[0]
        return self.scale(found.latents).to(self.dtype), mask

    def unserved(self, jobs: Sequence[LatentJob]) -> list[LatentJob]:
        """The jobs that no valid file serves. Says which files are damaged, and which do not fit.

        A file is read once; the store remembers by its size and time that it was good.
        """
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
                good += self._check(path, job)
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

    def _check(self, path: str, job: LatentJob) -> list[FileRow]:
        """Read a file to see whether it serves the job, unless that is known; what to remember. Raises NotUsable."""
        wanted = self._wanted(job)
        stat = os.stat(path)
        if stat.st_mtime_ns < job.sample.mtime_ns and not self.trust:
            raise NotUsable("older than the picture")
        name = f"{path}\x1f{wanted}"
        row = self.store.file_rows([name]).get(name)
        if row is not None and (self.trust or (row.size, row.mtime_ns) == (stat.st_size, stat.st_mtime_ns)):
            return []
        read(path, self.spec, wanted)
        return [FileRow(name, stat.st_size, stat.st_mtime_ns, b"valid")]

    def _wanted(self, job: LatentJob) -> Wanted:
        if self.masked_loss and job.sample.mask_path is not None:
            raise NotUsable("holds no mask picture")
        width, height = (side // self.spec.factor for side in job.bucket.reso)
        return Wanted((height, width), job.sample.size, job.flipped, job.sample.subset.images.alpha_mask)


def _identity(job: LatentJob) -> tuple:
    return job.sample.path, job.bucket, job.flipped, job.sample.subset.images
