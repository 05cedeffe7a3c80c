# SPDX-License-Identifier: Apache-2.0
"""Options of the data room: where pictures and captions are, how they are changed, and what is cached."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.data.timetable import EXAMPLE, as_text, read_timetable
from library.options import Idle, at_least, between, option
from library.values import SEEDS, cut, number

LEAST_PIXELS, MOST_PIXELS = 8, 65535  # of a side; the VAEs make one number of 8 pixels
MOST_REPEATS = 10_000_000
NO_DATA = "no training data: give --dataset_config FILE.toml, or --train_data_dir FOLDER and --resolution"
INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")


# ---- values that are a pair ---------------------------------------------------------------------------------------


def _numbers(value: Any) -> list[float]:
    """The numbers of "a,b", "axb", a number or a list. Raises ValueError where there is something else."""
    items = re.split(r"[,x]", value.lower()) if isinstance(value, str) else value
    items = items if isinstance(items, (list, tuple)) else [items]
    return [number(item) for item in items]


def parse_resolution(value: Any) -> tuple[int, int] | None:
    """512, "512", "512,768", [512] or [512, 768] as (width, height)."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none")):
        return None
    try:
        numbers = _numbers(value)
        if len(numbers) not in (1, 2) or any(n != int(n) for n in numbers):
            raise ValueError
    except ValueError:
        raise ValueError(f"expects a whole number or [width, height], got {cut(repr(value))}") from None
    width, height = int(numbers[0]), int(numbers[-1])
    if min(width, height) < LEAST_PIXELS or max(width, height) > MOST_PIXELS:
        raise ValueError(f"must be between {LEAST_PIXELS} and {MOST_PIXELS}, got {cut(repr(value))}")
    return width, height


def parse_schedule(value: Any) -> str | None:
    """The entries of a timetable of resolutions as one text, which `read_timetable` reads."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none")):
        return None
    return as_text(read_timetable(value, parse_resolution))


def parse_zoom_range(value: Any) -> tuple[float, float] | None:
    """ "1.5,3" or [1.5, 3] as (low, high)."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none")):
        return None
    try:
        low, high = _numbers(value)
    except ValueError:
        raise ValueError(f"expects two numbers such as 1.5,3, got {cut(repr(value))}") from None
    if not 0 < low <= high < float("inf"):
        raise ValueError(f"must be two numbers above 0, the smaller one first, got {cut(repr(value))}")
    return low, high


def not_empty(value: str) -> str | None:
    """Problem of a text that must not be empty, or None."""
    return None if value else "must not be empty"


def dotted(extension: str) -> str:
    """The file suffix with its leading dot."""
    return extension if extension.startswith(".") or not extension else "." + extension


def parse_extension(value: Any) -> str | None:
    """A file suffix; the dot may be left out."""
    if value is None or (isinstance(value, str) and value.strip() in ("", "None")):
        return None
    if not isinstance(value, str):
        raise ValueError(f"expects a file suffix such as .txt, got {cut(repr(value))}")
    return dotted(value.strip())


