# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a training step for each way of saving memory, computed from the figures of one plain step.

A step is a sequence of segments: the blocks' forward passes, the code in between, and their backward passes. For each
one the bytes of activations and gradients at its start and at its peak are known. A recomputed block keeps less from
the end of its forward pass to the start of its backward pass, which lowers every segment in between by that much; at
the start of its backward pass the activations come back. Swapping, hoisting and quantisation lower all segments alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from library.memory.choice import MemoryChoice
from library.memory.slots import slot_bytes
from library.memory.work import Work

NO_WORK = Work()
CUDA_CONTEXT = 600 << 20  # bytes that a process takes on a card before its first tensor: 0.5 to 0.8 GB
# (budget, share of a compiled block's activations that is kept): inductor recomputes cheap ones first, then those that
# need matrix products. Means over both kinds of FLUX.1 blocks (PERFORMANCE.md 2.4); at 0, only the inputs are kept
COMPILED_KEEPS = ((0.0, 0.0), (0.2, 0.31), (0.3, 0.43), (0.5, 0.52), (0.8, 0.52), (1.0, 0.9))


# ---- figures of one step --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """A part of a step. Bytes are counted above those that are always allocated."""

    phase: str  # "forward" or "backward"
    block: int | None  # None: outside of all blocks. A backward segment lasts until the next block's
    start: int
    peak: int


@dataclass(frozen=True)
class BoundaryStorage:
    """A storage that is an input or output of a block."""

    size: int
    block: int | None  # the block that made it; None: made outside of all blocks
    kept: bool  # whether it is alive when the backward pass begins


@dataclass(frozen=True)
class BlockFigures:
    """Figures of one block's forward pass."""

    kept: int  # bytes that it made and that are alive when the backward pass begins, including its output
    inputs: frozenset[int] = frozenset()  # keys of StepFigures.stored
    outputs: frozenset[int] = frozenset()
    work: Work = NO_WORK


@dataclass(frozen=True)
class StepFigures:
    """Figures of one step in which nothing is recomputed."""

    segments: tuple[Segment, ...]
    blocks: tuple[BlockFigures, ...]
    stored: Mapping[int, BoundaryStorage]
    base: int  # bytes that were allocated before: weights, inputs
    kept: int  # bytes of activations when the backward pass begins
    work: Work = NO_WORK


