# SPDX-License-Identifier: Apache-2.0
"""Access to weights that are distributed over processes, for saves and states.

Every method is collective: all processes must call it, in the same order, even if they write nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn

from library.io.state import StateParts

# 8-bit optimizers of bitsandbytes: prefix of the names of scales in a state, and numbers per scale
SCALES, SCALE_BLOCK = "absmax", 256


class WeightsPort(Protocol):
    """Gathers weights and optimizer states before a file is written, and scatters them after one is read."""

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
    """A frozen model split over processes (library.memory.sharding); the weights that learn are complete in each."""

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


class ShardedWeights(ShardedBase):
    """A model whose own weights learn and are split over processes, together with the optimizer's states.

    A state is the same as that of one process with all weights, so any number of processes can continue from it.
    """

    def __init__(self, parameters: Sequence[Tensor], named: Mapping[str, Tensor]) -> None:
        """parameters: in the order of the optimizer. named: the weights by their names in a state."""
        self.parameters, self.named = [*parameters], dict(named)

    def gather(self, parts: StateParts) -> StateParts:
        """The complete state, in main memory of the main process; other processes return `parts`."""
        found = {name: complete(tensor) for name, tensor in parts.weights.items()}
        weights = {name: tensor for name, tensor in found.items() if tensor is not None}
        optimizer = self._each(parts.optimizer, self._complete)
        ema = parts.ema and {key: self._complete(int(key), "", value) for key, value in parts.ema.items()}
        if distributed.get_rank() > 0:
            return parts
        return replace(parts, weights=weights, optimizer=optimizer, ema=ema)

    def scatter(self, parts: StateParts) -> StateParts:
        """This process's part of a complete state. Values of other shapes are left unchanged."""
        weights = {name: self._weight(name, value) for name, value in parts.weights.items()}
        optimizer = self._each(parts.optimizer, self._own)
        ema = parts.ema and {key: self._own(int(key), "", value) for key, value in parts.ema.items()}
        return replace(parts, weights=weights, optimizer=optimizer, ema=ema)

    def _weight(self, name: str, value: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        own = self.named.get(name)
        if not isinstance(own, DTensor) or own.shape != value.shape:
            return value
        rows = value[_rows_of(len(value))].to(own.to_local().device, copy=True)
        return DTensor.from_local(
            rows, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
        )

    def _each(self, state: Mapping[str, Any], change: Callable[[int, str, Any], Any]) -> dict[str, Any]:
        """Apply `change` to every value of an optimizer's state dict that belongs to one parameter.

        change: (number of the parameter, name, value) -> new value.
        """

        def changed(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: changed(item) for key, item in value.items()}
            by_weight = isinstance(value, list) and len(value) == len(self.parameters)
            if by_weight and all(item is None or isinstance(item, Tensor) for item in value):
                return [change(number, "", item) for number, item in enumerate(value)]
            return value

        def of_one(number: int, name: str, value: Any) -> Any:
            if isinstance(value, Mapping):  # bitsandbytes keeps its tensors in one
                return {key: of_one(number, key, item) for key, item in value.items()}
            return change(number, name, value)

        others = {key: changed(value) for key, value in state.items() if key not in ("state", "param_groups")}
        own = {number: of_one(number, "", values) for number, values in state["state"].items()}
        return {**others, "state": own, "param_groups": state["param_groups"]}

    def _complete(self, number: int, name: str, value: Any) -> Any:
        """Gather a value of an optimizer's state for the whole parameter that it belongs to."""
        parameter = self.parameters[number]
        rows = _local(parameter)
        if rows is None or not isinstance(value, Tensor):
            return value
        if value.shape == rows.shape:
            return on_main_process(value, parameter.shape, _most_rows(len(parameter)))
        if name.startswith(SCALES):
            per_row = parameter[0].numel()
            return on_main_process(
                value, torch.Size([_blocks(parameter.numel())]), _blocks(_most_rows(len(parameter)) * per_row)
            )
        return value

    def _own(self, number: int, name: str, value: Any) -> Any:
        """The inverse of `_complete`, in main memory."""
        parameter = self.parameters[number]
        if _local(parameter) is None or not isinstance(value, Tensor):
            return value
        if value.shape == parameter.shape:
            return value[_rows_of(len(parameter))].clone()
        if name.startswith(SCALES) and len(value) == _blocks(parameter.numel()):
            most = _blocks(_most_rows(len(parameter)) * parameter[0].numel())
            first = distributed.get_rank() * most
            return value[first : first + most].clone()
        return value


# ---- shards and whole tensors ---------------------------------------------------------------------------------------


def _local(tensor: Tensor) -> Tensor | None:
    """This process's shard of a split tensor; None for a tensor that is not split."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local().detach() if isinstance(tensor, DTensor) else None


def _most_rows(rows: int) -> int:
    """Rows per process of `rows` in all; the last processes have fewer, or none."""
    return -(-rows // distributed.get_world_size())


def _rows_of(rows: int) -> slice:
    """This process's rows of `rows` in all."""
    first = distributed.get_rank() * _most_rows(rows)
    return slice(first, first + _most_rows(rows))


def _blocks(numbers: int) -> int:
    return -(-numbers // SCALE_BLOCK)


def complete(tensor: Tensor) -> Tensor | None:
    """Gather a split tensor on the CPU of the main process, None in the others. Other tensors are returned as is."""
    rows = _local(tensor)
    return tensor if rows is None else on_main_process(rows, tensor.shape, _most_rows(len(tensor)))


@contextmanager
def gathered(modules: list[nn.Module]) -> Iterator[None]:
    """Context in which `modules` of the main process have their whole weights, on the CPU, and original classes."""
    from torch.distributed.fsdp import FSDPModule

    owners = {id(owner): owner for module in modules for owner in module.modules()}.values()
    places = [
        (owner, name, parameter)
        for owner in owners
        for name, parameter in owner.named_parameters(recurse=False)
        if _local(parameter) is not None
    ]
    classes = [(owner, type(owner)) for owner in owners if isinstance(owner, FSDPModule)]
    found: dict[int, nn.Parameter] = {}
    for _, _, parameter in places:
        if id(parameter) not in found and (values := complete(parameter)) is not None:
            found[id(parameter)] = nn.Parameter(values, requires_grad=False)
    main = distributed.get_rank() == 0
    try:
        for owner, name, parameter in places if main else ():
            setattr(owner, name, found[id(parameter)])
        for owner, cls in classes if main else ():
            owner.__class__ = cls.__mro__[2]  # skips the class made by torch, and FSDPModule
        yield
    finally:
        for owner, cls in classes if main else ():
            owner.__class__ = cls
        for owner, name, parameter in places if main else ():
            setattr(owner, name, parameter)


def on_main_process(rows: Tensor, shape: torch.Size, most: int) -> Tensor | None:
    """Gather a tensor of `shape`, split by rows, on the CPU of the main process; None in the others.

    most: rows of each of the first processes.
    """
    own = rows.new_zeros((most, *shape[1:]))
    own[: len(rows)] = rows
    sent = own.flatten().view(torch.uint8)  # not every dtype can be sent
    received = (
        [torch.empty_like(sent) for _ in range(distributed.get_world_size())] if distributed.get_rank() == 0 else None
    )
    distributed.gather(sent, received)
    if received is None:
        return None
    return torch.cat([part.cpu() for part in received]).view(rows.dtype)[: shape.numel()].view(shape)
