# SPDX-License-Identifier: Apache-2.0
"""Parameters of which every process has all, exchanged one by one: where DistributedDataParallel cannot be used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from library.exchange import add_up


class Replicas:
    """Copies of the same parameters in all processes, on one device."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = [*parameters]

    def broadcast_weights(self) -> None:
        """Copy the weights of the first process to all others."""
        for parameter in self.parameters:
            distributed.broadcast(parameter.detach(), src=0)

    def add_up_gradients(self) -> None:
        """Sum the gradients over all processes. A missing one counts as 0, and stays missing where all lack it.

        The host waits for the device, once.
        """
        if not self.parameters:
            return
        there = torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.int32)
        there = there.to(self.parameters[0].device)
        distributed.all_reduce(there, op=distributed.ReduceOp.MAX)
        for parameter, known in zip(self.parameters, there.tolist(), strict=True):
            if not known:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            add_up(parameter.grad)
