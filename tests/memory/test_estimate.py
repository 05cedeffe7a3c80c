# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the estimate, against sums written down by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from library.memory.choice import MemoryChoice
from library.memory.estimate import (
    BlockFigures,
    BoundaryStorage,
    Case,
    Fixed,
    Segment,
    StepFigures,
    Weights,
    compiled_share,
    predict,
    tops,
    total_work,
)
from library.memory.work import Work

# Three blocks. Each makes 100 inside, 10 more while it runs, and an output of 7, which the next one needs.
STORED = {i: BoundaryStorage(7, i, kept=True) for i in range(3)}
BLOCKS = tuple(
    BlockFigures(107, inputs=frozenset({i - 1} if i else ()), outputs=frozenset({i}), work=Work(5, 3, 1))
    for i in range(3)
)
FORWARD = tuple(Segment("forward", i, start=107 * i, peak=107 * (i + 1) + 10) for i in range(3))
BACKWARD = tuple(Segment("backward", i, start=107 * (i + 1) + 2, peak=107 * (i + 1) + 30) for i in (2, 1, 0))
STEP = StepFigures((*FORWARD, *BACKWARD), BLOCKS, STORED, base=0, kept=321, work=Work(45, 27, 9))
WEIGHTS = Weights(
    {"plain": (40, 60, 50), "fp8": (20, 30, 25)},
    {"plain": 15, "fp8": 15},
    cast={"fp8": 8},
    modulations={"plain": (4, 6), "fp8": (2, 3)},
    modulations_in={"plain": (0, 10, 0), "fp8": (0, 5, 0)},
    modulation_outputs=1,
)
CASE = Case(
    STEP,
    WEIGHTS,
    Fixed(learning=3, gradients=3, gradients_stay=True, optimizer=6),
    recomputed=lambda count, choice: {1.0: (), 0.5: (0, 2), 0.0: range(count)}[choice.activation_budget],
    swapped=lambda count: range(count),
)


def peak(**choice: object) -> int:
    return predict(CASE, replace(MemoryChoice(), **choice)).peak


def test_without_any_saving() -> None:
    found = predict(CASE, MemoryChoice())
    assert (found.weights, found.gradients, found.optimizer) == (40 + 60 + 50 + 15 + 3, 3, 6)
    assert found.activations == 3 * 107 + 30  # the last block's backward pass
    assert found.peak == 168 + 3 + 6 + 351


def test_recomputed_blocks_keep_their_outputs() -> None:
    found = [*tops(CASE, MemoryChoice(activation_budget=0.0))]
    forward = [117, 107 + 117 - 100, 214 + 117 - 200]
    # at the start of a block's backward pass it runs again, above the outputs of those before it
    last = [3 * 107 + 2 - 300 + 117, 3 * 107 + 30 - 200]
    assert found[:5] == [*forward, *last]
    assert max(found) == 151


def test_half_recomputed() -> None:
    """The middle block is kept: in the last one's backward pass the first block's inner 100 are away."""
    assert max(tops(CASE, MemoryChoice(activation_budget=0.5))) == 3 * 107 + 30 - 100


def test_an_input_that_nobody_else_keeps() -> None:
    """What recomputation alone needs is there in addition."""
    stored = {**STORED, 0: BoundaryStorage(7, 0, kept=False)}
    blocks = (replace(BLOCKS[0], kept=100), *BLOCKS[1:])
    case = replace(CASE, step=replace(STEP, stored=stored, blocks=blocks))
    plain, again = (list(tops(case, MemoryChoice(activation_budget=b))) for b in (1.0, 0.0))
    assert plain == list(tops(CASE, MemoryChoice()))
    assert again[1] == plain[1] - 100 + 7


def test_offload() -> None:
    """Inputs of blocks wait in main memory: 7 for each that the next one starts from."""
    kept, away = (max(tops(CASE, MemoryChoice(activation_budget=0.0, offload=o))) for o in (False, True))
    assert kept - away == 14
    on_cpu = replace(CASE, has_host=False)
    assert max(tops(on_cpu, MemoryChoice(activation_budget=0.0, offload=True))) == kept


def test_swapping_and_its_ring() -> None:
    found = predict(CASE, MemoryChoice(blocks_to_swap=2))
    assert found.weights == 168 - 100 and found.ring == 2 * 60
    assert predict(CASE, MemoryChoice(blocks_to_swap=1)).ring == 40  # one block needs one slot
    assert predict(CASE, MemoryChoice(blocks_to_swap=3)).weights == 18


def test_hoisting_alone_and_with_swapping() -> None:
    found = predict(CASE, MemoryChoice(hoist=True))
    assert found.weights == 168 - 10 and found.ring == 2 * 6 and found.activations == 351 + 1
    both = predict(CASE, MemoryChoice(hoist=True, blocks_to_swap=2))
    assert both.weights == 168 - 10 - (40 + 50) and both.ring == 2 * 50 + 2 * 6


def test_fewer_bits() -> None:
    found = predict(CASE, MemoryChoice(storage="fp8"))
    assert found.weights == 20 + 30 + 25 + 15 + 3 and found.workspace == 8


def test_gradients_that_come_and_go() -> None:
    """Of weights that learn themselves: in the update all of them are there, and no activations."""
    fixed = Fixed(gradients=1000, optimizer=2000, update=11)
    found = predict(replace(CASE, fixed=fixed), MemoryChoice())
    assert (found.gradients, found.activations, found.workspace, found.optimizer) == (1000, 0, 11, 2000)
    in_backward = replace(fixed, gradients=0, in_backward=True)
    found = predict(replace(CASE, fixed=in_backward), MemoryChoice())
    assert (found.gradients, found.activations, found.workspace) == (0, 351, 11)


def test_compiled_blocks_keep_less() -> None:
    shares = [compiled_share(budget) for budget in (0.0, 0.1, 0.5, 0.75, 1.0)]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 0.9
    found = max(tops(CASE, MemoryChoice(compiled=True)))
    assert found == 351 - 2 * 9 and compiled_share(1.0) == pytest.approx(0.9)


def test_work_of_recomputation() -> None:
    assert total_work(CASE, MemoryChoice()) == Work(45, 27, 9)
    assert total_work(CASE, MemoryChoice(activation_budget=0.5)) == Work(55, 33, 11)
