# SPDX-License-Identifier: Apache-2.0
"""One dataset before the first epoch: split, repeats, balance with regularisation pictures, buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from library.data.buckets import Bucket, BucketManager, Size
from library.data.captions import split_validation
from library.data.plan import Pool, make_pool, regularisation_repeats
from library.data.records import DatasetConfig, Sample
from library.errors import UserError

MOST_USES = 10**15  # in an epoch of a dataset: numbers of batches and steps then fit into 64 bits


@dataclass(frozen=True)
class DatasetStats:
    """One dataset in numbers. `buckets`: ((width, height), uses per epoch); `batches` per epoch, of all processes."""

    images: int
    uses: int  # training images with their repeats
    reg_images: int  # regularisation images that are used
    reg_uses: int
    reg_unused: tuple[str, ...]  # regularisation images beyond the number of training images
    validation_images: int
    buckets: tuple[tuple[Size, int], ...]
    batch_size: int
    batches: int
    upscaled: tuple[str, ...]  # files that are smaller than their bucket, with both sizes


class Part(NamedTuple):
    """One dataset: its samples, their buckets and pools."""

    config: DatasetConfig
    samples: Sequence[Sample]
    manager: BucketManager
    train: Pool
    validation: Pool
    stats: DatasetStats

    def bucket(self, sample: Sample) -> Bucket:
        return self.manager.select(sample.size, sample.path)


def make_parts(datasets: Sequence[tuple[DatasetConfig, Sequence[Sample]]], seed: int) -> list[Part]:
    """Buckets, split, repeats and regularisation of every dataset. All problems are raised at once."""
    parts, problems = [], []
    for config, samples in datasets:
        manager = BucketManager(config.buckets)
        buckets, wrong = manager.assign((sample.path, sample.size) for sample in samples)
        wrong += too_many_uses(samples)
        problems += wrong
        if not wrong:
            parts.append(_make_part(config, samples, manager, buckets, seed))
    if not problems and not any(part.stats.uses for part in parts):
        problems.append(
            "no training picture is left: every picture is for regularisation or validation, or has num_repeats = 0"
        )
    if problems:
        raise UserError(problems)
    return parts


def too_many_uses(samples: Sequence[Sample]) -> list[str]:
    """One line where an epoch has more uses than can be counted safely."""
    uses = sum(sample.subset.num_repeats for sample in samples)
    if uses <= MOST_USES:
        return []
    most = max((sample.subset for sample in samples), key=lambda subset: subset.num_repeats)
    line = f"{most.name}: num_repeats is too large: an epoch would use more than {MOST_USES:,} pictures"
    return [f"{line}; give fewer repeats, and more epochs"]


def _make_part(
    config: DatasetConfig, samples: Sequence[Sample], manager: BucketManager, buckets: list[Bucket], seed: int
) -> Part:
    split_seed = seed if config.validation_seed is None else config.validation_seed
    train, validation, reg = _split(samples, config.validation_split, split_seed)
    repeats = np.array([samples[i].subset.num_repeats for i in train], dtype=np.int64)
    uses = int(repeats.sum())
    reg_own = np.array([samples[i].subset.num_repeats for i in reg], dtype=np.int64)
    reg_repeats = regularisation_repeats(reg_own, uses)

    resos = [bucket.reso for bucket in buckets]
    used = np.array(train + reg, dtype=np.int64)
    pool = make_pool(used, np.concatenate([repeats, reg_repeats]), resos, config.batch_size)
    held_out = np.array(validation, dtype=np.int64)
    validation_pool = make_pool(held_out, np.ones_like(held_out), resos, config.batch_size)
    stats = DatasetStats(
        images=len(train),
        uses=uses,
        reg_images=int((reg_repeats > 0).sum()),
        reg_uses=int(reg_repeats.sum()),
        reg_unused=tuple(samples[i].path for i, count in zip(reg, reg_repeats) if count == 0),
        validation_images=len(validation),
        buckets=tuple(zip(pool.resos, pool.bucket_counts.tolist())),
        batch_size=config.batch_size,
        batches=int(pool.batch_counts.sum()),
        upscaled=tuple(
            f"{s.path} ({s.size[0]}x{s.size[1]} to {b.reso[0]}x{b.reso[1]})"
            for s, b in zip(samples, buckets)
            if b.resized[0] > s.size[0] or b.resized[1] > s.size[1]
        ),
    )
    return Part(config, samples, manager, pool, validation_pool, stats)


def _split(samples: Sequence[Sample], split: float, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Indices of (training, validation, regularisation) samples; each subset is split by itself, the last never."""
    train: list[int] = []
    validation: list[int] = []
    reg: list[int] = []
    groups: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):  # subsets are told apart by identity: the same folder may be used twice
        groups.setdefault(id(sample.subset), []).append(index)
    for indices in groups.values():
        if samples[indices[0]].subset.is_reg:
            reg += indices
        elif split > 0:
            kept, held_out = split_validation(indices, split, seed)
            train += sorted(kept)
            validation += sorted(held_out)
        else:
            train += indices
    return train, validation, reg
