# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM: the first lets the step finish and the state be saved, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from types import FrameType, TracebackType
from typing import Any

import torch

from library.device import HostCopy

EXIT_AT_ONCE = 130
EXIT_STOPPED = 3  # the step was finished and the state saved


class StopRequest:
    """Context manager. `requested` becomes True at the first signal."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os.write(sys.stderr.fileno(), b"\nstopped at once; the newest finished save is whole\n")
            os._exit(EXIT_AT_ONCE)
        self.requested = True
        os.write(sys.stderr.fileno(), b"\nstopping: finishing this step and saving the state (again: stop at once)\n")


class StopVote:
    """Several processes must stop after the same step: in every step each says whether it was asked to.

    What was said in the step before counts, so that nobody waits for the device.
    """

    def __init__(self, device: torch.device, *, processes: int) -> None:
        self.device, self.processes = device, processes
        self._votes: deque[HostCopy] = deque()

    def decided(self, requested: bool) -> bool:
        """Call it once per step in every process; the answer is the same in all of them."""
        if self.processes == 1:
            return requested
        vote = torch.full((), float(requested), device=self.device)
        torch.distributed.all_reduce(vote)
        self._votes.append(HostCopy(vote))
        if len(self._votes) < 2:
            return False
        return bool(self._votes.popleft().value() > 0)
