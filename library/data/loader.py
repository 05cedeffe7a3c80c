# SPDX-License-Identifier: Apache-2.0
"""Loads planned batches, in this process, in a thread or in worker processes. The batches are the same in each way."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import get_temp_dir
from types import TracebackType
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.utils.data

from library.data.plan import BatchPlan
from library.errors import ProcessDied, UserError
from library.stopping import ignore_signals, signals_held_back
from library.types import Batch

Job = tuple[BatchPlan, int]  # what is loaded, and the optimizer step that it is loaded for
AHEAD = 4  # batches that a thread loads in advance
T = TypeVar("T")


class LoadsBatches(Protocol):
    """The data as the loader sees it: `TrainingData`."""

    def load(self, plan: BatchPlan, *, step: int) -> Batch: ...


class BatchLoader:
    """Loads the batches of a run, in this process, in a thread of it, or in worker processes. A context manager, or
    call `close`.

        with data.loader(workers=2) as loader:
            for batch in loader.run(jobs_of(data.plan_epoch(1))):
                ...

    Workers live as long as a `run`, which is meant to have the jobs of all epochs. in_thread: load in a thread instead
    of workers, a few batches ahead. pin_memory: batches come in page-locked memory (needs a GPU).
    """

    def __init__(self, data: LoadsBatches, *, workers: int = 0, in_thread: bool = False, pin_memory: bool = False):
        self._schedule = _Schedule()
        self._running = False
        self._workers: set[BaseProcess] = set()
        self._thread = _make_thread(pin_memory) if in_thread else None
        # The sampler yields whole jobs instead of indices.
        self._torch_loader: torch.utils.data.DataLoader | None = torch.utils.data.DataLoader(
            _Loads(data),
            batch_size=None,
            sampler=self._schedule,
            num_workers=0 if in_thread else workers,
            collate_fn=_unchanged,
            worker_init_fn=_for_main_process_alone,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else every run would draw a number from torch's global generator
        )

    def run(self, jobs: Iterable[Job]) -> Generator[Batch, None, None]:
        """The batches of `jobs` in order. Jobs are asked for a few batches ahead.

        Raises UserError for a picture that cannot be read, ProcessDied where a worker was killed, ValueError while
        another run of this loader is in progress (a validation in the middle of an epoch needs a loader of its own).
        """
        if self._torch_loader is None or self._running:
            raise ValueError("the loader is closed, or a run is in progress")
        self._running = True
        self._schedule.jobs = jobs
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
            results = None  # workers end with their last reference

    def _started(self) -> Iterator[Batch | UserError]:
        """The results of a run; starts workers."""
        assert self._torch_loader is not None
        if self._thread is not None:
            return _made_in(self._thread, iter(self._torch_loader))
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
            # connections break before a worker is gone, and its sentinel is ready before it has an exit code
            gone = wait([worker.sentinel for worker in self._workers], timeout=10)
            for worker in self._workers:
                if worker.sentinel in gone:
                    worker.join()
            codes = [worker.exitcode for worker in self._workers if worker.exitcode]
            if not codes:
                raise
            raise ProcessDied(_why_died(codes[0])) from error

    def close(self) -> None:
        """End the thread, and the workers, also one that hangs while reading a file."""
        self._torch_loader = None
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
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


def jobs_of(plans: Iterable[BatchPlan], *, step_of_first: int = 0, accumulation: int = 1) -> Iterator[Job]:
    """The jobs of `plans`: each `accumulation` of them belong to one optimizer step, the first to `step_of_first`."""
    return ((plan, step_of_first + index // accumulation) for index, plan in enumerate(plans))


class _Schedule(torch.utils.data.Sampler):
    """The jobs of the current run, in order."""

    def __init__(self) -> None:
        self.jobs: Iterable[Job] = ()

    def __iter__(self) -> Iterator[Job]:
        return iter(self.jobs)


class _Loads(torch.utils.data.Dataset):
    """A "dataset" whose index is a job."""

    def __init__(self, data: LoadsBatches):
        self.data = data

    def __getitem__(self, job: Job) -> Batch | UserError:
        try:
            return self.data.load(job[0], step=job[1])
        except UserError as error:  # returned, because torch would wrap it into the text of a traceback
            return error


def _make_thread(pin_memory: bool) -> ThreadPoolExecutor:
    """A thread for batches; one that page-locks memory does so for the card of this process, not for the first one."""
    if not pin_memory:
        return ThreadPoolExecutor(1, "batches")
    card = torch.accelerator.current_device_index()
    return ThreadPoolExecutor(1, "batches", initializer=torch.accelerator.set_device_index, initargs=(card,))


def _made_in(thread: Executor, items: Iterator[T]) -> Iterator[T]:
    """The items in order, each made in `thread`, up to AHEAD of them before they are asked for."""
    end: list[T] = []  # what no item is
    waiting = deque(thread.submit(next, items, end) for _ in range(AHEAD))
    while (item := waiting.popleft().result()) is not end:
        waiting.append(thread.submit(next, items, end))
        yield cast(T, item)


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
