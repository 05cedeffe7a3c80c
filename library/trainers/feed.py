# SPDX-License-Identifier: Apache-2.0
"""Iteration over the batches of a run, step by step; a loading error is held back until the state is saved."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import replace

from library.data.dataset import TrainingData
from library.data.loader import BatchLoader, Job, jobs_of
from library.trainers.run_plan import RunPlan, share_of
from library.types import Batch, Position

Steps = Generator[list[Batch], None, None]
STEPS_AHEAD = 2  # with several processes: until all know that one of them has no more batches


class Feed:
    """Iterates over the batches of successive optimizer steps.

    With several processes it loads STEPS_AHEAD steps ahead of the training: a process that cannot load a batch still
    has enough steps to take until all processes stop after the same step (`Vote`).
    """

    def __init__(self, steps: Steps, *, processes: int) -> None:
        self.steps, self.ahead = steps, STEPS_AHEAD if processes > 1 else 0
        self.failure: Exception | None = None  # why there are no more batches
        self._waiting: deque[list[Batch]] = deque()
        self._ended = False
        if self.ahead:
            self._fill()

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            self._fill()
            if not self._waiting:
                return
            yield self._waiting.popleft()

    def _fill(self) -> None:
        while not self._ended and len(self._waiting) <= self.ahead:
            try:
                self._waiting.append(next(self.steps))
            except StopIteration:
                self._ended = True
            except Exception as error:  # the weights are whole, so the state is saved before the run ends with this
                self.failure, self._ended = error, True

    def close(self) -> None:
        """Stop the processes that load pictures."""
        self._waiting.clear()
        self.steps.close()


def steps_of(
    data: TrainingData, loader: BatchLoader, plan: RunPlan, start: Position, *, rank: int, world: int
) -> Steps:
    """Yield one process's micro-batches of each optimizer step, from `start` to the end of the run."""
    step, epoch, first = start.step, start.epoch, start.batch
    with loader:
        batches = loader.run(_jobs(data, plan, start, rank=rank, world=world))
        while step < plan.total_steps:
            for group in plan.groups(epoch, first):
                # a batch of another process that fills up the last step of an epoch must not count twice
                shares = [
                    1 / len(group) if place < len(group) else 0.0 for place in range(rank, rank + len(group), world)
                ]
                yield [replace(next(batches), share=share) for share in shares]
                step += 1
                if step >= plan.total_steps:
                    return
            epoch, first = epoch + 1, 0


def _jobs(data: TrainingData, plan: RunPlan, start: Position, *, rank: int, world: int) -> Iterator[Job]:
    """One process's batches of all epochs, so that the loading does not stop where an epoch ends."""
    step, epoch, first = start.step, start.epoch, start.batch
    while step < plan.total_steps:
        own = share_of(data.plan_epoch(epoch + 1)[first : plan.batches_of(epoch)], rank, world)
        yield from jobs_of(own, step_of_first=step, accumulation=plan.accumulation)
        step += sum(1 for _ in plan.groups(epoch, first))
        epoch, first = epoch + 1, 0
