# SPDX-License-Identifier: Apache-2.0
"""Cache of encoded latents, keyed by the content of the picture, its preprocessing, and the weights of the VAE.

Editing a picture or its mask, or using another VAE or size, changes the key, so only what has changed is encoded again.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from library.data.buckets import Bucket, center_crop
from library.data.caches.legacy_npz import LegacyFiles
from library.data.caches.share import ALONE, Shares
from library.data.caches.store import GROUP_SECONDS, MemoryStore, PackedStore, TensorStore
from library.data.caches.store_writer import StoreWriter
from library.data.encoding import EncodingInput, LatentJob, encoding_input, latent_seed
from library.data.file_hashes import FileHashes, FileState, state_of
from library.data.images import wants_mask
from library.data.manifest import FOLDER
from library.data.records import Sample
from library.data.shards.shard import Member
from library.errors import UserError, first_names
from library.log import get_logger, progress
from library.types import EncodeImages, LatentSpec

FORMAT = "latents-1"  # increment when the way from a file to its latents changes
HASH_WORKERS = 8
WINDOW = 50_000  # jobs that are in memory at once
log = get_logger()


@dataclass(frozen=True)
class LatentFolders:
    """Where latents are stored: in memory, in `cache_dir`, or in `.trainyard` in the folder of the subset."""

    cache_dir: str | None = None
    disk: bool = True

    def of(self, sample: Sample) -> str | None:
        """The folder; None means memory."""
        if not self.disk:
            return None
        if self.cache_dir is not None:
            return self.cache_dir + "/latents"
        return f"{sample.folder}/{FOLDER}/latents"

    def of_all(self, samples: Iterable[Sample]) -> list[str]:
        """The folders of all samples, each once."""
        if not self.disk:
            return []
        if self.cache_dir is not None:
            return [self.cache_dir + "/latents"]
        return list(dict.fromkeys(folder for sample in samples if (folder := self.of(sample)) is not None))


@dataclass(frozen=True, eq=False)
class _Place:
    """A store, the digests of the files behind its records, and the sd-scripts files used in place of records."""

    store: TensorStore
    hashes: FileHashes
    legacy: LegacyFiles | None

    def from_legacy(self, job: LatentJob) -> tuple[Tensor, Tensor | None] | None:
        return None if self.legacy is None else self.legacy.get(job)

    def unserved(self, jobs: list[LatentJob]) -> list[LatentJob]:
        return jobs if self.legacy is None else self.legacy.unserved(jobs)


class _Task(NamedTuple):
    """A job and the place where its latents are stored."""

    job: LatentJob
    place: _Place


class LatentCache:
    """Cached latents of one VAE; a `LatentSource`.

    spec: format of the family's latents. vae_fingerprint: digest of the VAE's weights. dtype: of the stored latents.
    masked_loss: mask pictures are read. scale_legacy: raw VAE latents (C h w) -> latents as the model expects them;
    None: sd-scripts files are not used. skip_check: trust the index of the store without checking whether a picture or
    a record has changed since. shares: how processes divide the encoding. All must be picklable if loader workers are
    spawned.
    """

    def __init__(
        self,
        folders: LatentFolders,
        spec: LatentSpec,
        *,
        vae_fingerprint: str,
        dtype: torch.dtype,
        masked_loss: bool = False,
        scale_legacy: Callable[[Tensor], Tensor] | None = None,
        skip_check: bool = False,
        shares: Shares = ALONE,
    ) -> None:
        self.folders, self.spec, self.dtype = folders, spec, dtype
        self.vae_fingerprint, self.masked_loss, self.scale_legacy = vae_fingerprint, masked_loss, scale_legacy
        self.skip_check, self.shares = skip_check, shares
        self._places: dict[str | None, _Place] = {}
        self._keys: dict[tuple, bytes] = {}

    # ---- read -------------------------------------------------------------------------------------------------------

    def get(self, job: LatentJob) -> tuple[Tensor, Tensor | None]:
        """(latents C h w in the cache's dtype, mask 1 h w float32 in [0, 1] or None).

        Raises UserError if the record is missing: it was damaged after the start, or `fill` was not called. A damaged
        record has then been dropped, and the next run encodes it again.
        """
        sample, place = job.sample, self._place(job.sample)
        if (found := place.from_legacy(job)) is not None:
            return found
        state = sample_state(sample)
        if state.digest is not None:  # then the key takes no more than a look into a dict, and no memory
            key = self._key(job, place.hashes)
        else:
            identity = (*state, *job[1:], sample.mask_path, sample.subset.images)
            if identity not in self._keys:
                self._keys[identity] = self._key(job, place.hashes)
            key = self._keys[identity]
        try:
            return self._read(place.store, key, job)
        except KeyError:
            if not place.unserved([job]) and (found := place.from_legacy(job)) is not None:  # checked by another rank
                return found
            reason = "its cached latents are missing or damaged; start the run again and they are encoded again"
            raise UserError(f"{sample.path}: {reason}") from None

    def _read(self, store: TensorStore, key: bytes, job: LatentJob) -> tuple[Tensor, Tensor | None]:
        """The record of a job. Raises KeyError if it is missing or has another shape, and drops the latter."""
        record = store.get(key)
        latents, mask = record.get("latents"), record.get("mask")
        size = self._latent_size(job.bucket)
        fits = latents is not None and latents.dtype == self.dtype and latents.shape == (self.spec.channels, *size)
        if latents is None or not fits or (mask is not None and mask.shape != (1, *size)):
            store.discard(key)
            raise KeyError(key)
        return latents, None if mask is None else mask.float()

    def missing(self, jobs: Sequence[LatentJob]) -> list[LatentJob]:
        """The jobs of this process's share that must be encoded. If there are none, the VAE need not be loaded.

        New and changed pictures are read to compute their digests.
        """
        return [task.job for window in _windows(jobs) for task in self._missing(self._share(window))]

    def is_missing_any(self, jobs: Sequence[LatentJob]) -> bool:
        """Whether `missing` would return any."""
        return any(self._missing(self._share(window)) for window in _windows(jobs))

    def lacking(self, jobs: Sequence[LatentJob]) -> dict[str, tuple[int, int]]:
        """Folder -> (records that this process does not find, total), after all processes have filled their shares.

        Each process looks for what the next one has encoded. Folders without missing records are omitted.
        """
        found: dict[str, tuple[int, int]] = {}
        for window in _windows(jobs):
            for place, tasks in _by_place(self._share(window, others=True)):
                absent = place.unserved(self._missing_in(place, [task.job for task in tasks], quick=True))
                if isinstance(place.store, PackedStore):
                    before = found.get(str(place.store.folder), (0, 0))
                    found[str(place.store.folder)] = (before[0] + len(absent), before[1] + len(tasks))
        return {folder: counts for folder, counts in found.items() if counts[0]}

    def close(self) -> None:
        """Close the files; they are reopened on use."""
        for place in self._places.values():
            place.store.close()

    # ---- write ------------------------------------------------------------------------------------------------------

    def fill(
        self,
        jobs: Sequence[LatentJob],
        encode: EncodeImages,
        *,
        batch_size: int,
        workers: int = 1,
    ) -> int:
        """Encode what is missing and return the number of latents encoded. `encode` is not called if there are none.

        Pictures are decoded in `workers` threads, encoded in this thread in batches of one size, and written by another
        thread. If the run stops halfway, what was encoded is kept. With several processes, each encodes its share of a
        folder: call this in all of them, and wait for all before reading. Raises UserError for pictures that cannot be
        read, latents that are not finite, and a full disk.
        """
        count = 0
        for number, window in enumerate(_windows(jobs)):
            tasks = self._missing(self._share(window))
            if number == 0:
                for place in self._places.values():
                    if place.store.share.rank == 0 and place.store.share.writes:
                        place.store.prune()
            if tasks:
                self._require_space(tasks, times=len(jobs) / len(window) if not count else 1)
                self._encode(tasks, encode, batch_size, max(1, workers))
                count += len(tasks)
        return count

    def _encode(self, tasks: Sequence[_Task], encode: EncodeImages, batch_size: int, workers: int) -> None:
        pool = ThreadPoolExecutor(workers)
        window = workers // batch_size + 2
        places = [place for place, _ in _by_place(tasks)]
        try:
            with StoreWriter() as writer, progress(len(tasks), "caching latents") as bar:
                for batch, inputs in _ahead(pool, _batches(tasks, batch_size), self._decode, window):
                    for start in range(0, len(batch), batch_size):  # mirrored copies may make a batch longer
                        part = slice(start, start + batch_size)
                        self._encode_batch(batch[part], inputs[part], encode, writer)
                        bar.advance(len(batch[part]))
                    for place in places:
                        place.hashes.save(every=GROUP_SECONDS)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for place in places:
                place.hashes.save()

    def _decode(self, unit: Sequence[_Task]) -> list[EncodingInput]:
        """The inputs of one picture, plain and mirrored, which is decoded once. Also computes its digest."""
        job, place = unit[0]
        for file in self._files(job):
            place.hashes.digest(file)
        plain = encoding_input(job._replace(flipped=False), masked_loss=self.masked_loss)
        return [_flipped(plain, job.sample) if task.job.flipped else plain for task in unit]

    def _encode_batch(
        self, tasks: Sequence[_Task], inputs: Sequence[EncodingInput], encode: EncodeImages, writer: StoreWriter
    ) -> None:
        """Encode one batch and hand it to the writer. Raises UserError naming files whose latents are not finite."""
        encoded = encode(torch.stack([item.pixels for item in inputs]), [item.seed for item in inputs])
        size = self._latent_size(tasks[0].job.bucket)
        if encoded.shape != (len(tasks), self.spec.channels, *size):
            raise ValueError(f"the encoder gave {tuple(encoded.shape)} for {len(tasks)} of {self.spec} at {size}")
        refused = []
        for (job, place), item, latents in zip(tasks, inputs, encoded.detach().to("cpu", self.dtype)):
            if not torch.isfinite(latents).all():
                refused.append(job.sample.path)
                continue
            record: dict[str, Tensor] = {"latents": latents}
            if item.mask is not None:
                record["mask"] = F.interpolate(item.mask[None], size=size, mode="area")[0].half()
            writer.put(place.store, self._key(job, place.hashes), record, place.hashes.digest(sample_state(job.sample)))
        if refused:
            raise UserError(
                f"the VAE gives values that are not finite for {first_names(refused)}: use --no_half_vae, or a VAE "
                "that works in half precision (nothing was cached for them)"
            )

    def _require_space(self, tasks: Sequence[_Task], *, times: float) -> None:
        """times: factor by which all jobs exceed `tasks`."""
        for place, group in _by_place(tasks):
            place.store.require_space(round(times * sum(self._record_bytes(task.job) for task in group)))

    def _record_bytes(self, job: LatentJob) -> int:
        height, width = self._latent_size(job.bucket)
        mask = 2 if wants_mask(job.sample, masked_loss=self.masked_loss) else 0
        return height * width * (self.spec.channels * self.dtype.itemsize + mask)

    # ---- what is there ----------------------------------------------------------------------------------------------

    def _share(self, jobs: Iterable[LatentJob], *, others: bool = False) -> list[_Task]:
        """This process's share of the jobs of each folder. others: the next process's share."""
        found: list[_Task] = []
        for place, tasks in _by_place(_Task(job, self._place(job.sample)) for job in jobs):
            share = place.store.share
            found += [task for unit in (share.next if others else share).of(_units(tasks)) for task in unit]
        return found

    def _missing(self, share: Sequence[_Task]) -> list[_Task]:
        result: list[_Task] = []
        for place, tasks in _by_place(share):
            absent = place.unserved(self._missing_in(place, [task.job for task in tasks], quick=self.skip_check))
            result += [_Task(job, place) for job in absent]
        return result

    def _missing_in(self, place: _Place, jobs: list[LatentJob], *, quick: bool) -> list[LatentJob]:
        """The jobs that one store lacks. If the store is empty, no file is read here.

        quick: look at the index of the store only.
        """
        if place.store.is_empty():
            return jobs
        unread = place.hashes.recall(file for job in jobs for file in self._files(job))
        place.hashes.read_all(unread, HASH_WORKERS)
        place.hashes.save()
        keys = [self._key(job, place.hashes) for job in jobs]
        found = place.store.check(keys, quick=quick)
        damaged = [job.sample.path for job, key in zip(jobs, keys) if key in found.damaged]
        if damaged:
            log.warning(f"{len(damaged)} cached latents are damaged and encoded again: {first_names(damaged)}")
        return [job for job, key in zip(jobs, keys) if key in found.missing]

    def _files(self, job: LatentJob) -> list[FileState]:
        """The files that a job's latents depend on: the picture, and its mask picture."""
        sample = job.sample
        files = [sample_state(sample)]
        if self.masked_loss and sample.mask_path is not None:
            member = sample.members.get(sample.mask_path)
            files.append(state_of(sample.mask_path) if member is None else member_state(sample.mask_path, member))
        return files

    def _key(self, job: LatentJob, hashes: FileHashes) -> bytes:
        sample, bucket, flipped, is_reference = job
        rules, seed = sample.subset.images, "reference" if is_reference else latent_seed(sample, flipped)
        parts = (
            FORMAT, self.spec.name, self.vae_fingerprint, self.dtype, bucket.reso, bucket.resized, center_crop(bucket),
            flipped, rules.resize_interpolation, rules.alpha_mask, seed,
            *(hashes.digest(file).hex() for file in self._files(job)),
        )  # fmt: skip
        return hashlib.blake2b("\x1f".join(map(str, parts)).encode(errors="surrogatepass"), digest_size=20).digest()

    def _place(self, sample: Sample) -> _Place:
        folder = self.folders.of(sample)
        if folder not in self._places:
            store: TensorStore = MemoryStore() if folder is None else PackedStore(folder, self.shares.of(folder))
            legacy = None
            if self.scale_legacy is not None:
                legacy = LegacyFiles(
                    store,
                    self.spec,
                    self.scale_legacy,
                    dtype=self.dtype,
                    masked_loss=self.masked_loss,
                    trust=self.skip_check,
                )
            self._places[folder] = _Place(store, FileHashes(store, trust=self.skip_check), legacy)
        return self._places[folder]

    def _latent_size(self, bucket: Bucket) -> tuple[int, int]:
        """(height, width) of the latents."""
        return bucket.reso[1] // self.spec.factor, bucket.reso[0] // self.spec.factor


# ---- the three stages -----------------------------------------------------------------------------------------------


def _windows(jobs: Sequence[LatentJob]) -> Iterator[Sequence[LatentJob]]:
    """The jobs in parts of WINDOW."""
    return (jobs[start : start + WINDOW] for start in range(0, len(jobs), WINDOW))


def _by_place(tasks: Iterable[_Task]) -> list[tuple[_Place, list[_Task]]]:
    groups: dict[_Place, list[_Task]] = {}
    for task in tasks:
        groups.setdefault(task.place, []).append(task)
    return list(groups.items())


def _units(tasks: Iterable[_Task]) -> list[list[_Task]]:
    """Group the tasks of one picture at one size: its file is read once for the plain and the mirrored version."""
    units: dict[tuple, list[_Task]] = {}
    for task in tasks:
        sample = task.job.sample
        units.setdefault((sample.path, sample.mask_path, task.job.bucket, sample.subset.images), []).append(task)
    return list(units.values())


def _batches(tasks: Iterable[_Task], batch_size: int) -> Iterator[list[list[_Task]]]:
    """Group units of one size into batches of about `batch_size` tasks."""
    by_size: dict[tuple[int, int], list[list[_Task]]] = {}
    for unit in _units(tasks):
        by_size.setdefault(unit[0].job.bucket.reso, []).append(unit)
    for reso in sorted(by_size):
        batch: list[list[_Task]] = []
        for unit in by_size[reso]:
            batch.append(unit)
            if sum(map(len, batch)) >= batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


def _ahead(
    pool: ThreadPoolExecutor,
    batches: Iterable[list[list[_Task]]],
    decode: Callable[[Sequence[_Task]], list[EncodingInput]],
    window: int,
) -> Iterator[tuple[list[_Task], list[EncodingInput]]]:
    """Yield the batches in order while the pool decodes the next `window` batches."""
    waiting: deque[tuple[list[_Task], list[Future]]] = deque()
    for batch in itertools.chain(batches, [None] * window):
        if batch is not None:
            waiting.append(([task for unit in batch for task in unit], [pool.submit(decode, unit) for unit in batch]))
        if waiting and (batch is None or len(waiting) > window):
            tasks, futures = waiting.popleft()
            yield tasks, [item for future in futures for item in future.result()]


def sample_state(sample: Sample) -> FileState:
    """The picture's file as the scan saw it."""
    member = sample.members.get(sample.path)
    return FileState(sample.path, sample.file_size, sample.mtime_ns, member.digest if member else None)


def member_state(path: str, member: Member) -> FileState:
    """A picture inside a shard as the scan saw it."""
    return FileState(path, member.length, member.shard.mtime_ns, member.digest)


def _flipped(item: EncodingInput, sample: Sample) -> EncodingInput:
    """The mirrored picture, with the seed of the mirrored version."""
    mask = None if item.mask is None else item.mask.flip(-1)
    return EncodingInput(item.pixels.flip(-1), latent_seed(sample, True), mask)
