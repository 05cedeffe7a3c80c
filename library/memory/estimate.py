# SPDX-License-Identifier: Apache-2.0
"""The peak of a training step for each way of saving memory, from the figures of one step without any. Arithmetic only.

A step is a row of segments: the blocks' forward passes, what lies between them, their backward passes. Of each the
bytes of activations and gradients at its start and at its peak are known. A block that is recomputed keeps less from
the end of its forward pass to the start of its backward pass, and every segment in between is lower by that much; at
the start of its backward pass it comes up again. Swapping, hoisting and fewer bits per weight move the whole row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from library.memory.choice import MemoryChoice
from library.memory.slots import slot_bytes
from library.memory.work import Work

NO_WORK = Work()
CUDA_CONTEXT = 600 << 20  # bytes of a process on a card before its first tensor: 0.5 to 0.8 GB by card and driver
# of a compiled block's activations, by budget: inductor makes cheap ones again at once, then those that cost products.
# Means of both kinds of FLUX.1's blocks (PERFORMANCE.md 2.4); at 0, only what the block starts from is kept
COMPILED_KEEPS = ((0.0, 0.0), (0.2, 0.31), (0.3, 0.43), (0.5, 0.52), (0.8, 0.52), (1.0, 0.9))


# ---- figures of one step --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """Bytes above what is always there."""

    phase: str  # "forward" or "backward"
    block: int | None  # None: outside of all blocks. In the backward pass a block's segment lasts to the next block's
    start: int
    peak: int


@dataclass(frozen=True)
class Stored:
    """A storage that goes into or out of a block."""

    size: int
    block: int | None  # which made it
    kept: bool  # whether it is still there when the backward pass begins


@dataclass(frozen=True)
class BlockFigures:
    """What one block's forward pass does."""

    kept: int  # bytes it made that are still there when the backward pass begins, its output included
    inputs: frozenset[int] = frozenset()  # of StepFigures.stored
    outputs: frozenset[int] = frozenset()
    work: Work = NO_WORK


@dataclass(frozen=True)
class StepFigures:
    """One step in which nothing is recomputed."""

    segments: tuple[Segment, ...]
    blocks: tuple[BlockFigures, ...]
    stored: Mapping[int, Stored]
    base: int  # bytes that were there before: weights, inputs
    kept: int  # bytes of activations when the backward pass begins
    work: Work = NO_WORK


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights by the way its frozen matrices are kept ("plain", "fp8", ...)."""

    blocks: Mapping[str, tuple[int, ...]]  # of each block
    rest: Mapping[str, int]  # outside of blocks
    cast: Mapping[str, int] = field(default_factory=dict)  # the largest matrix as it is computed with
    modulations: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of each layer that can be hoisted
    modulations_in: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # the same, summed up by block
    modulation_outputs: int = 0  # bytes that they give in one step

    def total(self, storage: str) -> int:
        return sum(self.blocks[storage]) + self.rest[storage]


@dataclass(frozen=True)
class Fixed:
    """Bytes that do not depend on how the denoiser is kept and run."""

    others: int = 0  # models besides it that stay on the card, the batch
    encoders: Mapping[str, int] = field(default_factory=dict)  # frozen text encoders, by the way they are kept
    learning: int = 0  # adapters; 0 where the models' own weights learn
    average: int = 0  # of weights, --ema_decay
    gradients: int = 0  # when all are there, from the backward pass to the optimizer's step
    gradients_stay: bool = False  # they are always there, and no part of the segments
    optimizer: int = 0  # states
    update: int = 0  # what a step of the optimizer takes besides
    in_backward: bool = False  # it is stepped during the backward pass
    context: int = 0  # CUDA_CONTEXT on a card


@dataclass(frozen=True)
class Case:
    """Everything that a prediction needs."""

    step: StepFigures
    weights: Weights
    fixed: Fixed
    # (blocks, choice) -> the blocks of `step` that are recomputed, whole
    recomputed: Callable[[int, MemoryChoice], Collection[int]] = lambda count, choice: ()
    swapped: Callable[[int], Sequence[int]] = lambda count: ()  # --blocks_to_swap -> indices into Weights.blocks
    most_swapped: int = 0  # the largest number that --blocks_to_swap takes
    has_host: bool = True  # whether main memory is another memory than the device's


@dataclass(frozen=True)
class Prediction:
    """Bytes by part at the moment of the peak."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    ring: int
    workspace: int

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.ring + self.workspace


# ---- the arithmetic -------------------------------------------------------------------------------------------------


