# SPDX-License-Identifier: Apache-2.0
"""Buckets: which size a picture trains at, how it is resized to cover that size, and where it is cropped.

Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from library.data.records import BucketRules
from library.errors import UserError
from library.types import Size

LONGEST = 16  # most that a side is taken as, in sides of the square of the same area


class Bucket(NamedTuple):
    """`reso` is the size that is trained; `resized` the size of the whole picture before it is cropped to `reso`."""

    reso: Size
    resized: Size


class BucketManager:
    """The sizes of one dataset. `predefined` is empty with bucket_no_upscale: there each picture makes its own bucket.

    Raises UserError when the resolution is smaller than the step of the buckets.
    """

    def __init__(self, rules: BucketRules):
        self.rules = rules
        self.predefined: list[Size] = []
        self.adjusted_min_max: tuple[int, int] | None = None
        self._known: dict[Size, Bucket] = {}
        if not rules.enable_bucket:
            self.predefined = [rules.resolution]
        else:
            self._prepare(rules)
        self._ratios = np.array([width / height for width, height in self.predefined])

    def _prepare(self, rules: BucketRules) -> None:
        step = rules.bucket_reso_steps
        # min is rounded down and max up, so that both are buckets
        self.adjusted_min_max = (
            max(step, rules.min_bucket_reso // step * step),
            -(-rules.max_bucket_reso // step) * step,
        )
        if not rules.bucket_no_upscale:
            self.predefined = predefined_resolutions(rules.resolution, *self.adjusted_min_max, step)

    @property
    def max_area(self) -> int:
        return self.rules.resolution[0] * self.rules.resolution[1]

    def select(self, size: Size, name: str = "a picture") -> Bucket:
        """The bucket of a picture of `size`. Raises UserError naming it `name` when a side would be below one step."""
        found = self._known.get(size)
        if found is None:
            found = self._fit(size) if self.predefined else self._fit_without_upscale(size)
            self._known[size] = found
        if min(found.reso) <= 0:
            raise UserError(self.refusal(size, name))
        return found

    def refusal(self, size: Size, name: str) -> str:
        """The line about a picture that fits no bucket."""
        step = self.rules.bucket_reso_steps
        return (
            f"{name}: {size[0]}x{size[1]} is too small or too narrow for a bucket, whose sides are at least {step} "
            f"pixels; remove it, lower bucket_reso_steps or switch bucket_no_upscale off"
        )

    def _fit(self, size: Size) -> Bucket:
        """The predefined bucket of the picture's own size, or of the nearest aspect ratio; the picture covers it."""
        ratio = size[0] / size[1]
        if size in self.predefined:
            reso = size
        else:  # the first of equals
            reso = self.predefined[int(np.abs(self._ratios - ratio).argmin())]
        return covering(size, reso)

    def _fit_without_upscale(self, size: Size) -> Bucket:
        """The picture's own bucket: shrunk to the area of the resolution if larger, then cropped to whole steps."""
        step = self.rules.bucket_reso_steps
        resized = size if size[0] * size[1] <= self.max_area else self._shrink(size)
        return Bucket((resized[0] // step * step, resized[1] // step * step), resized)

    def _shrink(self, size: Size) -> Size:
        """The size after shrinking: one side is a whole number of steps, whichever keeps the aspect ratio better."""
        step, ratio = self.rules.bucket_reso_steps, size[0] / size[1]
        width = math.sqrt(self.max_area * ratio)
        height = self.max_area / width
        by_width = _round(width) // step * step
        by_height = _round(height) // step * step
        height_of_width = _round(by_width / ratio) // step * step
        width_of_height = _round(by_height * ratio) // step * step
        if by_width == 0 or by_height == 0 or height_of_width == 0:  # too narrow for a bucket: `select` raises
            return (0, 0)
        error_by_width = abs(by_width / height_of_width - ratio)
        error_by_height = abs(width_of_height / by_height - ratio)
        if error_by_width < error_by_height:
            return (by_width, _round(by_width / ratio))
        return (_round(by_height * ratio), by_height)


def covering(size: Size, reso: Size) -> Bucket:
    """The bucket `reso` of a picture of `size`, which is resized so that it just covers it."""
    scale = reso[1] / size[1] if size[0] / size[1] > reso[0] / reso[1] else reso[0] / size[0]
    return Bucket(reso, (_round(size[0] * scale), _round(size[1] * scale)))


def predefined_resolutions(resolution: Size, low: int, high: int, step: int) -> list[Size]:
    """Sorted sizes with sides in steps between `low` and `high` (the square may be smaller), of at most the same area.

    Raises UserError when not even the square has a side of one step.
    """
    area = resolution[0] * resolution[1]
    square = math.isqrt(area) // step * step
    if square == 0:
        raise UserError(
            f"resolution: {resolution[0]}x{resolution[1]} is smaller than bucket_reso_steps = {step}; "
            f"lower bucket_reso_steps"
        )
    found = {(square, square)}
    for width in range(low, high + 1, step):
        height = min(high, area // width // step * step)
        if height >= low:
            found |= {(width, height), (height, width)}
    return sorted(found)


def uncapped(rules: BucketRules) -> BucketRules | None:
    """The same rules without max_bucket_reso; None where it limits nothing."""
    if not rules.enable_bucket or rules.bucket_no_upscale:
        return None
    area = rules.resolution[0] * rules.resolution[1]
    shortest = max(rules.min_bucket_reso, rules.bucket_reso_steps)
    longest = min(area // shortest, LONGEST * math.isqrt(area))
    return replace(rules, max_bucket_reso=longest) if longest > rules.max_bucket_reso else None


def crop_share(bucket: Bucket) -> float:
    """The share of a picture's area that the crop takes."""
    return 1 - bucket.reso[0] * bucket.reso[1] / (bucket.resized[0] * bucket.resized[1])


def crop_ltrb(reso: Size, size: Size) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) for SDXL's micro-conditioning: a picture of `size` scaled to fit in `reso`, centred.

    This is what existing models were trained with; it depends on the original size and not on the rounded `resized`.
    """
    ratio = size[0] / size[1]
    if reso[0] / reso[1] > ratio:
        width, height = reso[1] * ratio, float(reso[1])
    else:
        width, height = float(reso[0]), reso[0] / ratio
    left, top = (reso[0] - width) // 2, (reso[1] - height) // 2
    return (left, top, left + width, top + height)


def center_crop(bucket: Bucket) -> tuple[int, int]:
    """(x, y) of the centred crop of `reso` in `resized`; 0 along a side that is not longer."""
    return (max(bucket.resized[0] - bucket.reso[0], 0) // 2, max(bucket.resized[1] - bucket.reso[1], 0) // 2)


def _round(value: float) -> int:
    """The nearest whole number, halves rounded up (Python's round goes to the even one)."""
    return int(value + 0.5)
