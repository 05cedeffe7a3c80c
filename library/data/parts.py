# SPDX-License-Identifier: Apache-2.0
"""One dataset before the first epoch: split, repeats, balance with regularisation pictures, buckets."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from library.data.buckets import Bucket, BucketManager, crop_share, uncapped
from library.data.captions import split_validation
from library.data.columns import Columns, columns_of
from library.data.encoding import LatentJob, reference_jobs
from library.data.images import moves_crop
from library.data.plan import Pool, Shape, make_pool, regularisation_repeats
from library.data.records import DatasetConfig, Sample
from library.errors import UserError, first_names, raise_problems
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
    upscaled: Sequence[str]  # files that are smaller than their bucket, with both sizes
    capped: Sequence[str]  # files that max_bucket_reso trains at much less than the area, with both sizes
    cropped: Sequence[str]  # files that lose much to the crop, with the share


class Part(NamedTuple):
    """One dataset: its samples, their buckets and pools."""

    config: DatasetConfig
    samples: Sequence[Sample]
    manager: BucketManager
    train: Pool
    validation: Pool
    stats: DatasetStats
    spec: ReferenceSpec | None  # how the model takes reference pictures
    flips: np.ndarray  # whether each sample is also trained mirrored
    has_references: bool

    def bucket(self, sample: Sample) -> Bucket:
        """The bucket of one of the samples."""
        return self.manager.select(sample.size, sample.path)

    def references(self, sample: Sample, *, flipped: bool = False) -> tuple[LatentJob, ...]:
        """The reference pictures of one of the samples, as they are encoded. flipped: mirrored with it."""
        return reference_jobs(sample.references, self.bucket(sample).reso, self.spec, flipped=flipped)


class Split(NamedTuple):
    """Indices of the samples of a dataset."""

    train: np.ndarray
    validation: np.ndarray
    reg: np.ndarray

    def without(self, places: Sequence[str], held: Collection[str]) -> Split:
        """The split without what is held out anywhere: a picture may be in several subsets and datasets."""
        left = [[i for i in indices.tolist() if places[i] not in held] for indices in (self.train, self.reg)]
        train, reg = (np.array(indices, dtype=np.int64) for indices in left)
        return Split(train, self.validation, reg)


def make_parts(
    datasets: Sequence[tuple[DatasetConfig, Sequence[Sample]]], seed: int, spec: ReferenceSpec | None
) -> list[tuple[Part, ...]]:
    """Each dataset at each of its sizes, with buckets, split, repeats and regularisation.

    Only the largest size has the pictures of the validation. Raises UserError with all problems at once.
    """
    parts: list[tuple[Part, ...]] = []
    problems: list[str] = []
    columns = [columns_of(samples) for _, samples in datasets]
    splits = make_splits([(config, found) for (config, _), found in zip(datasets, columns)], seed)
    for (config, samples), found, (whole, split) in zip(datasets, columns, splits):
        wrong = [*too_many_uses(found), *too_many_references(found, spec)]
        sizes: list[Part] = []
        for number, size in enumerate(config.sizes):
            manager = BucketManager(size.buckets)
            buckets, unfit = _buckets(manager, found)
            wrong += unfit
            own = split if number == config.main_size else split._replace(validation=split.validation[:0])
            if not wrong:
                sizes.append(_make_part(size, samples, found, manager, buckets, whole, own, spec))
        problems += dict.fromkeys(wrong)
        parts.append(tuple(sizes))
    if not problems and not any(part.stats.uses for sizes in parts for part in sizes):
        problems.append(
            "no training picture is left: every picture is for regularisation or validation, or has num_repeats = 0"
        )
    raise_problems(problems)
    return parts


def _buckets(manager: BucketManager, columns: Columns) -> tuple[list[Bucket], list[str]]:
    """(bucket of each size, what is wrong with the pictures of those that have none, in order)."""
    buckets, wrong = [], dict[int, str]()
    for number, size in enumerate(columns.kinds.sizes):
        try:
            buckets.append(manager.select(size))
        except UserError:
            buckets.append(Bucket((0, 0), (0, 0)))
            for place in np.flatnonzero(columns.kinds.of == number).tolist():
                wrong[place] = manager.refusal(size, columns.samples[place].path)
    return buckets, [wrong[place] for place in sorted(wrong)]


def too_many_uses(columns: Columns) -> list[str]:
    """One line where an epoch has more uses than can be counted safely."""
    uses = sum(count * subset.num_repeats for count, subset in zip(columns.counts(), columns.subsets))
    if uses <= MOST_USES:
        return []
    most = max(columns.subsets, key=lambda subset: subset.num_repeats)
    line = f"{most.name}: num_repeats is too large: an epoch would use more than {MOST_USES:,} pictures"
    return [f"{line}; give fewer repeats, and more epochs"]


def too_many_references(columns: Columns, spec: ReferenceSpec | None) -> list[str]:
    """One line where pictures have more references than the model takes."""
    most = 0 if spec is None else spec.most
    names = [columns.samples[place].path for place, found in columns.references.items() if len(found) > most]
    return [f"this model takes at most {most} reference pictures of a picture: {first_names(names)}"] if names else []


def make_splits(datasets: Sequence[tuple[DatasetConfig, Columns]], seed: int) -> list[tuple[Split, Split]]:
    """(own split, split without what is held out anywhere) of each dataset."""
    seeds = [seed if config.validation_seed is None else config.validation_seed for config, _ in datasets]
    splits = [_split(columns, config.validation_split, own) for (config, columns), own in zip(datasets, seeds)]
    if not any(len(split.validation) for split in splits):
        return list(zip(splits, splits))
    places = [_places(columns.samples) for _, columns in datasets]
    held = {where[i] for where, split in zip(places, splits) for i in split.validation.tolist()}
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
    columns: Columns,
    manager: BucketManager,
    buckets: list[Bucket],
    whole: Split,
    split: Split,
    spec: ReferenceSpec | None,
) -> Part:
    train, validation, reg = split
    repeats = columns.repeats(train)
    uses = int(repeats.sum())
    reg_repeats = regularisation_repeats(columns.repeats(reg), uses)
    unsplit, untrained = _one_sided(config, columns, whole)
    moved = np.array([moves_crop(subset.images) for subset in columns.subsets], dtype=bool)[columns.subset_of]
    pairs = [(*size, *bucket.reso) for size, bucket in zip(columns.kinds.sizes, buckets)]
    texts = ["{}x{} to {}x{}".format(*pair) for pair in pairs]

    shapes = _shapes(columns, buckets, spec)
    pool = make_pool(np.concatenate([train, reg]), np.concatenate([repeats, reg_repeats]), *shapes, config.batch_size)
    validation_pool = make_pool(validation, np.ones_like(validation), *shapes, config.batch_size)
    held_elsewhere = np.setdiff1d(np.concatenate([whole.train, whole.reg]), np.concatenate([train, reg]))
    stats = DatasetStats(
        images=len(train),
        uses=uses,
        reg_images=int((reg_repeats > 0).sum()),
        reg_uses=int(reg_repeats.sum()),
        reg_unused=tuple(samples[i].path for i in reg[reg_repeats == 0].tolist()),
        validation_images=len(validation),
        unsplit=unsplit,
        untrained=untrained,
        held_elsewhere=tuple(samples[i].path for i in held_elsewhere.tolist()),
        buckets=_uses_of_buckets(pool),
        batch_size=config.batch_size,
        batches=int(pool.batch_counts.sum()),
        upscaled=columns.told(
            {
                number: texts[number]
                for number, (size, bucket) in enumerate(zip(columns.kinds.sizes, buckets))
                if bucket.resized[0] > size[0] or bucket.resized[1] > size[1]
            }
        ),
        capped=_capped(config, columns, buckets),
        cropped=columns.told(
            {
                number: f"{texts[number]}: {crop_share(bucket):.0%}"
                for number, bucket in enumerate(buckets)
                if crop_share(bucket) > MUCH_CROPPED
            },
            ~moved,
        ),
    )
    return Part(config, samples, manager, pool, validation_pool, stats, spec, columns.flips, bool(columns.references))


def _shapes(columns: Columns, buckets: Sequence[Bucket], spec: ReferenceSpec | None) -> tuple[list[Shape], np.ndarray]:
    """(shapes, number of the shape of each sample): those of one batch agree in it."""
    shapes = [Shape(bucket.reso) for bucket in buckets]
    numbers = columns.kinds.of.astype(np.int64)
    if spec is None:
        return shapes, numbers
    known: dict[Shape, int] = {}
    for place, sizes in columns.references.items():
        reso = buckets[numbers[place]].reso
        shape = Shape(reso, tuple(spec.size(size, reso) for size in sizes))
        numbers[place] = known.setdefault(shape, len(shapes) + len(known))
    return [*shapes, *known], numbers


def _uses_of_buckets(pool: Pool) -> tuple[tuple[Size, int], ...]:
    """((width, height), uses in an epoch) of each bucket, whatever references its pictures have."""
    uses: dict[Size, int] = {}
    for shape, count in zip(pool.shapes, pool.bucket_counts.tolist()):
        uses[shape.bucket] = uses.get(shape.bucket, 0) + count
    return tuple(uses.items())


def _capped(config: DatasetConfig, columns: Columns, buckets: Sequence[Bucket]) -> Sequence[str]:
    """The pictures that would be trained at a larger area without max_bucket_reso."""
    rules = uncapped(config.buckets)
    if rules is None:
        return ()
    free = BucketManager(rules)
    texts = {}
    for number, (size, (reso, _)) in enumerate(zip(columns.kinds.sizes, buckets)):
        wider = free.select(size).reso
        if reso[0] * reso[1] < (1 - MUCH_CAPPED) * wider[0] * wider[1]:
            texts[number] = f"{reso[0]}x{reso[1]} instead of {wider[0]}x{wider[1]}"
    return columns.told(texts)


def _one_sided(
    config: DatasetConfig, columns: Columns, split: Split
) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
    """(subsets with their pictures of which none is held out, subsets of which all are), where a split is asked for."""
    if config.validation_split == 0:
        return (), ()
    trained, held = (
        np.bincount(columns.subset_of[indices], minlength=len(columns.subsets)).tolist()
        for indices in (split.train, split.validation)
    )
    counts = [(subset.name, *pair) for subset, *pair in zip(columns.subsets, trained, held)]
    unsplit = tuple((name, count) for name, count, held_out in counts if count and not held_out)
    return unsplit, tuple(name for name, count, held_out in counts if held_out and not count)


def _split(columns: Columns, split: float, seed: int) -> Split:
    """Split each subset by itself; regularisation pictures are never held out."""
    train, validation, reg = ([np.zeros(0, dtype=np.int64)] for _ in range(3))
    for number, subset in enumerate(columns.subsets):
        indices = np.flatnonzero(columns.subset_of == number)
        if subset.is_reg:
            reg.append(indices)
        elif split > 0:
            kept, held_out = split_validation(indices.tolist(), split, seed)
            train.append(np.array(sorted(kept), dtype=np.int64))
            validation.append(np.array(sorted(held_out), dtype=np.int64))
        else:
            train.append(indices)
    return Split(np.concatenate(train), np.concatenate(validation), np.concatenate(reg))
