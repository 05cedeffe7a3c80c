# SPDX-License-Identifier: Apache-2.0
"""Access of saves and states to weights that are distributed over processes.

Every method is a collective operation: all processes call it, in the same order, even if they write nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, distributed, nn

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


class ShardedBase:
    """A frozen model that is split over processes (library.memory.sharding); what learns is complete in all of them."""

    @contextmanager
    def whole(self, modules: list[nn.Module]) -> Iterator[None]:
        """Inside the context, the main process has the complete weights of `modules` in main memory.

        They are gathered one by one, so that the device holds one of them at a time.
        """
        with gathered(modules):
            yield

    def gather(self, parts: StateParts) -> StateParts:
        """The same parts."""
        return parts

    def scatter(self, parts: StateParts) -> StateParts:
        """The same parts."""
        return parts


@contextmanager
def gathered(modules: list[nn.Module]) -> Iterator[None]:
    """Complete weights, on the CPU, in place of the shards of `modules`, in the main process. Others keep theirs."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    owners = {id(owner): owner for module in modules for owner in module.modules()}.values()
    for owner in owners:
        if isinstance(owner, FSDPModule):
            owner.reshard()  # what no block has is whole after a pass without gradients
    places = [
        (owner, name, parameter)
        for owner in owners
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    complete: dict[int, nn.Parameter] = {}
    for _, _, parameter in places:
        if id(parameter) not in complete:
            values = on_main_process(parameter.to_local().detach(), parameter.shape)
            if values is not None:
                complete[id(parameter)] = nn.Parameter(values, requires_grad=False)
    try:
        for owner, name, parameter in places if complete else ():
            setattr(owner, name, complete[id(parameter)])
        yield
    finally:
        for owner, name, parameter in places if complete else ():
            setattr(owner, name, parameter)


def on_main_process(rows: Tensor, shape: torch.Size) -> Tensor | None:
    """The tensor of this shape of which each process has some `rows`, on the CPU; None in all but the main process.

    The rows are those of `torch.chunk`: as many in each process, fewer or none in the last ones.
    """
    world = distributed.get_world_size()
    most = -(-shape[0] // world)
    own = rows.new_zeros((most, *shape[1:]))
    own[: len(rows)] = rows
    sent = own.flatten().view(torch.uint8)  # not every dtype can be sent
    received = [torch.empty_like(sent) for _ in range(world)] if distributed.get_rank() == 0 else None
    distributed.gather(sent, received)
    if received is None:
        return None
    return torch.cat([part.cpu() for part in received]).view(rows.dtype)[: shape.numel()].view(shape)
