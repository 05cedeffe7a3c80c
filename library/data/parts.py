# SPDX-License-Identifier: Apache-2.0
"""One dataset before the first epoch: split, repeats, balance with regularisation pictures, buckets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from library.data.buckets import Bucket, BucketManager, crop_share, uncapped
from library.data.captions import split_validation
from library.data.encoding import LatentJob, reference_jobs
from library.data.images import moves_crop
from library.data.plan import Pool, Shape, make_pool, regularisation_repeats
from library.data.records import DatasetConfig, Sample
from library.errors import first_names, raise_problems
from library.types import ReferenceSpec, Size

MOST_USES = 10**15  # in an epoch of a dataset: numbers of batches and steps then fit into 64 bits
MUCH_CAPPED = 0.1  # of the area
MUCH_CROPPED = 0.2  # of the picture


@dataclass(frozen=True)
class DatasetStats:
    """One dataset in numbers. `buckets`: ((width, height), uses per epoch); `batches` per epoch, of all processes."""

    images: int
    uses: int  # training images with their repeats
    reg_images: int  # regularisation images that are used
    reg_uses: int
    reg_unused: tuple[str, ...]  # regularisation images beyond the number of training images
    validation_images: int
    unsplit: tuple[tuple[str, int], ...]  # subsets (with their number of pictures) of which validation_split takes none
    untrained: tuple[str, ...]  # subsets of which it takes all
    held_elsewhere: tuple[str, ...]  # pictures left out because another subset or dataset holds them out
    buckets: tuple[tuple[Size, int], ...]
    batch_size: int
    batches: int
    upscaled: tuple[str, ...]  # files that are smaller than their bucket, with both sizes
    capped: tuple[str, ...]  # files that max_bucket_reso trains at much less than the area, with both sizes
    cropped: tuple[str, ...]  # files that lose much to the crop, with the share


class Part(NamedTuple):
    """One dataset: its samples, their buckets and pools."""

    config: DatasetConfig
    samples: Sequence[Sample]
    manager: BucketManager
    train: Pool
    validation: Pool
    stats: DatasetStats
    spec: ReferenceSpec | None  # how the model takes reference pictures

    def bucket(self, sample: Sample) -> Bucket:
        """The bucket of one of the samples."""
        return self.manager.select(sample.size, sample.path)

    def references(self, sample: Sample) -> tuple[LatentJob, ...]:
        """The reference pictures of one of the samples, as they are encoded."""
        return reference_jobs(sample.references, self.bucket(sample).reso, self.spec)


class Split(NamedTuple):
    """Indices of the samples of a dataset."""

    train: list[int]
    validation: list[int]
    reg: list[int]

    def without(self, places: Sequence[str], held: Collection[str]) -> Split:
        """The split without what is held out anywhere: a picture may be in several subsets and datasets."""
        train, reg = ([i for i in indices if places[i] not in held] for indices in (self.train, self.reg))
        return Split(train, self.validation, reg)


def make_parts(
    datasets: Sequence[tuple[DatasetConfig, Sequence[Sample]]], seed: int, spec: ReferenceSpec | None
) -> list[Part]:
    """Buckets, split, repeats and regularisation of every dataset. Raises UserError with all problems at once."""
    parts, problems = [], []
    splits = make_splits(datasets, seed)
    for (config, samples), (whole, split) in zip(datasets, splits):
        manager = BucketManager(config.buckets)
        buckets, wrong = manager.assign((sample.path, sample.size) for sample in samples)
        wrong += [*too_many_uses(samples), *too_many_references(samples, spec)]
        problems += wrong
        if not wrong:
            parts.append(_make_part(config, samples, manager, buckets, whole, split, spec))
    if not problems and not any(part.stats.uses for part in parts):
        problems.append(
            "no training picture is left: every picture is for regularisation or validation, or has num_repeats = 0"
        )
    raise_problems(problems)
    return parts


def too_many_uses(samples: Sequence[Sample]) -> list[str]:
    """One line where an epoch has more uses than can be counted safely."""
    uses = sum(sample.subset.num_repeats for sample in samples)
    if uses <= MOST_USES:
        return []
    most = max((sample.subset for sample in samples), key=lambda subset: subset.num_repeats)
    line = f"{most.name}: num_repeats is too large: an epoch would use more than {MOST_USES:,} pictures"
    return [f"{line}; give fewer repeats, and more epochs"]


def too_many_references(samples: Sequence[Sample], spec: ReferenceSpec | None) -> list[str]:
    """One line where pictures have more references than the model takes."""
    most = 0 if spec is None else spec.most
    names = [sample.path for sample in samples if len(sample.references) > most]
    return [f"this model takes at most {most} reference pictures of a picture: {first_names(names)}"] if names else []


def make_splits(datasets: Sequence[tuple[DatasetConfig, Sequence[Sample]]], seed: int) -> list[tuple[Split, Split]]:
    """(own split, split without what is held out anywhere) of each dataset."""
    seeds = [seed if config.validation_seed is None else config.validation_seed for config, _ in datasets]
    splits = [_split(samples, config.validation_split, own) for (config, samples), own in zip(datasets, seeds)]
    if not any(split.validation for split in splits):
        return list(zip(splits, splits))
    places = [_places(samples) for _, samples in datasets]
    held = {where[i] for where, split in zip(places, splits) for i in split.validation}
    return [(split, split.without(where, held)) for where, split in zip(places, splits)]


def _places(samples: Sequence[Sample]) -> list[str]:
    """Real path of each picture, with links resolved."""
    folders: dict[str, str] = {}
    found = []
    for sample in samples:
        folder, name = os.path.split(sample.path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        found.append(os.path.join(folders[folder], name))
    return found


def _make_part(
    config: DatasetConfig,
    samples: Sequence[Sample],
    manager: BucketManager,
    buckets: list[Bucket],
    whole: Split,
    split: Split,
    spec: ReferenceSpec | None,
) -> Part:
    train, validation, reg = split
    repeats = np.array([samples[i].subset.num_repeats for i in train], dtype=np.int64)
    uses = int(repeats.sum())
    reg_own = np.array([samples[i].subset.num_repeats for i in reg], dtype=np.int64)
    reg_repeats = regularisation_repeats(reg_own, uses)
    unsplit, untrained = _one_sided(config, samples, whole)

    shapes = _shapes(samples, buckets, spec)
    used = np.array(train + reg, dtype=np.int64)
    pool = make_pool(used, np.concatenate([repeats, reg_repeats]), shapes, config.batch_size)
    held_out = np.array(validation, dtype=np.int64)
    validation_pool = make_pool(held_out, np.ones_like(held_out), shapes, config.batch_size)
    stats = DatasetStats(
        images=len(train),
        uses=uses,
        reg_images=int((reg_repeats > 0).sum()),
        reg_uses=int(reg_repeats.sum()),
        reg_unused=tuple(samples[i].path for i, count in zip(reg, reg_repeats) if count == 0),
        validation_images=len(validation),
        unsplit=unsplit,
        untrained=untrained,
        held_elsewhere=tuple(samples[i].path for i in sorted({*whole.train, *whole.reg} - {*train, *reg})),
        buckets=_uses_of_buckets(pool),
        batch_size=config.batch_size,
        batches=int(pool.batch_counts.sum()),
        upscaled=tuple(
            f"{s.path} ({s.size[0]}x{s.size[1]} to {b.reso[0]}x{b.reso[1]})"
            for s, b in zip(samples, buckets)
            if b.resized[0] > s.size[0] or b.resized[1] > s.size[1]
        ),
        capped=_capped(config, samples, buckets),
        cropped=tuple(
            f"{s.path} ({s.size[0]}x{s.size[1]} to {b.reso[0]}x{b.reso[1]}: {crop_share(b):.0%})"
            for s, b in zip(samples, buckets)
            if crop_share(b) > MUCH_CROPPED and not moves_crop(s.subset.images)
        ),
    )
    return Part(config, samples, manager, pool, validation_pool, stats, spec)


def _shapes(samples: Sequence[Sample], buckets: Sequence[Bucket], spec: ReferenceSpec | None) -> list[Shape]:
    """The shape of each sample: those of one batch agree in it."""
    bare = {reso: Shape(reso) for reso in {bucket.reso for bucket in buckets}}  # one object for millions of pictures
    return [
        Shape(reso, tuple(job.bucket.reso for job in reference_jobs(sample.references, reso, spec)))
        if sample.references
        else bare[reso]
        for sample, (reso, _) in zip(samples, buckets)
    ]


def _uses_of_buckets(pool: Pool) -> tuple[tuple[Size, int], ...]:
    """((width, height), uses in an epoch) of each bucket, whatever references its pictures have."""
    uses: dict[Size, int] = {}
    for shape, count in zip(pool.shapes, pool.bucket_counts.tolist()):
        uses[shape.bucket] = uses.get(shape.bucket, 0) + count
    return tuple(uses.items())


def _capped(config: DatasetConfig, samples: Sequence[Sample], buckets: Sequence[Bucket]) -> tuple[str, ...]:
    """The pictures that would be trained at a larger area without max_bucket_reso."""
    rules = uncapped(config.buckets)
    if rules is None:
        return ()
    free = BucketManager(rules)
    found = []
    for sample, (reso, _) in zip(samples, buckets):
        wider = free.select(sample.size, sample.path).reso
        if reso[0] * reso[1] < (1 - MUCH_CAPPED) * wider[0] * wider[1]:
            found.append(f"{sample.path} ({reso[0]}x{reso[1]} instead of {wider[0]}x{wider[1]})")
    return tuple(found)


def _one_sided(
    config: DatasetConfig, samples: Sequence[Sample], split: Split
) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
    """(subsets with their pictures of which none is held out, subsets of which all are), where a split is asked for."""
    if config.validation_split == 0:
        return (), ()
    trained, held = (Counter(id(samples[i].subset) for i in indices) for indices in (split.train, split.validation))
    subsets = {id(samples[i].subset): samples[i].subset for i in (*split.train, *split.validation)}
    unsplit = tuple((subset.name, trained[key]) for key, subset in subsets.items() if not held[key])
    return unsplit, tuple(subset.name for key, subset in subsets.items() if not trained[key])


def _split(samples: Sequence[Sample], split: float, seed: int) -> Split:
    """Split each subset by itself; regularisation pictures are never held out."""
    found = Split([], [], [])
    groups: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):  # subsets are told apart by identity: the same folder may be used twice
        groups.setdefault(id(sample.subset), []).append(index)
    for indices in groups.values():
        if samples[indices[0]].subset.is_reg:
            found.reg.extend(indices)
        elif split > 0:
            kept, held_out = split_validation(indices, split, seed)
            found.train.extend(sorted(kept))
            found.validation.extend(sorted(held_out))
        else:
            found.train.extend(indices)
    return found
