# SPDX-License-Identifier: Apache-2.0
"""The length of a run in steps, epochs and batches, computed once and printed before training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

from library.data.dataset import TrainingData
from library.data.lint import folder_lines
from library.data.scan import Scan
from library.data.timetable import Stage, make_stages
from library.errors import UserError, first_names
from library.types import Position


@dataclass(frozen=True)
class RunPlan:
    """Steps and epochs of a run. A micro-batch is the batch of one forward pass in one process.

    The steps do not depend on how many processes share the micro-batches of each: only `batches_per_step` counts.
    """

    stages: tuple[Stage, ...]  # one, unless resolutions change
    accumulation: int
    num_processes: int
    seed: int

    @property
    def batches_per_step(self) -> int:
        """Micro-batches of an optimizer step, over all processes."""
        return self.accumulation * self.num_processes

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of one epoch of the first stage, of all processes."""
        return self.stages[0].batches_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch of the first stage; the last one may have fewer micro-batches."""
        return self.stages[0].steps_per_epoch

    @property
    def total_epochs(self) -> int:
        return sum(stage.epochs for stage in self.stages)

    def stage_of(self, epoch: int) -> Stage:
        """The stage that an epoch (0-based) belongs to."""
        return next(stage for stage in reversed(self.stages) if stage.first_epoch <= epoch)

    def step_of_epoch(self, epoch: int) -> int:
        """The first optimizer step of an epoch (both 0-based)."""
        stage = self.stage_of(epoch)
        return stage.first_step + (epoch - stage.first_epoch) * stage.steps_per_epoch

    def require_steps_after(self, step: int) -> None:
        """Raises UserError if a run that continues after `step` steps has nothing left to do."""
        if step >= self.total_steps:
            raise UserError(
                f"the run starts at step {step} and ends at step {self.total_steps}: nothing is left to train. "
                "Raise --max_train_steps or --max_train_epochs"
            )

    def position_of(self, step: int) -> Position:
        """The position before optimizer step `step` (0-based)."""
        stage = next(stage for stage in reversed(self.stages) if stage.first_step <= step)
        epoch, rest = divmod(step - stage.first_step, stage.steps_per_epoch)
        return Position(step, stage.first_epoch + epoch, rest * self.batches_per_step)

    def batches_of(self, epoch: int) -> int:
        """Micro-batches of an epoch (0-based) that are trained: fewer in the last one of a stage."""
        stage = self.stage_of(epoch)
        begun = (epoch - stage.first_epoch) * stage.steps_per_epoch
        return min(stage.batches_per_epoch, (stage.steps - begun) * self.batches_per_step)

    def groups(self, epoch: int, first_batch: int) -> Iterator[range]:
        """Micro-batches of an epoch (0-based) from `first_batch` on, grouped by optimizer step."""
        batches = self.batches_of(epoch)
        for start in range(first_batch, batches, self.batches_per_step):
            yield range(start, min(start + self.batches_per_step, batches))

    def after(self, position: Position) -> Position:
        """The position after the next optimizer step."""
        stage = self.stage_of(position.epoch)
        step, batch = position.step + 1, position.batch + self.batches_per_step
        changes = step == stage.first_step + stage.steps and step < self.total_steps
        if changes or batch >= stage.batches_per_epoch:
            return Position(step, position.epoch + 1, 0)
        return Position(step, position.epoch, batch)


def make_plan(
    *,
    total_batches: Sequence[int],
    shares: Sequence[float] = (0.0,),
    num_processes: int,
    accumulation: int,
    max_steps: int,
    max_epochs: int | None,
    seed: int,
) -> RunPlan:
    """The plan of a run; `max_epochs` overrides `max_steps`. Raises UserError if there is no batch.

    total_batches: micro-batches of an epoch of each stage, of all processes. shares: where in the run stages begin.
    """
    if 0 in total_batches:
        raise UserError("no batch to train on: the dataset is empty (all of it may have gone to the validation split)")
    stages = make_stages(
        shares, total_batches, per_step=accumulation * num_processes, max_steps=max_steps, max_epochs=max_epochs
    )
    return RunPlan(stages, accumulation, num_processes, seed)


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
    yield from stage_lines(data, plan)
    sizes = {config.batch_size for stage in plan.stages for config in data.stage_sizes(stage.number)}
    effective = "/".join(str(size * plan.accumulation * plan.num_processes) for size in sorted(sizes))
    of_steps = "/".join(dict.fromkeys(str(stage.steps_per_epoch) for stage in plan.stages))
    yield (
        f"plan: {plan.total_steps} steps = {plan.total_epochs} epochs of {of_steps} steps; a step is "
        f"{plan.accumulation} batch(es) on {plan.num_processes} process(es), effective batch size {effective}; "
        f"seed {plan.seed}"
    )


def stage_lines(data: TrainingData, plan: RunPlan) -> Iterator[str]:
    """One line for each stage of a run whose resolutions change."""
    if len(plan.stages) == 1:
        return
    for stage in plan.stages:
        configs = data.stage_sizes(stage.number)
        sizes = [("{}x{}".format(*c.buckets.resolution), c.batch_size) for c in configs]
        texts = dict.fromkeys(f"{size} in batches of {count}" for size, count in sizes)
        yield (
            f"stage {stage.number + 1}: {' and '.join(texts)}, from step {stage.first_step + 1}, {stage.steps} steps = "
            f"{stage.steps / stage.steps_per_epoch:.3g} epochs of {stage.steps_per_epoch} steps"
        )
    if any(stats.validation_images for stats in data.stats()):
        yield "validation: always at the largest resolution of each dataset"


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
