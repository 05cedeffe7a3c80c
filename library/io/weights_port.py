# SPDX-License-Identifier: Apache-2.0
"""Access of saves and states to weights that are distributed over processes.

Every method is a collective operation: all processes call it, in the same order, even if they write nothing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn

from library.io.state import StateParts


class WeightsPort(Protocol):
    """Gathers weights and optimizer states before a file is written, and scatters them after one was read."""

    def whole(self, modules: list[nn.Module]) -> AbstractContextManager[None]:
        """Inside the context, the main process has the complete parameters of `modules` and may write them."""
        ...

    def gather(self, parts: StateParts) -> StateParts:
        """Combine the processes' parts of a state. The result is valid in the main process only."""
        ...

    def scatter(self, parts: StateParts) -> StateParts:
        """This process's part of a complete state, which every process has read."""
        ...


class ReplicatedWeights:
    """Weights and states that are complete in every process (one process, or DistributedDataParallel)."""

    def whole(self, modules: list[nn.Module]) -> AbstractContextManager[None]:
        """Does nothing: the parameters are complete in every process."""
        return nullcontext()

    def gather(self, parts: StateParts) -> StateParts:
        """The same parts."""
        return parts

    def scatter(self, parts: StateParts) -> StateParts:
        """The same parts."""
        return parts
