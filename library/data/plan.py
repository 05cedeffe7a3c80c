# SPDX-License-Identifier: Apache-2.0
"""Assignment of samples to the batches of an epoch: index arithmetic, a pure function of (seed, epoch).

The plan of a million samples is a few arrays; a `BatchPlan` is made on demand. If an epoch has more uses than LISTED
(num_repeats = 3000000), its order is not listed but computed for each position, at no cost in memory. The two orders
differ, so LISTED must never change.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, overload

import numpy as np

from library.rng import derive_seed
from library.types import Size

LISTED = 1 << 20  # uses in an epoch


class Shape(NamedTuple):
    """The sizes that all pictures of a batch share. Sizes are (width, height) in pixels."""

    bucket: Size
    references: tuple[Size, ...] = ()  # of each reference picture as it is encoded


class BatchPlan(NamedTuple):
    """One micro-batch. Every random draw for it depends only on (seed, epoch, position, place in the batch)."""

    dataset: int  # index of the dataset
    bucket: Size  # (width, height) that the batch trains at
    samples: tuple[int, ...]  # indices into the dataset's samples
    epoch: int  # counts from 1; 0 for validation
    position: int  # of the batch in the whole epoch, over all processes
    validation: bool = False
    references: tuple[Size, ...] = ()  # sizes of each sample's reference pictures, as they are encoded
    stage: int = 0  # of the run, which decides the dataset's resolution


@dataclass(frozen=True)
class Pool:
    """The samples that an epoch uses of one dataset, repeated and grouped by shape."""

    samples: np.ndarray  # indices of the samples in use, grouped by shape
    repeats: np.ndarray  # how often each of them is used in an epoch, at least once
    starts: np.ndarray  # first use of each shape; the last entry is the number of uses
    shapes: tuple[Shape, ...]  # sorted
    batch_size: int

    @property
    def uses(self) -> int:
        return int(self.starts[-1])

    @property
    def entries(self) -> np.ndarray:
        """Sample indices, one per use in an epoch."""
        return np.repeat(self.samples, self.repeats)

    @cached_property
    def ends(self) -> np.ndarray:
        """End (exclusive) of the uses of each sample."""
        return np.cumsum(self.repeats)

    def sample_of(self, use: int) -> int:
        """`entries[use]`, without building the list of entries."""
        return int(self.samples[np.searchsorted(self.ends, use, side="right")])

    @property
    def bucket_counts(self) -> np.ndarray:
        """Uses of each shape."""
        return np.diff(self.starts)

    @property
    def batch_counts(self) -> np.ndarray:
        """Batches of each shape; the last one of a shape may be smaller than batch_size."""
        return -(-self.bucket_counts // self.batch_size)


def make_pool(
    indices: np.ndarray, repeats: np.ndarray, known: Sequence[Shape], shape_of: np.ndarray, batch_size: int
) -> Pool:
    """A pool of the samples `indices`, each used `repeats` times; `known[shape_of[i]]` is the shape of sample i."""
    indices, repeats = indices[repeats > 0], repeats[repeats > 0]
    used = np.unique(shape_of[indices]).tolist()
    shapes = sorted({known[number] for number in used})
    place = {shape: k for k, shape in enumerate(shapes)}
    places = np.zeros(len(known), dtype=np.int64)
    places[used] = [place[known[number]] for number in used]
    buckets = places[shape_of[indices]]
    order = np.argsort(buckets, kind="stable")
    samples, repeats = indices[order], repeats[order]
    ends = np.concatenate([[0], np.cumsum(repeats)]).astype(np.int64)
    starts = ends[np.searchsorted(buckets[order], np.arange(len(shapes) + 1))]
    return Pool(samples, repeats, starts, tuple(shapes), batch_size)


def regularisation_repeats(repeats: np.ndarray, wanted: int) -> np.ndarray:
    """How often each regularisation image is used to reach `wanted` uses in total, the number of training uses.

    Images are taken in order with their own repeats until there are enough; later ones are not used. If there are too
    few, each gets one more use, in order, round after round.
    """
    before = np.concatenate([[0], np.cumsum(repeats)[:-1]]) if len(repeats) else np.zeros(0, dtype=np.int64)
    used = np.where(before < wanted, repeats, 0).astype(np.int64)
    missing = wanted - int(used.sum())
    if missing > 0 and len(used):
        used += missing // len(used)
        used[: missing % len(used)] += 1
    return used


class EpochPlan(Sequence[BatchPlan]):
    """The batches of one epoch in order. Slices (`plan[start:]`, `plan[rank::world]`) are plans too."""

    def __init__(self, order: _Listed | _Computed, positions: range | None = None):
        self.order = order
        self.positions = range(len(order)) if positions is None else positions

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, which: int) -> BatchPlan: ...
    @overload
    def __getitem__(self, which: slice) -> EpochPlan: ...
    def __getitem__(self, which: int | slice) -> BatchPlan | EpochPlan:
        if isinstance(which, slice):
            return EpochPlan(self.order, self.positions[which])
        return self.order.batch(self.positions[which])

    def __iter__(self) -> Iterator[BatchPlan]:
        return map(self.order.batch, self.positions)


def each_shape(plans: Sequence[BatchPlan]) -> list[BatchPlan]:
    """One batch of each (shape, number of samples); an epoch is not iterated for it."""
    return plans.order.each_shape() if isinstance(plans, EpochPlan) else _first_of_each(plans)


def _first_of_each(plans: Sequence[BatchPlan]) -> list[BatchPlan]:
    found: dict[tuple[Size, tuple[Size, ...], int], BatchPlan] = {}
    for plan in plans:
        found.setdefault((plan.bucket, plan.references, len(plan.samples)), plan)
    return list(found.values())


def plan_epoch(pools: Sequence[Pool], *, seed: int, epoch: int, stage: int = 0) -> EpochPlan:
    """The batches of an epoch: samples are shuffled within each shape, then all batches are shuffled."""
    if sum(pool.uses for pool in pools) > LISTED:
        return EpochPlan(_Computed(pools, seed, epoch, stage))
    orders = [_shuffled_in_buckets(pool, derive_seed(seed, "order", epoch, d)) for d, pool in enumerate(pools)]
    table = _batch_table(pools)
    table = table[np.argsort(_keys(len(table), derive_seed(seed, "batches", epoch)), kind="stable")]
    return EpochPlan(_Listed(orders, [pool.shapes for pool in pools], table, epoch, validation=False, stage=stage))


def plan_in_order(pools: Sequence[Pool]) -> EpochPlan:
    """The batches of a validation, not shuffled."""
    entries = [pool.entries for pool in pools]
    return EpochPlan(_Listed(entries, [pool.shapes for pool in pools], _batch_table(pools), 0, validation=True))


# ---- listed order ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Listed:
    """A listed order.

    orders: sample indices per dataset. table: rows of (dataset, shape, start, stop), one per position.
    """

    orders: Sequence[np.ndarray]
    shapes: Sequence[Sequence[Shape]]
    table: np.ndarray
    epoch: int
    validation: bool
    stage: int = 0

    def __len__(self) -> int:
        return len(self.table)

    def batch(self, position: int) -> BatchPlan:
        dataset, number, start, stop = self.table[position].tolist()
        samples = tuple(self.orders[dataset][start:stop].tolist())
        bucket, references = self.shapes[dataset][number]
        return BatchPlan(dataset, bucket, samples, self.epoch, position, self.validation, references, self.stage)

    def each_shape(self) -> list[BatchPlan]:
        """The first batch of each (shape, number of samples)."""
        kinds = np.concatenate([self.table[:, :2], self.table[:, 3:] - self.table[:, 2:3]], axis=1)
        _, first = np.unique(kinds, axis=0, return_index=True)
        return _first_of_each([self.batch(position) for position in sorted(first.tolist())])


def _shuffled_in_buckets(pool: Pool, seed: int) -> np.ndarray:
    buckets = np.repeat(np.arange(len(pool.shapes)), pool.bucket_counts)
    return pool.entries[np.lexsort((_keys(len(pool.entries), seed), buckets))]


def _keys(count: int, seed: int) -> np.ndarray:
    """Random sort keys. Raw PCG64 output: unlike `Generator.shuffle`, numpy promises never to change it."""
    return np.random.PCG64(seed).random_raw(count)


def _batch_table(pools: Sequence[Pool]) -> np.ndarray:
    """Rows of (dataset, shape, start, stop), in the order of datasets and shapes."""
    parts = []
    for d, pool in enumerate(pools):
        counts = pool.batch_counts
        bucket = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(bucket)) - np.repeat(np.cumsum(counts) - counts, counts)
        start = pool.starts[bucket] + within * pool.batch_size
        stop = np.minimum(start + pool.batch_size, pool.starts[bucket + 1])
        parts.append(np.stack([np.full_like(bucket, d), bucket, start, stop], axis=1))
    return np.concatenate(parts) if parts else np.zeros((0, 4), dtype=np.int64)


# ---- computed order -------------------------------------------------------------------------------------------------

_ROUNDS = 4
_MASK = (1 << 64) - 1


class Shuffle:
    """A permutation of range(count) without storage: a Feistel network with cycle walking.

    Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), methods 2 and 3.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.half = max(1, ((count - 1).bit_length() + 1) // 2)  # bits
        self.keys = np.random.PCG64(seed).random_raw(_ROUNDS).tolist()

    def __getitem__(self, place: int) -> int:
        mask = (1 << self.half) - 1
        while True:
            left, right = place >> self.half, place & mask
            for key in self.keys:
                left, right = right, left ^ (_mixed(right ^ key) & mask)
            place = left << self.half | right
            if place < self.count:
                return place


def _mixed(value: int) -> int:
    """A hash of 64 bits: each bit depends on all bits of `value`."""
    for factor in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93):
        value = value * factor & _MASK
        value ^= value >> 32
    return value


