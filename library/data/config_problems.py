# SPDX-License-Identifier: Apache-2.0
"""Problems of the records that config.py has built: sizes of buckets, paths, keys without effect together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from library.data.options import CacheOptions, DataOptions
from library.data.records import BucketRules, DatasetConfig, SubsetConfig
from library.data.shards.patterns import is_url, local_files
from library.errors import UserError, first_names, nearest

SOURCES = ("image_dir", "metadata_file", "shards", "parquet")  # image_dir may also go with metadata_file
COLUMNS = ("image_column", "caption_column", "mask_column", "reference_column")
REFERENCE_KEYS = ("reference_data_dir", "conditioning_data_dirs")
# What conditioning_data_dir holds, which depends on the method and the task; None: it has no effect
Role = Literal["masks", "control", "references"] | None


def bucket_problems(rules: BucketRules, bucket_step: int) -> Iterator[str]:
    """Problems of the bucket sizes. bucket_step: every side of a bucket must be a multiple of this many pixels."""
    if not rules.enable_bucket:
        return
    step = rules.bucket_reso_steps
    if step % bucket_step:
        yield f"bucket_reso_steps must be a multiple of {bucket_step} for this model, got {step}"
    if rules.min_bucket_reso > rules.max_bucket_reso:
        yield f"min_bucket_reso {rules.min_bucket_reso} is larger than max_bucket_reso {rules.max_bucket_reso}"
        return
    if rules.bucket_no_upscale:
        return  # sizes then follow the pictures; only the area of the resolution counts
    short, long = min(rules.resolution), max(rules.resolution)
    # the limits are rounded to the steps first: the smallest side down, the largest up
    if rules.min_bucket_reso // step * step > short:
        yield f"min_bucket_reso {rules.min_bucket_reso} is larger than the resolution: give at most {short}"
    if -(-rules.max_bucket_reso // step) * step < long:
        yield f"max_bucket_reso {rules.max_bucket_reso} is smaller than the resolution: give at least {long}"


def shard_problems(subset: SubsetConfig, own: Mapping[str, Any], dataset: Mapping[str, Any]) -> Iterator[str]:
    """Keys of a subset that conflict with shards or parquet, or need them. own, dataset: the tables."""
    if subset.shard_pattern is None:
        for key in (key for key in COLUMNS if own.get(key)):
            yield f"{key} has no effect without {'shards or ' if key == 'caption_column' else ''}parquet"
        return
    source, pattern = subset.shard_pattern
    for key in (key for key in SOURCES if key != source and own.get(key)):
        yield f"{key} cannot stand beside {source}: give one of them, and another subset for the other"
    inside = {
        "caption_extension": "captions",
        "conditioning_data_dir": "masks",
        **dict.fromkeys(REFERENCE_KEYS, "references"),
    }
    for key, what in inside.items():
        if own.get(key, dataset.get(key)):
            yield f"{key} has no effect with {source}: {what} are inside"
    for key in (key for key in COLUMNS if own.get(key) and source == "shards" and key != "caption_column"):
        yield f"{key} has no effect with shards, where the ending of a file says what it is"
    if "::" in pattern and is_url(pattern):
        yield f"{source} {pattern}: a URL of one file system is needed, without ::"


def missing_paths(subset: SubsetConfig) -> Iterator[str]:
    """One line for each folder or file of a subset that does not exist, with the nearest one that does."""
    folders = [("image_dir", subset.image_dir), ("conditioning_data_dir", subset.conditioning_data_dir)]
    folders += [("reference_data_dir", folder) for folder in subset.reference_data_dirs]
    for key, folder in folders:
        if folder and not Path(folder).is_dir():
            yield f"{key} {why_missing(folder)}"
    if subset.metadata_file and not Path(subset.metadata_file).is_file():
        yield f"metadata_file {why_missing(subset.metadata_file)}"
    if subset.shard_pattern is not None and not is_url(subset.shard_pattern[1]):
        key, pattern = subset.shard_pattern
        try:
            _, missing = local_files(pattern)
        except UserError as error:
            yield f"{key} {error.problems[0]}"
            return
        if missing:
            more = f" (and {len(missing) - 1} more of {pattern})" if len(missing) > 1 else ""
            yield f"{key} {why_missing(missing[0])}{more}"


def why_missing(text: str) -> str:
    """Why a path is not the folder or file it should be."""
    path = Path(text)
    if path.is_file():
        return f"{text} is a file; a folder is needed"
    if path.is_dir():
        return f"{text} is a folder; a file is needed"
    if path.exists():
        return f"{text} is neither a file nor a folder"
    parent = next((p for p in path.absolute().parents if p.is_dir()), Path(path.absolute().anchor))
    wrong = path.absolute().relative_to(parent).parts[0]
    try:
        similar = nearest(wrong, [entry.name for entry in parent.iterdir()])
    except OSError:
        similar = None
    hint = f"Did you mean {parent / similar}?" if similar else f"The nearest folder that exists is {parent}"
    return f"{text} does not exist. {hint}"


def dataset_problems(
    datasets: Iterable[DatasetConfig], options: DataOptions, cache: CacheOptions | None = None, role: Role = None
) -> Iterator[str]:
    """Problems of the datasets as a whole: unused masks, augmentation that a cache would prevent."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    has_masks = role == "masks"
    masked = any((s.conditioning_data_dir and has_masks) or s.images.alpha_mask or s.shard_pattern for s in subsets)
    if options.masked_loss and subsets and not masked:
        where = "conditioning_data_dir or alpha_mask = true" if has_masks else "alpha_mask = true"
        yield f"--masked_loss has no effect: no subset has {where}"
    missing = {
        "control": ("the folder of the control images", lambda s: s.conditioning_data_dir),
        "references": (
            "the folder of the pictures to edit",
            lambda s: s.reference_data_dirs or s.metadata_file or s.is_reg,
        ),
    }
    if role in missing:
        what, there = missing[role]
        without = [s.name for s in subsets if not (there(s) or s.shard_pattern)]
        if without:
            yield f"conditioning_data_dir, {what}, is missing for {first_names(without)}"
    if options.conditioning_data_dir and role is None:
        yield "--conditioning_data_dir has no effect without --task edit or --masked_loss"
    if cache is None or not cache.latents:
        return
    for key in ("color_aug", "random_crop", "face_crop_aug_range"):
        names = [s.name for s in subsets if vars(s.images)[key]]
        if names:
            yield f"{key} cannot vary pictures that --cache_latents encodes once: give one ({first_names(names)})"
