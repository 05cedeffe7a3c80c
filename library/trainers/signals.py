# SPDX-License-Identifier: Apache-2.0
"""Several processes stop after the same step."""

from __future__ import annotations

from collections import deque

import torch

from library.device import HostCopy
from library.errors import EXIT_AT_ONCE, EXIT_STOPPED

__all__ = ["EXIT_AT_ONCE", "EXIT_STOPPED", "StopVote"]


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
        vote = torch.full((), float(requested), device=self.device)
        torch.distributed.all_reduce(vote)
        return bool(vote.item() > 0)

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
