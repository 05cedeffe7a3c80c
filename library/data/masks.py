# SPDX-License-Identifier: Apache-2.0
"""What masks leave of the pictures, and which are black where their picture is trained: those teach nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from library.data.buckets import Bucket, center_crop
from library.data.images import load_image, moves_crop, wants_mask
from library.data.records import Sample
from library.errors import UserError, first_names
from library.objectives.loss import DARK

MOST_NAMES = 10
MOST_PIXELS = 2_000_000_000  # that are read, of pictures evenly spread over the data: some seconds on a few cores


class MaskReport(NamedTuple):
    """What is said about the masks of a run before it starts."""

    summary: str | None  # how many pictures have one, and what share of their area trains; None: no picture has one
    warning: str | None


class Light(NamedTuple):
    """A mask in what is trained of its picture."""

    brightest: int  # of 255
    mean: float  # in [0, 1]


def check_masks(trained: Sequence[Sequence[tuple[Sample, Bucket]]], *, masked_loss: bool) -> MaskReport:
    """Read the masks and report what they leave of the pictures. trained: the pictures of each dataset.

    Raises UserError when all masks are black and no other picture is left to learn from, or a mask cannot be read.
    """
    pairs = [pair for dataset in trained for pair in dataset if not pair[0].subset.is_reg]
    masked = [pair for pair in pairs if _mask_file(pair[0], masked_loss=masked_loss)]
    if masked_loss and not masked:
        return MaskReport(None, "--masked_loss: no effect, no picture that is trained has a mask")
    stride = math.ceil(sum(sample.size[0] * sample.size[1] for sample, _ in masked) / MOST_PIXELS) or 1
    looked_at = masked[::stride]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = list(pool.map(lambda pair: _light(*pair, masked_loss=masked_loss), looked_at))
    wrong = [value for value in found if isinstance(value, str)]
    if wrong:
        more = [f"and {len(wrong) - MOST_NAMES} more masks cannot be read"] if len(wrong) > MOST_NAMES else []
        raise UserError([*wrong[:MOST_NAMES], *more])
    lights = [value for value in found if isinstance(value, Light)]
    summary = _summary(lights, len(masked), len(pairs)) if masked else None
    dark = [(sample, light.brightest) for (sample, _), light in zip(looked_at, lights) if light.brightest < DARK]
    if not dark:
        return MaskReport(summary, None)
    brightest = max(value for _, value in dark)
    kind = f"black or nearly so (no pixel above {brightest} of 255)" if brightest else "black"
    files = dict.fromkeys(_mask_file(sample, masked_loss=masked_loss) or "" for sample, _ in dark)
    rest = f"{first_names(list(files), MOST_NAMES)}; the loss counts where a mask is white or a picture opaque"
    others = (pair for index, pair in enumerate(masked) if index % stride)
    if len(masked) == len(pairs) and len(dark) == len(looked_at) and all(_is_dark(*o, masked_loss) for o in others):
        raise UserError(f"all masks are {kind} where their pictures are trained, so nothing would be learned: {rest}")
    count = "1 mask is" if len(files) == 1 else f"{len(files)} masks are"
    if stride > 1:
        count = f"of {len(looked_at)} masks that were looked at, {count}"
    return MaskReport(summary, f"{count} {kind} where the picture is trained, which then teaches nothing: {rest}")


def _summary(lights: Sequence[Light], masked: int, pictures: int) -> str:
    """The line about all masks. lights: of those that were looked at."""
    share = sum(light.mean for light in lights) / len(lights)
    of = f" (of {len(lights)} that were looked at)" if len(lights) < masked else ""
    return f"masks: {masked} of {pictures} pictures have one, and {share:.1%} of their area trains{of}"


def _mask_file(sample: Sample, *, masked_loss: bool) -> str | None:
    """The file that holds a picture's mask; None where everything counts."""
    if not wants_mask(sample, masked_loss=masked_loss):
        return None
    if masked_loss and sample.mask_path is not None:
        return sample.mask_path
    return sample.path if sample.has_alpha else None


def _light(sample: Sample, bucket: Bucket, *, masked_loss: bool) -> Light | str:
    """A mask in what is trained of its picture, or why it cannot be read."""
    path = _mask_file(sample, masked_loss=masked_loss)
    assert path is not None
    try:
        picture = load_image(path, alpha=True, member=sample.members.get(path))
    except UserError as error:
        return error.problems[0]
    mask = picture.rgb[..., 0] if path == sample.mask_path else picture.alpha
    if mask is None:
        return Light(255, 1.0)
    part = _trained_part(mask, sample, bucket)
    return Light(int(part.max()), float(part.mean()) / 255)


def _is_dark(sample: Sample, bucket: Bucket, masked_loss: bool) -> bool:
    light = _light(sample, bucket, masked_loss=masked_loss)
    return isinstance(light, Light) and light.brightest < DARK


def _trained_part(mask: np.ndarray, sample: Sample, bucket: Bucket) -> np.ndarray:
    """The part of a mask (H W, any size) inside the centred crop; all of it where the crop moves."""
    if moves_crop(sample.subset.images):
        return mask
    (left, top), (width, height) = center_crop(bucket), bucket.resized
    x, y = mask.shape[1] / width, mask.shape[0] / height
    columns = slice(math.floor(left * x), math.ceil((left + bucket.reso[0]) * x))
    return mask[math.floor(top * y) : math.ceil((top + bucket.reso[1]) * y), columns]
