# SPDX-License-Identifier: Apache-2.0
"""The clock of a run: marks at the ends of its steps, read when the run is over, so that measuring waits for nothing.

A run is: warm-up, timed steps, a few steps that each begin with an idle device (what the host needs for one), and on a
card one step under the profiler (how long the device has nothing to do). On the CPU the marks are those of the host.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

PROBES = 3  # steps that begin with an idle device


@dataclass(frozen=True)
class Figures:
    """What one run measured. Seconds and bytes; None where it was not measured."""

    steps: list[float]
    first_step: float  # from the start of the process to the end of the first step
    host: float  # of one step, the device idle before it
    idle: float | None  # share of a step in which the device does nothing
    allocated: int | None  # peak of a step
    reserved: int | None
    setup: int | None  # peak before the first step was over: loading, quantising, the first buffers
    resident: int  # peak of the process in main memory
    trained: int  # numbers that learn
    stall: float | None = None  # of a step, waiting for swapped blocks

    @property
    def median(self) -> float:
        return statistics.median(self.steps)

    @property
    def p95(self) -> float:
        """The step that 95 of 100 are not slower than (nearest rank)."""
        ordered = sorted(self.steps)
        return ordered[min(len(ordered) - 1, -(-95 * len(ordered) // 100) - 1)]

    @property
    def host_idle(self) -> float:
        """Share of a step in which the host has nothing to do; 0: the device waits for it."""
        return max(0.0, 1 - self.host / self.median)


class Clock:
    """begun: `time.time()` at the start of the process that started this one's work."""

    def __init__(self, *, warmup: int, timed: int, begun: float) -> None:
        self.warmup, self.timed, self.begun = warmup, timed, begun
        self.on_card = torch.cuda.is_available()
        self.total = warmup + timed + PROBES + (1 if self.on_card else 0)
        self._marks: list[Any] = []
        self._host: list[float] = []
        self._first = 0.0
        self.idle: float | None = None
        self._setup: int | None = None
        self._peaks: tuple[int, int] | None = None

    @property
    def count(self) -> int:
        """Steps that are done."""
        return len(self._marks)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step of the run."""
        count = self.count
        probed, last = count >= self.warmup + self.timed, self.on_card and count == self.total - 1
        if probed:
            self._wait()
            self._read_peaks()
        with profiled(self) if last else _plain():
            start = time.perf_counter()
            yield
            if probed and not last:
                self._host.append(time.perf_counter() - start)
        self._marks.append(self._mark())
        if count == 0:
            self._wait()
            self._first = time.time() - self.begun
            if self.on_card:
                self._setup = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()

    def figures(self, *, trained: int, stall: float | None = None) -> Figures:
        """After the last step."""
        self._wait()
        chosen = self._marks[self.warmup - 1 : self.warmup + self.timed]
        allocated, reserved = self._peaks or (None, None)
        return Figures(
            steps=[self._between(a, b) for a, b in pairwise(chosen)],
            first_step=self._first,
            host=statistics.median(self._host),
            idle=self.idle,
            allocated=allocated,
            reserved=reserved,
            setup=self._setup,
            resident=peak_resident(),
            trained=trained,
            stall=stall,
        )

    def _read_peaks(self) -> None:
        """Of the steps so far; the probes and the profiler do not count."""
        if self.on_card and self._peaks is None:
            self._peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def _mark(self) -> Any:
        if not self.on_card:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, one: Any, other: Any) -> float:
        return one.elapsed_time(other) / 1000 if self.on_card else other - one

    def _wait(self) -> None:
        if self.on_card:
            torch.cuda.synchronize()


def peak_resident() -> int:
    """Peak bytes of this process in main memory."""
    if sys.platform == "win32":
        import psutil  # comes with accelerate

        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def _plain() -> Iterator[None]:
    yield


@contextmanager
def profiled(clock: Clock) -> Iterator[None]:
    """Tell the clock in which share of what happens inside the device does nothing, where this torch can profile it."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile, supported_activities

    if ProfilerActivity.CUDA not in supported_activities():
        yield
        return
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        yield
        torch.cuda.synchronize()
    ranges = [event.time_range for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    if ranges:
        clock.idle = idle_share([(range.start, range.end) for range in ranges])


def idle_share(spans: list[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end that no span covers; spans may overlap."""
    ordered = sorted(spans)
    first, end = ordered[0]
    covered = 0.0
    begin = first
    for a, b in ordered[1:]:
        if a > end:
            covered += end - begin
            begin, end = a, b
        else:
            end = max(end, b)
    covered += end - begin
    return 1 - covered / (end - first) if end > first else 0.0
