# SPDX-License-Identifier: Apache-2.0
"""Many small parameters in one buffer per learning-rate group, so that clip and step take a few calls, not thousands.

The parameters stay ordinary tensors: views of the buffer, whose gradients are views of a second buffer. Only for
optimizers whose update is elementwise (`BuiltOptimizer.elementwise`). Build it once the parameters have their final
device and dtype: a later `module.to(...)` would detach them from the buffer.

A parameter without a gradient in a step counts as one with gradient 0, and `p.grad` is never None. A parameter that
never had a gradient is not changed, as in torch (`silent_kept`). Nothing else may replace a parameter's gradient tensor
or memory: the buffers would not see it, and the step would have no effect. `require_joined` detects that.

Several processes exchange whole buffers (`add_up_gradients`), so the model needs no DistributedDataParallel around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from library.exchange import add_up

ALIGNMENT = 64  # elements; tensors start at multiples of it, since kernels want 16-byte aligned operands


@dataclass(frozen=True)
class FlatGroup:
    """One buffer, its parameters and their offsets in it."""

    buffer: nn.Parameter  # 1-D; its .grad is the gradient buffer
    params: tuple[Tensor, ...]
    offsets: tuple[int, ...]

    @property
    def grad(self) -> Tensor:
        assert self.buffer.grad is not None
        return self.buffer.grad

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Views of another buffer with this layout, one per parameter, in the parameters' shapes."""
        pairs = zip(self.params, self.offsets, strict=True)
        return [buffer[start : start + p.numel()].view(p.shape) for p, start in pairs]

    def strangers(self) -> list[int]:
        """Indices of the parameters whose memory or gradient is outside of the buffers, by their addresses."""
        gradients = self.buffer.grad
        if gradients is None:
            return list(range(len(self.params)))
        weights_at, gradients_at, size = self.buffer.data_ptr(), gradients.data_ptr(), self.buffer.element_size()
        found = []
        for number, (p, start) in enumerate(zip(self.params, self.offsets, strict=True)):
            gradient, offset = p.grad, start * size
            own = gradient is not None and gradient.data_ptr() == gradients_at + offset
            if not own or p.data_ptr() != weights_at + offset:
                found.append(number)
        return found


def flatten(params: Sequence[Tensor]) -> FlatGroup:
    """Move parameters of one dtype and device into one buffer. They become views of it, and so do their gradients.

    Raises ValueError for mixed dtypes or devices.
    """
    kinds = {(p.dtype, p.device) for p in params}
    if len(kinds) != 1:
        raise ValueError(f"a flat group needs one dtype and device, got {sorted(map(str, kinds))}")
    offsets, size = [], 0
    for p in params:
        offsets.append(size)
        size += -(-p.numel() // ALIGNMENT) * ALIGNMENT
    ((dtype, device),) = kinds
    data = torch.zeros(size, dtype=dtype, device=device)  # the padding stays 0: it has no gradient and no update
    buffer = nn.Parameter(data)
    buffer.grad = torch.zeros_like(data)
    for p, start in zip(params, offsets, strict=True):
        place = slice(start, start + p.numel())
        data[place].copy_(p.detach().flatten())
        old_gradient = p.grad
        p.data = data[place].view(p.shape)
        p.grad = buffer.grad[place].view(p.shape)
        if old_gradient is not None:
            p.grad.copy_(old_gradient)
    return FlatGroup(buffer, tuple(params), tuple(offsets))


class FlatParameters:
    """The flat buffers of all groups. Pass `param_groups` to the optimizer in place of the original groups."""

    def __init__(self, param_groups: Sequence[dict[str, Any]]) -> None:
        self.groups = [flatten(list(group["params"])) for group in param_groups]
        self.param_groups: list[dict[str, Any]] = [
            {**group, "params": [flat.buffer]} for group, flat in zip(param_groups, self.groups, strict=True)
        ]
        self._silent = [p for flat in self.groups for p in flat.params]  # without a gradient in any process so far
        self._heard: set[int] = set()
        self._hooks = {id(p): p.register_post_accumulate_grad_hook(self._hear) for p in self._silent}

    def heard_from(self, parameters: Iterable[Tensor]) -> None:
        """Note that these parameters have got a gradient other than by autograd."""
        for parameter in parameters if self._hooks else ():
            if id(parameter) in self._hooks:
                self._hear(parameter)

    def _hear(self, parameter: Tensor) -> None:
        self._heard.add(id(parameter))
        self._hooks.pop(id(parameter)).remove()

    @contextmanager
    def silent_kept(self, *, processes: int) -> Iterator[None]:
        """Use it around a step: weight decay leaves alone the parameters that never had a gradient in any process."""
        if self._silent:
            heard = [id(p) in self._heard for p in self._silent]
            if processes > 1:
                told = torch.tensor(heard, dtype=torch.int32, device=self._silent[0].device)
                distributed.all_reduce(told, op=distributed.ReduceOp.MAX)
                heard = [value > 0 for value in told.tolist()]
            self._silent = [p for p, known in zip(self._silent, heard, strict=True) if not known]
        kept = [p.detach().clone() for p in self._silent]
        yield
        for p, value in zip(self._silent, kept, strict=True):
            p.detach().copy_(value)

    def zero_grad(self) -> None:
        """Set all gradients to 0. Use it in place of the optimizer's or the module's, which would drop the views."""
        torch._foreach_zero_([flat.grad for flat in self.groups])

    def require_joined(self) -> None:
        """Raises RuntimeError when a step would skip parameters that are no longer views of the buffers."""
        for number, flat in enumerate(self.groups):
            found = flat.strangers()
            if found:
                shape = list(flat.params[found[0]].shape)
                raise RuntimeError(
                    f"{len(found)} of {len(flat.params)} weights of optimizer group {number} (the first of shape "
                    f"{shape}) would not be trained: something replaced their gradients or their memory, which are "
                    "parts of one buffer"
                )

    def broadcast_weights(self) -> None:
        """Copy the weights of the first process to all others."""
        for flat in self.groups:
            distributed.broadcast(flat.buffer.detach(), src=0)

    def add_up_gradients(self) -> None:
        """Sum the gradients over all processes: a few collectives per buffer, which the host does not wait for."""
        for flat in self.groups:
            add_up(flat.grad)

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Clip the norm of all gradients together to `max_norm`. Returns the norm before, 0-dim, on the device."""
        gradients = [flat.grad for flat in self.groups]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def layout(self) -> list[list[list[int]]]:
        """Shapes of the parameters by group, in order. A saved optimizer state fits buffers of the same layout."""
        return [[list(p.shape) for p in flat.params] for flat in self.groups]