# ---- the options --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataOptions:
    """Where the pictures are and what happens to them. Most are the fallback of the same key of --dataset_config."""

    dataset_config: str | None = option(None, help="TOML or JSON file that describes the datasets.", path=True)
    train_data_dir: str | None = option(
        None,
        help="Folder whose subfolders are named <repeats>_<class words>, or the pictures' folder with --in_json.",
        path=True,
    )
    reg_data_dir: str | None = option(
        None, help="Folder of regularisation pictures, laid out as --train_data_dir.", path=True
    )
    in_json: str | None = option(None, help="JSON or JSON Lines file with captions and tags per picture.", path=True)
    cache_info: bool = option(
        False,
        help="Remember sizes and captions of a folder.",
        answer="always done now: a small file list in the cache folder makes the next start quick",
    )
    shuffle_caption: bool = option(False, help="Shuffle the parts of a caption at every use.")
    caption_separator: str = option(",", help="What separates the parts of a caption.", check=not_empty)
    caption_extension: str | None = option(".caption", help="Suffix of caption files.", parse=parse_extension)
    caption_extention: str | None = option(
        None, help="Old spelling of --caption_extension; wins over it.", parse=parse_extension
    )
    keep_tokens: int = option(0, help="Number of leading caption parts that are not shuffled.", check=at_least(0))
    keep_tokens_separator: str = option(
        "", help="Mark in a caption: what stands before it (and after a second one) stays in place."
    )
    secondary_separator: str | None = option(
        None, help="Separates parts that are shuffled and dropped together; written as --caption_separator at the end."
    )
    enable_wildcard: bool = option(False, help="Choose among {a|b|c} in captions, and one line of several.")
    caption_prefix: str | None = option(None, help="Text put before each caption.")
    caption_suffix: str | None = option(None, help="Text put after each caption.")
    color_aug: bool = option(False, help="Vary hue and brightness at random.")
    flip_aug: bool = option(False, help="Mirror half of the pictures at random.")
    face_crop_aug_range: tuple[float, float] | None = option(
        None,
        help="Zoom range a,b of random crops around the face that is named in the file name.",
        parse=parse_zoom_range,
    )
    random_crop: bool = option(False, help="Cut at a random place instead of the middle.")
    debug_dataset: bool = option(False, help="Show what the first batches contain, and stop.")
    resolution: tuple[int, int] | None = option(
        None, help="Training size in pixels: one number, or width,height.", parse=parse_resolution
    )
    resolution_schedule: str | None = option(
        None,
        help="Sizes one after the other, instead of resolution: share of the run at which each begins, resolution, "
        f"and batch size if it is another one, such as {EXAMPLE}.",
        parse=parse_schedule,
    )
    enable_bucket: bool = option(False, help="Keep the shape of pictures: group them in buckets of similar shape.")
    min_bucket_reso: int = option(256, help="Smallest side of a bucket.", check=between(1, MOST_PIXELS))
    max_bucket_reso: int = option(1024, help="Largest side of a bucket.", check=between(1, MOST_PIXELS))
    bucket_reso_steps: int = option(64, help="Sides of buckets are multiples of this.", check=between(1, MOST_PIXELS))
    bucket_no_upscale: bool = option(False, help="Never enlarge a picture for its bucket.")
    resize_interpolation: str | None = option(
        None, help="How pictures are resized (default: area to shrink, Lanczos to enlarge).", choices=INTERPOLATIONS
    )
    token_warmup_min: int = option(1, help="Number of caption parts at the start of the warm-up.", check=at_least(0))
    token_warmup_step: float = option(
        0, help="Step (or fraction of the run, below 1) at which captions are whole.", check=at_least(0)
    )
    alpha_mask: bool = option(False, help="Use the alpha channel as the mask of the loss.")
    dataset_class: str | None = option(
        None,
        help="Dataset class of your own.",
        answer="not loaded: describe the data in --dataset_config, where metadata_file takes captions of any program",
    )
    caption_dropout_rate: float = option(0.0, help="Share of captions that are left empty.", check=between(0, 1))
    caption_dropout_every_n_epochs: int = option(
        0, help="Leave all captions empty in every n-th epoch.", check=at_least(0)
    )
    caption_tag_dropout_rate: float = option(0.0, help="Share of caption parts that are dropped.", check=between(0, 1))
    dataset_repeats: int = option(
        1, help="Times that each picture is used in an epoch.", check=at_least(1, MOST_REPEATS)
    )
    train_batch_size: int = option(1, help="Pictures in a batch, per device.", check=at_least(1))
    max_data_loader_n_workers: int = option(
        8, help="Most processes that load pictures (never more than cores).", check=at_least(0)
    )
    persistent_data_loader_workers: bool = option(
        False, help="Keep the loading processes from epoch to epoch.", answer="always so"
    )
    prior_loss_weight: float = option(1.0, help="Weight of the loss of regularisation pictures.", check=at_least(0))
    conditioning_data_dir: str | None = option(
        None, help="Folder of masks (or control pictures) with the pictures' names.", path=True
    )
    masked_loss: bool = option(False, help="Count the loss only where the mask is white.")
    validation_seed: int | None = option(
        None, help="Seed of the choice of validation pictures (default: --seed).", check=between(*SEEDS)
    )
    validation_split: float = option(0.0, help="Share of the pictures kept for validation.", check=between(0, 1))

    @property
    def is_given(self) -> bool:
        """Whether there is something to read pictures from."""
        return bool(self.dataset_config or self.train_data_dir or self.in_json)

    def problems(self) -> Iterator[str]:
        """Combinations that make no sense, one line each."""
        if self.dataset_config:
            for name in ("train_data_dir", "reg_data_dir", "in_json"):
                if vars(self)[name]:
                    yield Idle(f"--{name} has no effect with --dataset_config: give one of them, not both")
        elif self.reg_data_dir and not self.train_data_dir:
            yield "--reg_data_dir needs --train_data_dir: regularisation pictures alone teach nothing"
        elif self.reg_data_dir and self.in_json:
            yield Idle("--reg_data_dir has no effect with --in_json: describe both in a --dataset_config")
        if self.dataset_repeats != 1 and self.train_data_dir and not (self.in_json or self.dataset_config):
            yield Idle(
                "--dataset_repeats has no effect with --train_data_dir, whose folders' names say how often (10_name)"
            )
        if self.min_bucket_reso > self.max_bucket_reso:
            yield f"--min_bucket_reso {self.min_bucket_reso} is larger than --max_bucket_reso {self.max_bucket_reso}"


@dataclass(frozen=True)
class CacheOptions:
    """What is computed once and kept."""

    cache_latents: bool = option(False, help="Encode the pictures once, before the training.")
    vae_batch_size: int = option(1, help="Pictures that are encoded at once.", check=at_least(1), zero_is_unset=True)
    cache_latents_to_disk: bool = option(False, help="Keep the encoded pictures on disk (turns on --cache_latents).")
    skip_cache_check: bool = option(False, help="Trust what is cached on disk without looking at the pictures again.")
    cache_text_encoder_outputs: bool = option(False, help="Encode the captions once, before the training.")
    cache_text_encoder_outputs_to_disk: bool = option(
        False, help="Keep the encoded captions on disk (turns on --cache_text_encoder_outputs)."
    )
    text_encoder_batch_size: int | None = option(
        None,
        help="Captions that are encoded at once (default: 16).",
        check=at_least(1),
        zero_is_unset=True,
    )
    caption_variants: int = option(
        8,
        help="Most texts that are kept of a caption that varies when captions are cached (at least one of each line).",
        check=between(1, 1000),
    )
    cache_dir: str | None = option(
        None, help="Folder of the caches (default: .trainyard in each picture folder).", path=True
    )

    @property
    def latents(self) -> bool:
        """Latents are cached, in memory or on disk."""
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def texts(self) -> bool:
        """Text-encoder outputs are cached, in memory or on disk."""
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk

    def problems(self) -> Iterator[str]:
        """Combinations that make no sense, one line each."""
        if self.skip_cache_check and not (self.cache_latents_to_disk or self.cache_text_encoder_outputs_to_disk):
            yield Idle("--skip_cache_check has no effect without --cache_latents_to_disk or the same for text outputs")
