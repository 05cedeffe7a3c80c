# SPDX-License-Identifier: Apache-2.0
"""Memory of an optimizer, measured by stepping the real one on three small weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.memory.meter import Meter, bytes_of
from library.optim.bf16 import CHUNK
from library.optim.optimizers import OptimizerChoice

SMALL = 4096  # numbers: 8-bit optimizers keep the states of smaller weights in 32 bits
MATRIX = (128, 96)
VECTOR = (3 * SMALL,)
TINY = (64,)
ADAM = 8.0  # bytes a number: where an optimizer cannot be stepped on this machine, as if it were AdamW


@dataclass(frozen=True)
class Appetite:
    """The memory of an optimizer, in bytes per number of a weight."""

    small: float  # states of small weights
    vector: float  # of others with one axis
    matrix: float
    factored: bool  # a matrix has states for its rows and columns only
    taken: float  # on top of the states, at the peak of a step
    guessed: bool = False  # the optimizer cannot be stepped on this machine
    longest_base: int = 0  # axes of a matrix up to this length have two square matrices among the states

    def states(self, shapes: Sequence[Sequence[int]]) -> int:
        """Bytes of the optimizer states of weights of these shapes."""
        return int(sum(map(self._states, shapes)))

    def _states(self, shape: Sequence[int]) -> float:
        count = math.prod(shape)
        if len(shape) > 1 and self.factored:  # the last two axes
            return 4 * math.prod(shape[:-2]) * (shape[-2] + shape[-1])
        if len(shape) > 1 and self.longest_base:  # the two moments, and the bases
            return 8 * count + 8 * sum(length**2 for length in shape if length <= self.longest_base)
        if count < SMALL:
            return count * self.small
        return count * (self.matrix if len(shape) > 1 else self.vector)

    def update(self, shapes: Sequence[Sequence[int]]) -> int:
        """Bytes that a step takes on top of them: it works on one weight at a time."""
        return int(self.taken * max(map(math.prod, shapes), default=0))


def float32_copies(choice: OptimizerChoice, shapes: Sequence[Sequence[int]]) -> int:
    """Bytes of the float32 weights and gradients that library.optim.bf16 shows to the optimizer together."""
    counts = [math.prod(shape) for shape in shapes]
    together = min(sum(counts), max(CHUNK, *counts)) if choice.row.by_weight else sum(counts)
    return 8 * together


def appetite(choice: OptimizerChoice, dtype: torch.dtype) -> Appetite:
    """The memory that the optimizer takes for weights of this dtype, measured on three small ones."""
    try:
        tiny, vector, matrix = (_stepped(choice, shape, dtype) for shape in (TINY, VECTOR, MATRIX))
    except Exception:  # foreign code, perhaps only for a GPU
        return Appetite(ADAM, ADAM, ADAM, factored=False, taken=0.0, guessed=True)
    factored = matrix[0] < math.prod(MATRIX) // 2
    sizes = [kept / math.prod(shape) for (kept, _), shape in zip((tiny, vector, matrix), (TINY, VECTOR, MATRIX))]
    longest = choice.settings["max_precondition_dim"] if choice.row.bases else 0
    return Appetite(sizes[0], sizes[1], sizes[2], factored, matrix[1] / math.prod(MATRIX), longest_base=longest)


def _stepped(choice: OptimizerChoice, shape: Sequence[int], dtype: torch.dtype) -> tuple[int, int]:
    """(bytes of states, bytes that the second step took besides) of one weight."""
    weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = choice.build([{"params": [weight]}]).optimizer
    meter = Meter()
    for _ in range(2):
        weight.grad = torch.full_like(weight, 1e-3)
        meter = Meter()
        meter.hold([weight, weight.grad, *_tensors(optimizer.state[weight])])
        before = meter.live
        with meter:
            optimizer.step()
    states = [t for t in _tensors(optimizer.state[weight]) if t.numel() > 1 and not _is_code(t, shape)]
    return bytes_of(states), meter.peak - before


def _is_code(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Whether it is the table of values of an 8-bit optimizer, which all weights share."""
    return tensor.numel() == 256 and math.prod(shape) != 256


def _tensors(state: Mapping[str, object]) -> Iterator[Tensor]:
    values = itertools.chain(*(v if isinstance(v, (list, tuple)) else [v] for v in state.values()))
    return (value for value in values if isinstance(value, Tensor))
