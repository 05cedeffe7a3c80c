# SPDX-License-Identifier: Apache-2.0
"""Stopping several processes after the same step, even if one of them has died."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from library.device import HostCopy, on_device
from library.errors import EXIT_AT_ONCE, EXIT_STOPPED, ProcessDied
from library.stopping import StopRequest

__all__ = ["EXIT_AT_ONCE", "EXIT_STOPPED", "OtherProcessDied", "Vote", "agreed", "exchanging"]

# messages of gloo and NCCL when the process at the other end is gone
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


class OtherProcessDied(ProcessDied):
    """Another process of the training has died, so collectives fail. The weights are those before the step."""


@contextmanager
def exchanging(processes: int) -> Iterator[None]:
    """Context manager around collectives. Raises OtherProcessDied if another process has died."""
    try:
        yield
    except RuntimeError as error:
        if processes == 1 or not any(text in str(error) for text in GONE):
            raise
        raise OtherProcessDied("another process of this training was killed, or ended with an error") from None


class Vote:
    """Lets several processes stop, or save, after the same step: each announces its wishes in every step.

    The wishes of the previous step count, so that no process waits for the device.
    """

    def __init__(self, device: torch.device, *, processes: int) -> None:
        self.device, self.processes = device, processes
        self._votes: deque[HostCopy] = deque()

    def at_once(self, wish: bool) -> bool:
        """Whether any process has the wish now. Synchronises host and device."""
        return wish if self.processes == 1 else bool(self._sum(wish).item() > 0)

    def decided(self, *wishes: bool) -> Sequence[bool]:
        """Which of the wishes any process had one step ago. Collective, called once per step; same result in all."""
        if self.processes == 1:
            return wishes
        self._votes.append(HostCopy(self._sum(*wishes)))
        return [False for _ in wishes] if len(self._votes) == 1 else (self._votes.popleft().value() > 0).tolist()

    def _sum(self, *wishes: bool) -> Tensor:
        """How many processes have each wish, on the device."""
        votes = on_device(torch.tensor(wishes, dtype=torch.float32), self.device)
        torch.distributed.all_reduce(votes)
        return votes


def agreed(stop: StopRequest, device: torch.device, *, processes: int) -> Callable[[], bool]:
    """A function that tells whether any process was asked to stop. Collective; synchronises host and device."""
    vote = Vote(device, processes=processes)
    return lambda: vote.at_once(stop.requested)
