# SPDX-License-Identifier: Apache-2.0
"""Optimizer states that DeepSpeed's ZeRO 1 and 2 (https://arxiv.org/abs/1910.02054) split over processes.

ZeRO joins the weights of each optimizer group into one row of numbers, of which each process has an equal piece: their
float32 values and the optimizer's states. A weight may begin in one process and end in the next. In a saved state each
weight has whole tensors, by its number in the optimizer, so any number of processes can continue from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from library.io.state import StateParts
from library.io.weights_port import ReplicatedWeights

MASTERS = "float32 weights"  # key in an optimizer's state dict: the weights that it steps, by number


class Span(Protocol):
    """Neighbouring numbers, as DeepSpeed counts them."""

    start: int
    numel: int


class Part(Protocol):
    """The part of a weight that this process steps, as DeepSpeed keeps it in `Tensor._hp_mapping`."""

    hp_fragment: Tensor  # its float32 values, a view of this process's piece of the group
    hp_fragment_address: Span  # where it is in that piece
    lp_fragment_address: Span  # where it is in the flattened weight


class ZeroStates(ReplicatedWeights):
    """Weights that are whole in each process, and states of their optimizer that ZeRO splits."""

    def __init__(self, groups: Sequence[Sequence[Tensor]], optimizer: torch.optim.Optimizer) -> None:
        """groups: the weights of each optimizer group. optimizer: as DeepSpeed has changed it, with pieces for them."""
        self.groups, self.optimizer = groups, optimizer

    def _weights(self) -> Iterator[tuple[int, int, Tensor, Part | None]]:
        """(number, index of its group, weight, this process's part of it) for every weight."""
        pairs = [(index, parameter) for index, own in enumerate(self.groups) for parameter in own]
        for number, (index, parameter) in enumerate(pairs):
            yield number, index, parameter, getattr(parameter, "_hp_mapping")  # noqa: B009 - torch does not declare it

    def gather(self, parts: StateParts) -> StateParts:
        """The complete state, in main memory of the main process; other processes return `parts`."""
        own, states, masters = parts.optimizer["state"], {}, []
        for number, index, parameter, part in self._weights():
            size = self._piece(index).shape
            states[number] = {
                key: _whole(parameter, part, None if part is None else _of_piece(value, part))
                if isinstance(value, Tensor) and value.shape == size
                else value
                for key, value in own.get(index, {}).items()
            }
            masters.append(_whole(parameter, part, None if part is None else part.hp_fragment))
        if distributed.get_rank() > 0:
            return parts
        groups, first = [], 0
        for group, parameters in zip(parts.optimizer["param_groups"], self.groups, strict=True):
            groups.append({**group, "params": [*range(first, first + len(parameters))]})
            first += len(parameters)
        optimizer = {**parts.optimizer, "state": states, "param_groups": groups, MASTERS: masters}
        return replace(parts, optimizer=optimizer)

    def scatter(self, parts: StateParts) -> StateParts:
        """This process's part of a complete state. The float32 weights are written to their places at once.

        A state of other weights is returned as it is.
        """
        masters, states = parts.optimizer.get(MASTERS, ()), parts.optimizer["state"]
        shapes = [parameter.shape for _, _, parameter, _ in self._weights()]
        if [value.shape for value in masters] != shapes:
            return parts
        split: dict[int, dict[str, Any]] = {}
        for number, index, parameter, part in self._weights():
            own = split.setdefault(index, {})
            for key, value in states.get(number, {}).items():
                if not isinstance(value, Tensor) or value.shape != parameter.shape:
                    own[key] = value  # the number of steps, the same for all weights of a group
                    continue
                piece = own.setdefault(key, torch.zeros_like(self._piece(index), dtype=value.dtype))
                if part is not None:
                    _of_piece(piece, part).copy_(_of_weight(value, part))
            if part is not None:
                part.hp_fragment.detach().copy_(_of_weight(masters[number], part))
        groups = [{**group, "params": [index]} for index, group in enumerate(parts.optimizer["param_groups"])]
        others = {key: value for key, value in parts.optimizer.items() if key != MASTERS}
        return replace(parts, optimizer={**others, "state": split, "param_groups": groups})

    def _piece(self, index: int) -> Tensor:
        """This process's piece of a group."""
        (piece,) = self.optimizer.param_groups[index]["params"]
        return piece.detach()


def _of_piece(piece: Tensor, part: Part) -> Tensor:
    """The numbers of a weight in a process's piece of its group, as a view."""
    at = part.hp_fragment_address
    return piece.narrow(0, at.start, at.numel)


def _of_weight(weight: Tensor, part: Part) -> Tensor:
    """The numbers of a contiguous weight that a process has, as a view."""
    at = part.lp_fragment_address
    return weight.view(-1).narrow(0, at.start, at.numel)


def _whole(parameter: Tensor, part: Part | None, own: Tensor | None) -> Tensor:
    """A tensor as large as the weight, put together from the float32 parts of all processes.

    Complete in the main process, and there in main memory. own: this process's part.
    """
    whole = torch.zeros(parameter.numel(), device=parameter.device)
    if part is not None and own is not None:
        _of_weight(whole, part).copy_(own.detach())
    distributed.reduce(whole.view(torch.int32), 0)  # bits: -0.0 + 0.0 is 0.0, and all parts but one are zeros
    return whole.cpu().view(parameter.shape)
