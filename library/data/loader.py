# SPDX-License-Identifier: Apache-2.0
"""Loads planned batches, in this process or in worker processes. The batches are the same either way."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import get_temp_dir
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.utils.data

from library.data.plan import BatchPlan
from library.errors import ProcessDied, UserError
from library.stopping import ignore_signals, signals_held_back
from library.types import Batch

Job = tuple[BatchPlan, int]  # what is loaded, and the optimizer step that it is loaded for


class LoadsBatches(Protocol):
    """The data as the loader sees it: `TrainingData`."""

    def load(self, plan: BatchPlan, *, step: int) -> Batch: ...


class BatchLoader:
    """Loads the batches of a run, in worker processes if asked for. A context manager, or call `close`.

        with data.loader(workers=2, persistent=True) as loader:
            for epoch in (1, 2):
                for batch in loader.run(data.plan_epoch(epoch), step_of_first=step):
                    ...

    persistent: workers live from one `run` to the next. pin_memory: batches come in page-locked memory (needs a GPU).
    """

    def __init__(self, data: LoadsBatches, *, workers: int = 0, persistent: bool = False, pin_memory: bool = False):
        self._schedule = _Schedule()
        self._running = False
        self._workers: set[BaseProcess] = set()
        # The sampler yields whole jobs instead of indices, so that workers which outlive an epoch need no new plan.
        self._torch_loader: torch.utils.data.DataLoader | None = torch.utils.data.DataLoader(
            _Loads(data),
            batch_size=None,
            sampler=self._schedule,
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_for_main_process_alone,
            pin_memory=pin_memory,
            persistent_workers=persistent and workers > 0,
            generator=torch.Generator(),  # else every run would draw a number from torch's global generator
        )

    def run(
        self, plans: Sequence[BatchPlan], *, step_of_first: int = 0, accumulation: int = 1
    ) -> Generator[Batch, None, None]:
        """The batches of `plans` in order; each `accumulation` of them belong to one optimizer step, the first to
        `step_of_first`.

        Raises UserError for a picture that cannot be read, ProcessDied where a worker was killed, ValueError while
        another run of this loader is in progress (a validation in the middle of an epoch needs a loader of its own).
        """
        if self._torch_loader is None or self._running:
            raise ValueError("the loader is closed, or a run is in progress")
        self._running = True
        self._schedule.plans, self._schedule.step_of_first = plans, step_of_first
        self._schedule.accumulation = accumulation
        results: Iterator[Batch | UserError] | None = None
        try:
            results = self._started()
            while True:
                result = self._next(results)
                if isinstance(result, UserError):
                    raise result
                if result is None:
                    return
                yield result
        finally:
            self._running = False
            results = None  # workers that are not persistent end with their last reference

    def _started(self) -> Iterator[Batch | UserError]:
        """The results of a run; starts workers if there are none."""
        assert self._torch_loader is not None
        before = {*multiprocessing.active_children()}
        if self._torch_loader.num_workers:
            get_temp_dir()  # the workers' too, once it is there: one that is killed cannot remove its own
        with signals_held_back(), _kept_child_handler():
            results = iter(self._torch_loader)
        self._workers = {w for w in self._workers if w.is_alive()} | {*multiprocessing.active_children()} - before
        return results

    def _next(self, results: Iterator[Batch | UserError]) -> Batch | UserError | None:
        """The next result; None at the end. Raises ProcessDied where a worker was killed."""
        try:
            return next(results, None)
        except Exception as error:
            wait([worker.sentinel for worker in self._workers], timeout=10)  # its connections break before it is gone
            codes = [worker.exitcode for worker in self._workers if worker.exitcode]
            if not codes:
                raise
            raise ProcessDied(_why_died(codes[0])) from error

    def close(self) -> None:
        """End the workers, also one that hangs while reading a file."""
        self._torch_loader = None
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()
        self._workers = set()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Schedule(torch.utils.data.Sampler):
    """The jobs of the current run, in order."""

    def __init__(self) -> None:
        self.plans: Sequence[BatchPlan] = ()
        self.step_of_first = 0
        self.accumulation = 1

    def __iter__(self) -> Iterator[Job]:
        for i, plan in enumerate(self.plans):
            yield plan, self.step_of_first + i // self.accumulation

    def __len__(self) -> int:
        return len(self.plans)


class _Loads(torch.utils.data.Dataset):
    """A "dataset" whose index is a job."""

    def __init__(self, data: LoadsBatches):
        self.data = data

    def __getitem__(self, job: Job) -> Batch | UserError:
        try:
            return self.data.load(job[0], step=job[1])
        except UserError as error:  # returned, because torch would wrap it into the text of a traceback
            return error


def _for_main_process_alone(worker: int) -> None:
    """In a worker: leave signals to the whole process group to the main process, which ends the workers itself."""
    ignore_signals()


@contextmanager
def _kept_child_handler() -> Iterator[None]:
    """Without torch's SIGCHLD handler, which raises anywhere: the next batch reports a dead worker."""
    if threading.current_thread() is not threading.main_thread() or "SIGCHLD" not in dir(signal):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)


def _why_died(code: int) -> str:
    """One line about a worker that ended with this code: minus the number of the signal that killed it."""
    name = signal.Signals(-code).name if -code in {*signal.Signals} else f"exit code {code}"
    cause = {
        "SIGKILL": "this is what a system does that is out of main memory",
        "SIGBUS": "this is what happens where shared memory (/dev/shm) is full",
    }.get(name, "not by this program")
    return (
        f"a process that loads pictures was killed ({name}): {cause}. A smaller --max_data_loader_n_workers needs less "
        "memory; 0 loads in the main process"
    )


def _unchanged(batch: Any) -> Any:
    return batch
