# SPDX-License-Identifier: Apache-2.0
"""The timetable of resolutions: which size a dataset trains at in which share of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from library.errors import UserError
from library.types import Size
from library.values import cut, number

EXAMPLE = "[[0.0, 512], [0.5, 768], [0.8, 1024]]"
MOST_BATCH = 10**9


class SizeEntry(NamedTuple):
    """One entry of a timetable."""

    share: float  # of the run, at which it begins
    resolution: Size
    batch_size: int | None = None  # None: the dataset's


Timetable = tuple[SizeEntry, ...]


@dataclass(frozen=True)
class Stage:
    """The steps of a run in which all datasets keep their sizes. It begins with a new epoch."""

    number: int  # from 0
    first_step: int
    steps: int
    first_epoch: int  # from 0
    first_batch: int  # number that the micro-batches of its first epoch begin with; unique in the run
    batches_per_epoch: int  # micro-batches, of all processes
    steps_per_epoch: int

    @property
    def epochs(self) -> int:
        """Epochs of the stage; the last one may be cut short."""
        return math.ceil(self.steps / self.steps_per_epoch)

    def batches_before(self, epoch: int) -> int:
        """Number that the micro-batches of an epoch (from 0) of this stage begin with."""
        return self.first_batch + (epoch - self.first_epoch) * self.batches_per_epoch


# ---- reading ------------------------------------------------------------------------------------------------------


def read_timetable(value: Any, parse_resolution: Callable[[Any], Size | None]) -> Timetable:
    """The entries of [[share, resolution], [share, resolution, batch size]], or of such a text.

    Raises ValueError with what is wrong.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"expects entries such as {EXAMPLE}, got {cut(repr(value))}") from None
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"expects entries such as {EXAMPLE}, got {cut(repr(value))}")
    entries = tuple(_read_entry(item, parse_resolution) for item in value)
    shares = [entry.share for entry in entries]
    if shares[0] != 0:
        raise ValueError(f"must begin at share 0 of the run, got {shares[0]:g}")
    for before, share in pairwise(shares):
        if share <= before:
            raise ValueError(f"must have rising shares, got {share:g} after {before:g}")
    if shares[-1] >= 1:
        raise ValueError(f"must have shares below 1, the end of the run, got {shares[-1]:g}")
    return entries


def _read_entry(item: Any, parse_resolution: Callable[[Any], Size | None]) -> SizeEntry:
    """[share, resolution] or [share, resolution, batch size]."""
    if not isinstance(item, (list, tuple)) or len(item) not in (2, 3):
        raise ValueError(f"expects [share, resolution] or [share, resolution, batch size], got {cut(repr(item))}")
    try:
        share = number(item[0])
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise ValueError(f"expects shares of the run between 0 and 1, got {cut(repr(item[0]))}")
    resolution = parse_resolution(item[1])
    if resolution is None:
        raise ValueError(f"expects a resolution at share {share:g}, got {cut(repr(item[1]))}")
    batch = item[2] if len(item) == 3 else None
    if batch is not None and (not isinstance(batch, int) or isinstance(batch, bool) or not 0 < batch <= MOST_BATCH):
        raise ValueError(f"expects a whole batch size above 0 at share {share:g}, got {cut(repr(batch))}")
    return SizeEntry(share, resolution, batch)


def as_text(timetable: Timetable) -> str:
    """The text that `read_timetable` reads back."""
    return json.dumps(rows(timetable))


def rows(timetable: Timetable) -> list[list[Any]]:
    """The entries as JSON values: [share, [width, height]] or [share, [width, height], batch size]."""
    return [[e.share, list(e.resolution), *([] if e.batch_size is None else [e.batch_size])] for e in timetable]


def largest_entry(timetable: Timetable) -> int:
    """Number of the entry with the largest area, the last of equals."""
    areas = [entry.resolution[0] * entry.resolution[1] for entry in timetable]
    return max(range(len(areas)), key=lambda place: (areas[place], place))


def entry_at(timetable: Timetable, share: float) -> int:
    """Number of the entry that is trained at a share of the run."""
    return max(place for place, entry in enumerate(timetable) if entry.share <= share)


# ---- steps --------------------------------------------------------------------------------------------------------


def make_stages(
    shares: Sequence[float], batches: Sequence[int], *, per_step: int, max_steps: int, max_epochs: int | None
) -> tuple[Stage, ...]:
    """The stages of a run. batches: micro-batches of an epoch of each stage; per_step: of an optimizer step.

    Shares are of the steps, or, where the run is given in epochs, of the epochs: no epoch is then cut short. Raises
    UserError where a stage has no step or no epoch.
    """
    whole = max_epochs or max_steps
    begins = [math.floor(share * whole + 0.5) for share in shares]
    stages: list[Stage] = []
    step = epoch = batch = 0
    for number_, (begin, end, count) in enumerate(zip(begins, [*begins[1:], whole], batches, strict=True)):
        if end <= begin:
            unit, option = ("epochs", "--max_train_epochs") if max_epochs else ("steps", "--max_train_steps")
            advice = ", or give --max_train_steps instead" if max_epochs else ""
            raise UserError(
                f"resolution_schedule: {len(shares)} stages do not fit into {whole} {unit}: the one from share "
                f"{shares[number_]:g} has none. Raise {option}{advice}"
            )
        per_epoch = math.ceil(count / per_step)
        steps = (end - begin) * (per_epoch if max_epochs else 1)
        stages.append(Stage(number_, step, steps, epoch, batch, count, per_epoch))
        step, epoch, batch = step + steps, epoch + stages[-1].epochs, batch + stages[-1].epochs * count
    return tuple(stages)
