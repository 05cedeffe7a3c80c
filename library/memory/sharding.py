# SPDX-License-Identifier: Apache-2.0
"""Weights split over processes: each keeps some rows of a weight, and gathers the weights of a block while it runs.

This uses torch's `fully_shard` (https://arxiv.org/abs/2304.11277, without flat parameters), which keeps each weight as
a DTensor between passes. Every pass through the model is therefore collective: all processes must make the same passes,
forward and backward, in the same order.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from library.exchange import Rows, add_up, sum_of_parts


def shard(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Split all weights of a frozen model over all processes, in place. They may be anywhere; shards are on `device`.

    blocks: the parts of the model that are gathered one at a time; all other weights are gathered for a whole pass.
    While a block is being split, it is on `device` as a whole.
    """
    _shard(model, blocks, device)


def shard_learning(
    model: nn.Module, blocks: Sequence[nn.Module], device: torch.device, *, optional: Sequence[nn.Module],
    kept: torch.dtype, gathered: torch.dtype | None, block: int,
) -> None:  # fmt: skip
    """Split and cast a model whose weights may learn, one block at a time.

    Only weights of Linear and convolution layers are split, nearly all numbers of a model. Autocast does not cast the
    others, so they keep their precision here as well. optional: parts that only some batches use. They are not split,
    because all processes must exchange the same gradients. kept: dtype of the weights. gathered: dtype in which weights
    are gathered, that of the computation under autocast; None: their own. block: number of neighbouring numbers of a
    weight that the optimizer treats together (1: each separately). No such block is split, nor a weight of which a
    process would have fewer than 16 blocks.
    """
    split = splittable(model, optional, block=block, processes=distributed.get_world_size())
    others = [parameter for parameter in model.parameters() if parameter not in split]
    for parameter in others:
        parameter.data = parameter.data.to(device, kept)
    persistent = model.state_dict(keep_vars=True).values()
    for buffer in model.buffers():
        if buffer.is_floating_point() and any(buffer is tensor for tensor in persistent):
            buffer.data = buffer.data.to(kept)
    _shard(model, blocks, device, others=others, kept=kept, gathered=gathered)


def splittable(
    model: nn.Module, optional: Sequence[nn.Module], *, block: int, processes: int
) -> set[Tensor]:  # fmt: skip
    """The weights that `shard_learning` splits."""
    layers = (m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)))
    split = {layer.weight for layer in layers if _divides(layer.weight, block, processes)}
    return split - {parameter for part in optional for parameter in part.parameters()}


def _divides(weight: Tensor, block: int, processes: int) -> bool:
    """Whether every process gets rows of a weight, and all except the last whole blocks."""
    rows = -(-len(weight) // processes)
    width = weight[0].numel()
    last = (len(weight) - rows * (processes - 1)) * width
    least = 16 * block if block > 1 else 1
    return last >= least and rows * width % block == 0


def _shard(
    model: nn.Module, blocks: Sequence[nn.Module], device: torch.device, *, others: Collection[nn.Parameter] = (),
    kept: torch.dtype | None = None, gathered: torch.dtype | None = None,
) -> None:  # fmt: skip
    """others: weights that are not split."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard  # not in every build of torch

    # torch warns about in-place changes of a block's output; no model here makes any
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = distributed.init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
    ignored: dict[str, Any] = {"ignored_params": set(others)} if others else {}
    for part in (*blocks, model):
        for parameter in part.parameters():
            if not parameter.is_contiguous() or kept not in (None, parameter.dtype):
                parameter.data = parameter.data.to(kept or parameter.dtype).contiguous()
        # reshard after each pass, also the model itself: it may be the last pass with averaged weights
        fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy, **ignored)
        if others:  # weights learn: their gradients are sums, not means
            assert isinstance(part, FSDPModule)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
            part.set_custom_reduce_scatter(AddUp())  # type: ignore[arg-type]  # its base class is private to torch


class AddUp:
    """The exchange of split gradients, for `FSDPModule.set_custom_reduce_scatter`: added up in the processes' order."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the gradients of a block."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: distributed.ProcessGroup, op: object,
        async_op: bool = False,
    ) -> None:  # fmt: skip
        """output_tensor: this process's part of the sum of all `input_tensor`. op: always a sum."""
        output_tensor.copy_(sum_of_parts(input_tensor, group))


class LocalShards:
    """This process's shards of the parameters that learn, as plain tensors for an optimizer and an average.

    They share memory with the model's shards, so updating them updates the model. Parameters that are not split are
    used as they are.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        parameters = [p for group in groups for p in group["params"]]
        self._split = {p: nn.Parameter(own) for p in parameters if (own := _local(p)) is not None}
        self.whole: list[nn.Parameter] = [p for p in parameters if p not in self._split]
        self.param_groups: list[dict[str, Any]] = [
            {**group, "params": [self._split.get(p, p) for p in group["params"]]} for group in groups
        ]
        self.weights: list[nn.Parameter] = [p for group in self.param_groups for p in group["params"]]

    def rows(self) -> dict[Tensor, Rows]:
        """Where each shard is in its whole weight."""
        return {own: Rows.of_this_process(len(parameter)) for parameter, own in self._split.items()}

    def take_gradients(self) -> None:
        """Give the shards the gradients of the last pass."""
        for parameter, own in self._split.items():
            own.grad = None if parameter.grad is None else _local(parameter.grad)

    def zero_grad(self) -> None:
        """Remove all gradients."""
        for parameter in (*self._split, *self.weights):
            parameter.grad = None

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Clip the total norm of the gradients of all processes. Returns the norm before, 0-dim, on the device."""
        shards = [own.grad for own in self._split.values() if own.grad is not None]
        others = [p.grad for p in self.whole if p.grad is not None]
        gradients = [*shards, *others]
        if not gradients:
            return torch.zeros((), device=self.weights[0].device)
        squares = torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).square()
        add_up(squares[: len(shards)])
        norms = squares.sqrt().to(gradients[0].dtype)  # rounded as torch rounds the norm of a whole gradient
        norm = torch.linalg.vector_norm(norms)
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


def _local(tensor: Tensor) -> Tensor | None:
    """This process's shard of a split tensor; None for a tensor that is not split."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local().detach() if isinstance(tensor, DTensor) else None
