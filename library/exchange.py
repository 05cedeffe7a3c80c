# SPDX-License-Identifier: Apache-2.0
"""What processes exchange: sums, added up in the order of the processes as one process adds them in turn, and which
rows of a split weight each of them has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


def add_up(tensor: Tensor) -> None:
    """Replace a contiguous tensor by its sum over all processes, in place: ((first + second) + third) + …

    The ring of an all-reduce starts each part of a tensor in another process, so the last digit of a sum of three or
    more terms depends on its place. Here each process adds up its part of the numbers and sends the result to all
    others. That moves as many bytes as a ring, and takes the memory of two copies of the tensor meanwhile.
    """
    world = distributed.get_world_size()
    if world <= 2:  # a sum of two numbers is the same in both orders
        distributed.all_reduce(tensor)
        return
    count = tensor.numel()
    rows = -(-count // world)
    sent = tensor.new_zeros(rows * world)
    sent[:count] = tensor.flatten()
    total = sum_of_parts(sent)
    distributed.all_gather_into_tensor(sent, total)
    tensor.copy_(sent[:count].view_as(tensor))


def sum_of_parts(tensor: Tensor, group: distributed.ProcessGroup | None = None) -> Tensor:
    """Split a flat tensor into one part per process. Returns this process's part, added up over all in their order."""
    received = torch.empty_like(tensor)
    distributed.all_to_all_single(received, tensor, group=group)
    first, *others = received.view(distributed.get_world_size(group), -1)
    total = first.clone()
    for part in others:
        total += part
    return total


def least(number: int, device: torch.device) -> int:
    """The smallest of the numbers of all processes."""
    numbers = torch.tensor(number, dtype=torch.int64, device=device)
    distributed.all_reduce(numbers, op=distributed.ReduceOp.MIN)
    return int(numbers.item())


@dataclass(frozen=True)
class Rows:
    """Where the rows of a shard are in its whole weight."""

    first: int
    whole: int  # rows of the whole weight

    @staticmethod
    def of_this_process(whole: int) -> Rows:
        """The rows of a weight split as `fully_shard` splits it: the last processes have fewer, or none."""
        most = -(-whole // distributed.get_world_size())
        return Rows(min(distributed.get_rank() * most, whole), whole)

    def noise(self, shard: Tensor, draw: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """The shard's rows of what is drawn for the whole weight, so that they do not depend on how it is split."""
        return draw((self.whole, *shard.shape[1:]))[self.first : self.first + len(shard)]