def predict(case: Case, choice: MemoryChoice) -> Prediction:
    """The peak of a step, the optimizer's states being there already: in one of the passes, or in the update."""
    weights, fixed = case.weights, case.fixed
    resident = weights.total(choice.storage) - moved(case, choice) - _hoisted(case, choice)
    resident += fixed.others + fixed.encoders.get(choice.encoder_storage, 0) + fixed.learning + fixed.average
    passes = max(tops(case, choice), default=0) + (weights.modulation_outputs if choice.hoist else 0)
    workspace = fixed.context + weights.cast.get(choice.storage, 0) + (fixed.update if fixed.in_backward else 0)
    always = fixed.gradients if fixed.gradients_stay else 0
    update = 0 if fixed.in_backward else fixed.gradients - always + fixed.update
    ends = update > passes
    return Prediction(
        weights=resident,
        gradients=fixed.gradients if ends else always,  # otherwise those that are there count with the activations
        optimizer=fixed.optimizer,
        activations=0 if ends else passes,
        ring=_ring(case, choice),
        workspace=workspace + (fixed.update if ends else 0),
    )


def moved(case: Case, choice: MemoryChoice) -> int:
    """Bytes of weights of swapped blocks, hoisted ones excepted."""
    return sum(_swapped_sizes(case, choice))


def _swapped_sizes(case: Case, choice: MemoryChoice) -> list[int]:
    storage, weights = choice.storage, case.weights
    own = weights.modulations_in.get(storage) if choice.hoist else None
    return [weights.blocks[storage][i] - (own[i] if own else 0) for i in case.swapped(choice.blocks_to_swap)]


def _hoisted(case: Case, choice: MemoryChoice) -> int:
    return sum(case.weights.modulations.get(choice.storage, ())) if choice.hoist else 0


def _ring(case: Case, choice: MemoryChoice) -> int:
    sizes = _swapped_sizes(case, choice)
    modulations = case.weights.modulations.get(choice.storage, ()) if choice.hoist else ()
    return slot_bytes(sizes) + slot_bytes(modulations)


def tops(case: Case, choice: MemoryChoice) -> Iterator[int]:
    """The peak of each segment, in order."""
    savings = _savings(case, choice)
    recomputed = frozenset(case.recomputed(len(case.step.blocks), choice))
    rises = {s.block: s.peak - s.start for s in case.step.segments if s.phase == "forward"}
    gone = 0  # bytes that are not there because they will be made again
    for segment in case.step.segments:
        block = segment.block
        if block is None:
            yield segment.peak - gone
        elif segment.phase == "forward":
            yield segment.peak - gone
            gone += savings[block]
        else:
            if block in recomputed:  # its forward pass again, above what is there
                yield segment.start - gone + rises[block]
            gone -= savings[block]
            yield segment.peak - gone


def _savings(case: Case, choice: MemoryChoice) -> list[int]:
    """Bytes of each block that are not kept between its two passes."""
    step = case.step
    recomputed = frozenset(case.recomputed(len(step.blocks), choice))
    starts = frozenset().union(*(step.blocks[i].inputs for i in recomputed))  # what recomputation starts from
    savings = [_own_savings(step, index, index in recomputed, choice) for index in range(len(step.blocks))]
    first: dict[int, int] = {}  # what is in `starts` -> the first block that has it
    for index, block in enumerate(step.blocks):
        for ident in (block.outputs | (block.inputs if index in recomputed else frozenset())) & starts:
            first.setdefault(ident, index)
    for ident, index in first.items():
        stored = step.stored[ident]
        offloaded = choice.offload and case.has_host and stored.block is not None
        if stored.kept and offloaded:
            savings[index] += stored.size
        elif not stored.kept and not offloaded:
            savings[index] -= stored.size  # it is kept for the recomputation alone
    return savings


def _own_savings(step: StepFigures, index: int, is_recomputed: bool, choice: MemoryChoice) -> int:
    """Of what the block made: all but its outputs, or what a compiled block does without."""
    block = step.blocks[index]
    outputs = [step.stored[ident] for ident in block.outputs]
    inner = block.kept - sum(stored.size for stored in outputs if stored.kept and stored.block == index)
    if is_recomputed:
        return inner
    return int(inner * (1 - compiled_share(choice.activation_budget))) if choice.compiled else 0


def compiled_share(budget: float) -> float:
    """Share of a compiled block's activations that is kept under a budget."""
    for (low, least), (high, most) in pairwise(COMPILED_KEEPS):
        if budget <= high:
            return least + (most - least) * (budget - low) / (high - low)
    return COMPILED_KEEPS[-1][1]


def total_work(case: Case, choice: MemoryChoice) -> Work:
    """Of a step, recomputation included."""
    again = [case.step.blocks[i].work for i in case.recomputed(len(case.step.blocks), choice)]
    return sum(again, case.step.work)
