# SPDX-License-Identifier: Apache-2.0
"""torch.cuda's streams and events. Everything is done when it is told; what is kept is the order that was asked for.

A vector clock for each stream and for the host says which operations of which streams are certain to be done. Waits
join clocks; races.py asks them whether two accesses to the same memory have an order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import torch

CUDA = 1  # of torch's device types


class Clock(dict[int, int]):
    """Operations of each stream that are done: their count."""

    def __missing__(self, stream: int) -> int:
        return 0

    def join(self, other: Mapping[int, int]) -> None:
        for stream, count in other.items():
            if count > self[stream]:
                self[stream] = count


class Streams:
    """The streams of the card: clocks, and which one is current in each thread. 0: the default stream."""

    def __init__(self) -> None:
        self.clocks: dict[int, Clock] = {0: Clock()}
        self.host = Clock()
        self._current = threading.local()

    @property
    def current(self) -> int:
        return getattr(self._current, "stream", 0)

    @current.setter
    def current(self, stream: int) -> None:
        self._current.stream = stream

    def add(self) -> int:
        """A new stream's number."""
        number = len(self.clocks)
        self.clocks[number] = Clock()
        return number

    def host_waits_for_all(self) -> None:
        for clock in list(self.clocks.values()):
            self.host.join(clock)


STREAMS = Streams()  # a process has one card


class Stream(torch.Stream):
    """torch.cuda.Stream."""

    def __new__(cls, device: Any = None, priority: int = 0, *, stream_id: int | None = None, **_: Any) -> Stream:
        number = STREAMS.add() if stream_id is None else stream_id
        return super().__new__(cls, stream_id=number, device_index=0, device_type=CUDA)

    def __init__(self, *_: Any, **__: Any) -> None:
        """All is done in `__new__`."""

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    def wait_stream(self, stream: Stream) -> None:
        STREAMS.clocks[self.stream_id].join(STREAMS.clocks[stream.stream_id])

    def wait_event(self, event: Event) -> None:
        STREAMS.clocks[self.stream_id].join(event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        STREAMS.host.join(STREAMS.clocks[self.stream_id])

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)

    def __repr__(self) -> str:
        return f"<stream {self.stream_id} of the simulated card>"


class Event:
    """torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_: Any):
        self.timed = enable_timing
        self.clock = Clock()
        self.time: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        number = STREAMS.current if stream is None else stream.stream_id
        self.clock = Clock(STREAMS.clocks[number])
        self.time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        STREAMS.clocks[STREAMS.current if stream is None else stream.stream_id].join(self.clock)

    def synchronize(self) -> None:
        STREAMS.host.join(self.clock)

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds of the host between the two records."""
        if not (self.timed and end.timed) or self.time is None or end.time is None:
            raise RuntimeError("both events must be created with enable_timing=True and recorded")
        return (end.time - self.time) * 1000