class _Bucket(NamedTuple):
    """The pictures of one shape in a dataset, and the order of their uses."""

    dataset: int
    shape: Shape
    first: int  # use
    order: Shuffle


class _Computed:
    """An order in which every batch is computed from its position."""

    def __init__(self, pools: Sequence[Pool], seed: int, epoch: int, stage: int) -> None:
        self.pools, self.epoch, self.stage = pools, epoch, stage
        self.buckets: list[_Bucket] = []
        self.ends: list[int] = []  # end (exclusive) of the batches of each bucket, before batches are shuffled
        total = 0
        for d, pool in enumerate(pools):
            counts = zip(pool.shapes, pool.starts.tolist(), pool.bucket_counts.tolist(), pool.batch_counts.tolist())
            for b, (shape, first, uses, batches) in enumerate(counts):
                self.buckets.append(_Bucket(d, shape, first, Shuffle(uses, derive_seed(seed, "order", epoch, d, b))))
                total += batches
                self.ends.append(total)
        self.order = Shuffle(total, derive_seed(seed, "batches", epoch))

    def __len__(self) -> int:
        return self.ends[-1]

    def batch(self, position: int) -> BatchPlan:
        return self._numbered(self.order[position], position)

    def each_shape(self) -> list[BatchPlan]:
        """The first and the last batch of each bucket; their positions are not those in the epoch."""
        ends = [0, *self.ends]
        numbers = sorted({number for a, b in pairwise(ends) for number in (a, b - 1)})
        return _first_of_each([self._numbered(number, number) for number in numbers])

    def _numbered(self, number: int, position: int) -> BatchPlan:
        k = bisect_right(self.ends, number)
        dataset, shape, first, order = self.buckets[k]
        pool = self.pools[dataset]
        start = (number - (self.ends[k - 1] if k else 0)) * pool.batch_size
        places = range(start, min(start + pool.batch_size, order.count))
        samples = tuple(pool.sample_of(first + order[place]) for place in places)
        return BatchPlan(
            dataset, shape.bucket, samples, self.epoch, position, references=shape.references, stage=self.stage
        )