@dataclass(frozen=True)
class Split:
    """Bytes of one of several processes that split a model's weights, by the format of the matrices."""

    own: Mapping[str, int]  # its rows, and the weights that are not split
    gathered: Mapping[str, int]  # whole weights in a pass: outside of blocks, the running block and the next one
    gradients: tuple[int, ...] = ()  # of each block of a step: gradients that leave when its backward pass has ended
    exchange: int = 0  # to add up the gradients of the largest block


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights by the format of its frozen matrices ("plain", "fp8", ...)."""

    blocks: Mapping[str, tuple[int, ...]]  # per block
    rest: Mapping[str, int]  # outside of blocks
    cast: Mapping[str, int] = field(default_factory=dict)  # the largest matrix in the dtype of the computation
    modulations: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # per layer that can be hoisted
    modulations_in: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # the same, summed by block
    modulation_outputs: int = 0  # bytes of their outputs in one step
    split: Split | None = None  # between processes

    def total(self, storage: str) -> int:
        return sum(self.blocks[storage]) + self.rest[storage]


@dataclass(frozen=True)
class Fixed:
    """Bytes that do not depend on the format of the denoiser and the way it is run."""

    others: int = 0  # other models that stay on the card, and the batch
    encoders: Mapping[str, int] = field(default_factory=dict)  # frozen text encoders, by format
    learning: int = 0  # adapters; 0 when the models' own weights learn
    average: int = 0  # moving average of the weights, --ema_decay
    gradients: int = 0  # all gradients, from the end of the backward pass to the optimizer's step
    gradients_stay: bool = False  # they are always allocated, and not counted in the segments
    optimizer: int = 0  # optimizer states
    update: int = 0  # temporary memory of the optimizer's step
    in_backward: bool = False  # the optimizer steps during the backward pass
    context: int = 0  # CUDA_CONTEXT on a card, else 0


@dataclass(frozen=True)
class Case:
    """Inputs of a prediction."""

    step: StepFigures
    weights: Weights
    fixed: Fixed
    # (number of blocks, choice) -> indices of the blocks of `step` that are recomputed as a whole
    recomputed: Callable[[int, MemoryChoice], Collection[int]] = lambda count, choice: ()
    swapped: Callable[[int], Sequence[int]] = lambda count: ()  # --blocks_to_swap -> indices into Weights.blocks
    most_swapped: int = 0  # the largest number that --blocks_to_swap takes
    has_host: bool = True  # whether main memory is separate from the device's memory


@dataclass(frozen=True)
class Prediction:
    """Bytes by purpose at the moment of the peak."""

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
    """Peak of a step with allocated optimizer states: in one of the two passes, or in the update."""
    weights, fixed = case.weights, case.fixed
    split = weights.split
    resident = weights.total(choice.storage) - moved(case, choice) - _hoisted(case, choice)
    if split is not None:
        resident = split.own[choice.storage]
    resident += fixed.others + fixed.encoders.get(choice.encoder_storage, 0) + fixed.learning + fixed.average
    passes = max(tops(case, choice), default=0) + (weights.modulation_outputs if choice.hoist else 0)
    workspace = fixed.context + weights.cast.get(choice.storage, 0) + (fixed.update if fixed.in_backward else 0)
    workspace += split.exchange if split is not None else 0
    always = fixed.gradients if fixed.gradients_stay else 0
    update = 0 if fixed.in_backward else fixed.gradients - always + fixed.update
    ends = update > passes
    return Prediction(
        weights=resident,
        gradients=fixed.gradients if ends else always,  # in the passes, they count as activations
        optimizer=fixed.optimizer,
        activations=0 if ends else passes,
        ring=_ring(case, choice) + (split.gathered[choice.storage] if split else 0),
        workspace=workspace + (fixed.update if ends else 0),
    )


def moved(case: Case, choice: MemoryChoice) -> int:
    """Bytes of the weights of swapped blocks, without hoisted ones."""
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
    """Peak of each segment in bytes, in order."""
    savings = _savings(case, choice)
    recomputed = frozenset(case.recomputed(len(case.step.blocks), choice))
    leaving = case.weights.split.gradients if case.weights.split is not None else ()
    rises = {s.block: s.peak - s.start for s in case.step.segments if s.phase == "forward"}
    gone = 0  # bytes that are freed and will be recomputed
    for segment in case.step.segments:
        block = segment.block
        if block is None:
            yield segment.peak - gone
        elif segment.phase == "forward":
            yield segment.peak - gone
            gone += savings[block]
        else:
            if block in recomputed:  # its forward pass runs again, on top of what is allocated
                yield segment.start - gone + rises[block]
            gone -= savings[block]
            yield segment.peak - gone
            gone += leaving[block] if leaving else 0


def _savings(case: Case, choice: MemoryChoice) -> list[int]:
    """Bytes per block that are not kept between its two passes."""
    step = case.step
    recomputed = frozenset(case.recomputed(len(step.blocks), choice))
    starts = frozenset().union(*(step.blocks[i].inputs for i in recomputed))  # inputs that recomputation needs
    savings = [_own_savings(step, index, index in recomputed, choice) for index in range(len(step.blocks))]
    first: dict[int, int] = {}  # key in `starts` -> the first block that has it
    for index, block in enumerate(step.blocks):
        for ident in (block.outputs | (block.inputs if index in recomputed else frozenset())) & starts:
            first.setdefault(ident, index)
    for ident, index in first.items():
        stored = step.stored[ident]
        offloaded = choice.offload and case.has_host and stored.block is not None
        if stored.kept and offloaded:
            savings[index] += stored.size
        elif not stored.kept and not offloaded:
            savings[index] -= stored.size  # kept only for the recomputation
    return savings


def _own_savings(step: StepFigures, index: int, is_recomputed: bool, choice: MemoryChoice) -> int:
    """Bytes made by the block that are not kept: all but its outputs, or what a compiled block recomputes."""
    block = step.blocks[index]
    outputs = [step.stored[ident] for ident in block.outputs]
    inner = block.kept - sum(stored.size for stored in outputs if stored.kept and stored.block == index)
    if is_recomputed:
        return inner
    return int(inner * (1 - compiled_share(choice.activation_budget))) if choice.compiled else 0


def compiled_share(budget: float) -> float:
    """Share of a compiled block's activations that is kept under a budget, 0 to 1."""
    for (low, least), (high, most) in pairwise(COMPILED_KEEPS):
        if budget <= high:
            return least + (most - least) * (budget - low) / (high - low)
    return COMPILED_KEEPS[-1][1]


def total_work(case: Case, choice: MemoryChoice) -> Work:
    """Work of a step, including recomputation."""
    again = [case.step.blocks[i].work for i in case.recomputed(len(case.step.blocks), choice)]
    return sum(again, case.step.work)
