# SPDX-License-Identifier: Apache-2.0
"""Stopping several processes after the same step, even if one of them has died."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor

from library.device import HostCopy, on_device
from library.errors import EXIT_AT_ONCE, EXIT_STOPPED, ProcessDied
from library.log import process_number
from library.stopping import StopRequest

__all__ = ["EXIT_AT_ONCE", "EXIT_STOPPED", "OtherProcessDied", "Passes", "Vote", "exchanging"]

# messages of gloo and NCCL when the process at the other end is gone
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
# messages of gloo when the process at the other end does not answer within --ddp_timeout
SILENT = ("Timed out waiting", "Application timeout")
ANSWER_WITHIN = 10.0  # seconds; a process that failed alone waits so long for the others


class OtherProcessDied(ProcessDied):
    """Another process of the training has died, so collectives fail. The weights are those before the step."""


@contextmanager
def exchanging(processes: int) -> Iterator[None]:
    """Context manager around collectives. Raises OtherProcessDied if another process has died."""
    try:
        yield
    except RuntimeError as error:
        if processes > 1 and any(text in str(error) for text in GONE):
            raise OtherProcessDied("another process of this training was killed, or ended with an error") from None
        if processes > 1 and any(text in str(error) for text in SILENT):
            raise OtherProcessDied("another process of this training did not answer within --ddp_timeout") from None
        raise


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


class FailedElsewhere(Exception):
    """Another process failed in passes that all make together."""


class FailedAlone(ProcessDied):
    """This process failed inside a pass for which the others now wait: only its end releases them."""

    only_here = True


class Passes:
    """Passes outside training steps (previews, validation): when they stop, and what happens if one process fails.

    If weights are split over processes, all must make the same passes. They vote in a group of their own, so that a
    process that failed can answer what the others ask next.
    """

    def __init__(self, stop: StopRequest, *, together: bool) -> None:
        """together: whether all processes make the same passes. Collective."""
        self.stop = stop
        self.group = torch.distributed.new_group(backend="gloo") if together else None

    def stopped(self) -> bool:
        """Whether the run is asked to stop. Collective. Raises FailedElsewhere."""
        return self._vote() if self.group is not None else self.stop.requested

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Context of passes that may fail. If they fail in one process, the others raise FailedElsewhere.

        Raises FailedAlone in a process that failed while the others wait for it inside a pass.
        """
        try:
            yield
        except (FailedElsewhere, ProcessDied):
            raise
        except Exception as error:
            if self.group is not None:
                self._tell(error)
            raise
        if self.group is not None:
            self._vote()

    def _vote(self) -> bool:
        votes = torch.tensor([float(self.stop.requested), 0.0])
        with exchanging(2):
            torch.distributed.all_reduce(votes, group=self.group)
        if votes[1] > 0:
            raise FailedElsewhere("another process failed")
        return bool(votes[0] > 0)

    def _tell(self, error: Exception) -> None:
        """Tell the others in their next vote that this process failed."""
        votes = torch.tensor([0.0, 1.0])
        try:
            with exchanging(2):
                told = torch.distributed.all_reduce(votes, group=self.group, async_op=True)
                told.wait(timedelta(seconds=ANSWER_WITHIN))
        except OtherProcessDied:
            raise
        except RuntimeError:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise FailedAlone(f"process {process_number()} failed while the others waited for it: {reason}") from error
