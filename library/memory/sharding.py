# SPDX-License-Identifier: Apache-2.0
"""Weights that are split over processes: each keeps its rows of every weight, and gathers a block's while it runs.

torch's `fully_shard` does it (https://arxiv.org/abs/2304.11277, in its form without flat parameters), and keeps each
weight as a DTensor between passes. Every pass through the model is then a collective operation: all processes make the
same number of passes, forward and backward, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed, nn


def shard(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Split the weights of `model` over all processes, in place. They may be anywhere; their shards are on `device`.

    blocks: the parts of the model that are gathered one at a time; what else it has is gathered for a whole pass. One
    block at a time is on `device` as a whole, too, while it is split.
    """
    from torch.distributed.fsdp import fully_shard  # torch.distributed is not in every build of torch

    mesh = distributed.init_device_mesh(device.type, (distributed.get_world_size(),))
    for part in (*blocks, model):
        for parameter in part.parameters():
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()  # rows of others are split off at multiples of a row
        fully_shard(part, mesh=mesh)
