# SPDX-License-Identifier: Apache-2.0
"""The length of a run in steps, epochs and batches, computed once and printed before training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, overload

from library.data.dataset import TrainingData
from library.data.lint import folder_lines
from library.data.scan import Scan
from library.errors import UserError, first_names
from library.types import Position


@dataclass(frozen=True)
class RunPlan:
    """Steps and epochs of a run. A micro-batch is the batch of one forward pass in one process.

    The steps do not depend on how many processes share the micro-batches of each: only `batches_per_step` counts.
    """

    batches_per_epoch: int  # micro-batches, of all processes
    accumulation: int
    total_steps: int
    num_processes: int
    seed: int

    @property
    def batches_per_step(self) -> int:
        """Micro-batches of an optimizer step, over all processes."""
        return self.accumulation * self.num_processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last one may have fewer micro-batches."""
        return math.ceil(self.batches_per_epoch / self.batches_per_step)

    @property
    def total_epochs(self) -> int:
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def require_steps_after(self, step: int) -> None:
        """Raises UserError if a run that continues after `step` steps has nothing left to do."""
        if step >= self.total_steps:
            raise UserError(
                f"the run starts at step {step} and ends at step {self.total_steps}: nothing is left to train. "
                "Raise --max_train_steps or --max_train_epochs"
            )

    def position_of(self, step: int) -> Position:
        """The position before optimizer step `step` (0-based)."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        return Position(step, epoch, rest * self.batches_per_step)

    def groups(self, first_batch: int) -> Iterator[range]:
        """Micro-batches of an epoch from `first_batch` on, grouped by optimizer step."""
        for start in range(first_batch, self.batches_per_epoch, self.batches_per_step):
            yield range(start, min(start + self.batches_per_step, self.batches_per_epoch))

    def end_of_step(self, batch: int) -> int:
        """End (exclusive) of the micro-batches of the step that begins with micro-batch `batch` of an epoch."""
        return min(batch + self.batches_per_step, self.batches_per_epoch)


def make_plan(
    *, total_batches: int, num_processes: int, accumulation: int, max_steps: int, max_epochs: int | None, seed: int
) -> RunPlan:
    """The plan of a run; `max_epochs` overrides `max_steps`. Raises UserError if there is no batch.

    total_batches: micro-batches of an epoch, of all processes.
    """
    if total_batches == 0:
        raise UserError("no batch to train on: the dataset is empty (all of it may have gone to the validation split)")
    plan = RunPlan(total_batches, accumulation, max_steps, num_processes, seed)
    return replace(plan, total_steps=max_epochs * plan.steps_per_epoch) if max_epochs else plan


def describe(found: Scan, data: TrainingData, plan: RunPlan) -> Iterator[str]:
    """Lines about the datasets and the length of the run, printed before the start."""
    yield from folder_lines(found)
    for index, stats in enumerate(data.stats()):
        buckets = ", ".join(f"{w}x{h}: {count}" for (w, h), count in stats.buckets)
        reg = f", {stats.reg_images} regularisation pictures used {stats.reg_uses} times" if stats.reg_images else ""
        held_out = f", {stats.validation_images} held out for validation" if stats.validation_images else ""
        yield f"dataset {index + 1}: {stats.images} pictures, {stats.uses} with repeats{reg}{held_out}"
        yield f"dataset {index + 1}: batch size {stats.batch_size}, {stats.batches} batches, buckets {buckets}"
        if stats.reg_unused:
            unused = f"{len(stats.reg_unused)} regularisation pictures are not used"
            yield f"dataset {index + 1}: {unused}: {first_names(stats.reg_unused)}"
    sizes = {stats.batch_size for stats in data.stats()}
    effective = "/".join(str(size * plan.accumulation * plan.num_processes) for size in sorted(sizes))
    yield (
        f"plan: {plan.total_steps} steps = {plan.total_epochs} epochs of {plan.steps_per_epoch} steps; a step is "
        f"{plan.accumulation} batch(es) on {plan.num_processes} process(es), effective batch size {effective}; "
        f"seed {plan.seed}"
    )


T = TypeVar("T")


def share_of(items: Sequence[T], rank: int, world: int) -> Sequence[T]:
    """The items of one process. A process that would have fewer repeats another's item, so that all have as many."""
    own = items[rank::world]
    return own if len(own) == math.ceil(len(items) / world) else _WithOneMore(own, items[rank % len(items)])


class _WithOneMore(Sequence[T]):
    """A sequence with one item appended, without a copy: an epoch may have millions of batches."""

    def __init__(self, items: Sequence[T], last: T) -> None:
        self.items, self.last = items, last

    def __len__(self) -> int:
        return len(self.items) + 1

    @overload
    def __getitem__(self, which: int) -> T: ...
    @overload
    def __getitem__(self, which: slice) -> Sequence[T]: ...
    def __getitem__(self, which: int | slice) -> T | Sequence[T]:
        places = range(len(self))[which]
        if isinstance(places, int):
            return self.last if places == len(self.items) else self.items[places]
        if places and places.step == 1 and places.stop == len(self):
            return _WithOneMore(self.items[places.start :], self.last)
        return [self[place] for place in places]
