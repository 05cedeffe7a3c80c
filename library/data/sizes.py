# SPDX-License-Identifier: Apache-2.0
"""The sizes of a dataset: one resolution, or a timetable of several, and the bucket rules of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from library.data.options import parse_resolution
from library.data.records import BucketRules
from library.data.timetable import Timetable, largest_entry, read_timetable

SCHEDULE = "resolution_schedule"


def timetable_of(tables: Sequence[Mapping[str, Any]]) -> Timetable:
    """The timetable of a dataset; empty where it has one resolution. tables: from the narrowest to the command line.

    The narrower table wins, as always. Raises ValueError where one table has a timetable and another resolution.
    """
    for table in tables:
        text, resolution = table.get(SCHEDULE), table.get("resolution")
        if text is not None:
            timetable = read_timetable(text, parse_resolution)
            largest = timetable[largest_entry(timetable)].resolution
            if resolution not in (None, largest):
                raise ValueError(
                    f"resolution {_shown(resolution)} contradicts {SCHEDULE}, whose largest is {_shown(largest)}: "
                    "leave resolution out"
                )
            return timetable
        if resolution is not None:
            return ()
    return ()


def rules_of_sizes(rules: BucketRules, timetable: Timetable) -> list[BucketRules]:
    """The bucket rules at each resolution of a timetable."""
    return [replace(rules, resolution=entry.resolution) for entry in timetable]


def size_problem(rules: BucketRules, bucket_step: int) -> str | None:
    """Why all pictures cannot have the resolution of an entry. bucket_step: sides are multiples of it."""
    sides = [side for side in rules.resolution if side % bucket_step]
    if rules.enable_bucket or not sides:
        return None
    near = [max(bucket_step, round(side / bucket_step) * bucket_step) for side in rules.resolution]
    return (
        f"{SCHEDULE}: {_shown(rules.resolution)} is not a multiple of {bucket_step}, which this model needs; "
        f"the nearest is {_shown((near[0], near[1]))}"
    )


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
