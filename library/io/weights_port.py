# SPDX-License-Identifier: Apache-2.0
"""What saves and states ask of the way in which weights are spread over processes.

Every method is a collective operation: all processes call it, in the same order, whether or not they write anything.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn

from library.io.state import StateParts


class WeightsPort(Protocol):
    """Gathers weights and optimizer states where a file is written, and scatters them where one was read."""

    def whole(self, modules: list[nn.Module]) -> AbstractContextManager[None]:
        """Inside it, the parameters of `modules` are whole in the main process, which may write them to a file."""
        ...

    def gather(self, parts: StateParts) -> StateParts:
        """From this process's part of a state to the whole one; the result counts in the main process only."""
        ...

    def scatter(self, parts: StateParts) -> StateParts:
        """From a whole state, which every process has read, to this process's part of it."""
        ...


class ReplicatedWeights:
    """One process, or several that each hold all weights and states (DistributedDataParallel): nothing is exchanged."""

    def whole(self, modules: list[nn.Module]) -> AbstractContextManager[None]:
        """Nothing to do: the parameters are whole in every process."""
        return nullcontext()

    def gather(self, parts: StateParts) -> StateParts:
        """The same parts."""
        return parts

    def scatter(self, parts: StateParts) -> StateParts:
        """The same parts."""
        return parts
