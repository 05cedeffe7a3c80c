# SPDX-License-Identifier: Apache-2.0
"""Stopping several processes after the same step, also where one of them has died."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from library.device import HostCopy
from library.errors import EXIT_AT_ONCE, EXIT_STOPPED, ProcessDied
from library.stopping import StopRequest

__all__ = ["EXIT_AT_ONCE", "EXIT_STOPPED", "OtherProcessDied", "StopVote", "agreed", "exchanging"]

# what gloo and NCCL say where the process at the other end is gone
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


class OtherProcessDied(ProcessDied):
    """Another process of the training is gone: nothing can be exchanged. The weights are those before the step."""


@contextmanager
def exchanging(processes: int) -> Iterator[None]:
    """Surrounds what several processes do together. Raises OtherProcessDied where one of them has died."""
    try:
        yield
    except RuntimeError as error:
        if processes == 1 or not any(text in str(error) for text in GONE):
            raise
        raise OtherProcessDied("another process of this training was killed, or ended with an error") from None


class StopVote:
    """Several processes must stop after the same step: in every step each says whether it was asked to.

    What was said in the step before counts, so that nobody waits for the device.
    """

    def __init__(self, device: torch.device, *, processes: int) -> None:
        self.device, self.processes = device, processes
        self._votes: deque[HostCopy] = deque()

    def at_once(self, requested: bool) -> bool:
        """Whether any process asks for it now. The host waits for the device."""
        if self.processes == 1:
            return requested
        return bool(self._sum(requested).item() > 0)

    def decided(self, requested: bool) -> bool:
        """Call it once per step in every process; the answer is the same in all of them."""
        if self.processes == 1:
            return requested
        self._votes.append(HostCopy(self._sum(requested)))
        return len(self._votes) > 1 and bool(self._votes.popleft().value() > 0)

    def _sum(self, requested: bool) -> Tensor:
        """How many processes ask for it, 0-dim on the device."""
        vote = torch.full((), float(requested), device=self.device)
        torch.distributed.all_reduce(vote)
        return vote


def agreed(stop: StopRequest, device: torch.device, *, processes: int) -> Callable[[], bool]:
    """Whether any process was asked to stop, to be called in all of them alike. The host waits for the device."""
    vote = StopVote(device, processes=processes)
    return lambda: vote.at_once(stop.requested)
