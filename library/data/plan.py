# SPDX-License-Identifier: Apache-2.0
"""Which samples form which batch of an epoch: index arithmetic only, a pure function of (seed, epoch).

A plan of a million samples is a few arrays; a `BatchPlan` is made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np

from library.data.buckets import Size
from library.rng import derive_seed


class BatchPlan(NamedTuple):
    """One micro-batch. Every draw made for it depends on (seed, epoch, position, place in the batch) only."""

    dataset: int  # index of the dataset
    bucket: Size  # (width, height) that the batch trains at
    samples: tuple[int, ...]  # indices into the dataset's samples
    epoch: int  # counts from 1; 0 for validation
    position: int  # of the batch in the whole epoch, over all processes
    validation: bool = False


@dataclass(frozen=True)
class Pool:
    """The samples of one dataset as an epoch uses them: repeated, and grouped by bucket."""

    entries: np.ndarray  # sample indices, one per use in an epoch, those of a bucket next to each other
    starts: np.ndarray  # first entry of each bucket, and at the end the number of entries
    resos: tuple[Size, ...]  # sorted
    batch_size: int

    @property
    def bucket_counts(self) -> np.ndarray:
        """Entries of each bucket."""
        return np.diff(self.starts)

    @property
    def batch_counts(self) -> np.ndarray:
        """Batches of each bucket; the last one of a bucket may be smaller than batch_size."""
        return -(-self.bucket_counts // self.batch_size)


def make_pool(indices: np.ndarray, repeats: np.ndarray, reso_of: Sequence[Size], batch_size: int) -> Pool:
    """A pool of the samples `indices`, each used `repeats` times; `reso_of[i]` is the bucket of sample i."""
    entries = np.repeat(indices, repeats)
    resos = sorted({reso_of[i] for i in np.unique(entries).tolist()})
    number = {reso: k for k, reso in enumerate(resos)}
    buckets = np.fromiter((number[reso_of[i]] for i in entries.tolist()), dtype=np.int64, count=len(entries))
    order = np.argsort(buckets, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(buckets, minlength=len(resos)))]).astype(np.int64)
    return Pool(entries[order], starts, tuple(resos), batch_size)


def regularisation_repeats(repeats: np.ndarray, wanted: int) -> np.ndarray:
    """How often each regularisation image is used so that together they reach `wanted`, the uses of training images.

    Images come in order with their own repeats until there are enough (later ones are not used); if there are too few,
    each gets one more use, in order, round after round.
    """
    before = np.concatenate([[0], np.cumsum(repeats)[:-1]]) if len(repeats) else np.zeros(0, dtype=np.int64)
    used = np.where(before < wanted, repeats, 0).astype(np.int64)
    missing = wanted - int(used.sum())
    if missing > 0 and len(used):
        used += missing // len(used)
        used[: missing % len(used)] += 1
    return used


class EpochPlan(Sequence[BatchPlan]):
    """The batches of one epoch in order; slices (`plan[start:]`, `plan[rank::world]`) are plans too."""

    def __init__(
        self,
        orders: Sequence[np.ndarray],
        resos: Sequence[Sequence[Size]],
        table: np.ndarray,
        epoch: int,
        validation: bool,
    ):
        """orders: sample indices per dataset; table: rows of (dataset, bucket, start, stop, position)."""
        self.orders, self.resos, self.table = orders, resos, table
        self.epoch, self.validation = epoch, validation

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, which: int) -> BatchPlan: ...
    @overload
    def __getitem__(self, which: slice) -> EpochPlan: ...
    def __getitem__(self, which: int | slice) -> BatchPlan | EpochPlan:
        if isinstance(which, slice):
            return EpochPlan(self.orders, self.resos, self.table[which], self.epoch, self.validation)
        dataset, bucket, start, stop, position = self.table[which].tolist()
        samples = tuple(self.orders[dataset][start:stop].tolist())
        return BatchPlan(dataset, self.resos[dataset][bucket], samples, self.epoch, position, self.validation)

    def __iter__(self) -> Iterator[BatchPlan]:
        return (self[i] for i in range(len(self)))


def plan_epoch(pools: Sequence[Pool], *, seed: int, epoch: int) -> EpochPlan:
    """Samples shuffled within their bucket, then the batches of all buckets and datasets shuffled together."""
    orders = [_shuffled_in_buckets(pool, derive_seed(seed, "order", epoch, d)) for d, pool in enumerate(pools)]
    table = _batch_table(pools)
    table = table[np.argsort(_keys(len(table), derive_seed(seed, "batches", epoch)), kind="stable")]
    table[:, 4] = np.arange(len(table))
    return EpochPlan(orders, [pool.resos for pool in pools], table, epoch, validation=False)


def plan_in_order(pools: Sequence[Pool]) -> EpochPlan:
    """The batches of a validation: nothing is shuffled."""
    return EpochPlan(
        [pool.entries for pool in pools], [pool.resos for pool in pools], _batch_table(pools), 0, validation=True
    )


def _shuffled_in_buckets(pool: Pool, seed: int) -> np.ndarray:
    buckets = np.repeat(np.arange(len(pool.resos)), pool.bucket_counts)
    return pool.entries[np.lexsort((_keys(len(pool.entries), seed), buckets))]


def _keys(count: int, seed: int) -> np.ndarray:
    """Random sort keys. Raw PCG64 output: unlike `Generator.shuffle`, numpy promises never to change it."""
    return np.random.PCG64(seed).random_raw(count)


def _batch_table(pools: Sequence[Pool]) -> np.ndarray:
    """Rows of (dataset, bucket, start, stop, position), in the order of datasets and buckets."""
    parts = []
    for d, pool in enumerate(pools):
        counts = pool.batch_counts
        bucket = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(bucket)) - np.repeat(np.cumsum(counts) - counts, counts)
        start = pool.starts[bucket] + within * pool.batch_size
        stop = np.minimum(start + pool.batch_size, pool.starts[bucket + 1])
        parts.append(np.stack([np.full_like(bucket, d), bucket, start, stop, start], axis=1))
    table = np.concatenate(parts) if parts else np.zeros((0, 5), dtype=np.int64)
    table[:, 4] = np.arange(len(table))
    return table
