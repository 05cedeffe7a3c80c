# SPDX-License-Identifier: Apache-2.0
"""Records of the configuration of datasets and of the samples that a scan found."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from library.data.shards.shard import Member
from library.data.timetable import Timetable, largest_entry

NO_MEMBERS: Mapping[str, Member] = {}


@dataclass(frozen=True)
class CaptionRules:
    """How a caption text becomes the text of one training step (per subset)."""

    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0  # steps; below 1: a fraction of the run


@dataclass(frozen=True)
class ImageRules:
    """How a picture becomes pixels (per subset)."""

    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    resize_interpolation: str | None = None
    alpha_mask: bool = False


@dataclass(frozen=True)
class SubsetConfig:
    """One folder, metadata file, or set of shards with pictures."""

    image_dir: str | None
    metadata_file: str | None = None
    conditioning_data_dir: str | None = None
    reference_data_dirs: tuple[str, ...] = ()  # each picture has reference pictures in each of them
    shards: str | None = None  # pattern of tar files
    parquet: str | None = None  # pattern of parquet files
    image_column: str | None = None
    caption_column: str | None = None
    mask_column: str | None = None
    reference_column: str | None = None
    num_repeats: int = 1
    is_reg: bool = False
    class_tokens: str | None = None
    caption_extension: str = ".caption"
    cache_info: bool = False
    custom_attributes: dict[str, Any] = field(default_factory=dict, hash=False)
    captions: CaptionRules = CaptionRules()
    images: ImageRules = ImageRules()

    @property
    def name(self) -> str:
        return self.metadata_file or self.shards or self.parquet or self.image_dir or ""

    @property
    def shard_pattern(self) -> tuple[str, str] | None:
        """(key, pattern) of a subset of shards."""
        given = (("shards", self.shards), ("parquet", self.parquet))
        return next(((key, pattern) for key, pattern in given if pattern), None)


@dataclass(frozen=True)
class BucketRules:
    """The sizes that a dataset trains at. resolution: (width, height) of all pictures, unless enable_bucket is set."""

    resolution: tuple[int, int]
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False


@dataclass(frozen=True)
class DatasetConfig:
    """Subsets with the same batch size and bucket rules.

    With a timetable of resolutions, `buckets` and `batch_size` are those of its largest resolution.
    """

    subsets: tuple[SubsetConfig, ...]
    buckets: BucketRules
    batch_size: int = 1
    network_multiplier: float = 1.0
    validation_seed: int | None = None
    validation_split: float = 0.0
    timetable: Timetable = ()

    @property
    def sizes(self) -> tuple[DatasetConfig, ...]:
        """The dataset at each resolution of its timetable; itself where there is none."""
        if not self.timetable:
            return (self,)
        return tuple(
            replace(
                self,
                buckets=replace(self.buckets, resolution=entry.resolution),
                batch_size=entry.batch_size or self.batch_size,
                timetable=(),
            )
            for entry in self.timetable
        )

    @property
    def main_size(self) -> int:
        """Number in `sizes` of the largest resolution, at which validation and previews are made."""
        return largest_entry(self.timetable) if self.timetable else 0


@dataclass(frozen=True)
class Sample:
    """One picture as the scan found it. Sizes are (width, height) after EXIF orientation."""

    path: str  # absolute; in a shard, the shard's path with the picture's name behind it
    size: tuple[int, int]
    caption: str  # raw text ("" when there is none); several lines only with enable_wildcard
    subset: SubsetConfig
    mtime_ns: int
    file_size: int
    has_alpha: bool = False
    mask_path: str | None = None  # conditioning image with the same stem (masked_loss)
    control_path: str | None = None  # the same where the conditioning images are control images
    legacy_latents: str | None = None  # sd-scripts' npz beside the picture, if one is there
    references: tuple[Sample, ...] = ()  # reference pictures in their order; they have no captions
    # path -> location, of the picture, its mask and its control image if they are inside a shard
    members: Mapping[str, Member] = field(default_factory=lambda: NO_MEMBERS, hash=False, compare=False)

    @property
    def folder(self) -> str:
        """The folder that the sample is from."""
        if (member := self.members.get(self.path)) is not None:
            return member.shard.home
        return self.subset.image_dir or os.path.dirname(self.path)
