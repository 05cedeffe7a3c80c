# SPDX-License-Identifier: Apache-2.0
"""The planner: memory and time of a step with each memory-saving choice, and the fastest choice that fits.

plan = plan_memory(planned)  # one step is simulated; no weights are read
plan.table()  # --plan
plan.choose(12 << 30)  # --vram_budget 12GB
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from library.device import forget_peak, free_bytes, is_card, peak_bytes
from library.errors import UserError
from library.learning import DENOISER
from library.log import get_logger
from library.memory.choice import MemoryChoice
from library.memory.estimate import CUDA_CONTEXT, Case, Prediction, predict
from library.memory.options import AUTO, GIB, MemoryOptions
from library.planner.case import case_of
from library.planner.planned import Planned
from library.planner.step_time import seconds

log = get_logger()

BUDGETS = (1.0, 0.75, 0.5, 0.25, 0.0)
SWAP_STEPS = 8  # numbers of blocks to swap that are tried, up to all that can be
SHARE_OF_FREE = 0.95  # of the memory that is free: the rest is for what kernels take and for gaps
EXACT_IS_WORTH = 1.5  # times as long as with fewer bits per weight
ROWS = 14  # of the table


@dataclass(frozen=True)
class Option:
    """One way to run, with its memory and time."""

    choice: MemoryChoice
    needs: Prediction
    seconds: float  # of a step, on the card of `step_time`: good for comparing only

    @property
    def flags(self) -> str:
        return " ".join(self.choice.flags()) or "(nothing)"


@dataclass(frozen=True)
class MemoryPlan:
    """All ways to run, and the figures they are computed from."""

    case: Case
    options: tuple[Option, ...]
    given: MemoryOptions
    device: torch.device

    @cached_property
    def best(self) -> tuple[Option, ...]:
        """The ways that no other of the same precision beats in both memory and time, the fastest first."""
        found: list[Option] = []
        for option in sorted(self.options, key=lambda o: (o.seconds, o.needs.peak, len(o.flags))):
            rivals = [other for other in found if other.choice.storage in ("plain", option.choice.storage)]
            if all(option.needs.peak < other.needs.peak for other in rivals):
                found.append(option)
        return tuple(found)

    @property
    def smallest(self) -> Option:
        return min(self.best, key=lambda option: option.needs.peak)

    def within(self, limit: int) -> Option | None:
        """The fastest way in `limit` bytes. Fewer bits change what is learned: only where they save much time."""
        fitting = [option for option in self.best if option.needs.peak <= limit]
        exact = [option for option in fitting if option.choice.storage == "plain"]
        if exact and exact[0].seconds <= EXACT_IS_WORTH * fitting[0].seconds:
            return exact[0]
        return fitting[0] if fitting else None

    def choose(self, limit: int) -> MemoryChoice:
        """The way that is chosen for so many bytes, and logged. Raises UserError when nothing fits."""
        chosen = self.within(limit)
        if chosen is None:
            raise UserError(self._too_large(limit))
        peak = chosen.needs.peak
        log.info(f"memory: {chosen.flags}: {gb(peak)} predicted of {gb(limit)}, {gb(limit - peak)} to spare")
        return chosen.choice

    def needs(self, choice: MemoryChoice) -> Prediction:
        """The predicted memory of a step with `choice`."""
        return predict(self.case, choice)

    def _too_large(self, limit: int) -> str:
        smallest, given = self.smallest, self.given
        automatic = [name for name in ("activation_budget", "blocks_to_swap") if vars(given)[name] == AUTO]
        asked = "--vram_budget" if given.vram_budget is not None or not automatic else f"--{automatic[0]} {AUTO}"
        ways = ["a smaller --resolution or --train_batch_size"]
        if smallest.needs.optimizer > smallest.needs.peak // 10:
            ways.append("--optimizer_type AdamW8bit")
        if self.case.fixed.encoders.get("plain"):
            ways.append("--cache_text_encoder_outputs")
        return (
            f"{asked}: nothing fits in {gb(limit)}; the smallest that was found takes {gb(smallest.needs.peak)} "
            f"({smallest.flags}). What else helps: {', '.join(ways)}"
        )

    def table(self, rows: int = ROWS) -> str:
        """The best ways as a table, in GB (2^30 bytes); times are multiples of the fastest one."""
        limit = self.given.vram_budget
        chosen = self.within(limit) if limit is not None else None
        shown = _thinned(self.best, rows, keep=(chosen, self.smallest))
        head = ("options", "weights", "gradients", "optimizer", "activations", "ring", "work", "peak", "time")
        lines = [head, *(self._row(option) for option in shown)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
            for line in lines
        ]
        if limit is not None:
            verdict = f"chosen: {chosen.flags}" if chosen else self._too_large(limit)
            text.append(f"--vram_budget {gb(limit)}: {verdict}")
        return "\n".join(["predicted peak of a step on the card, GB", *text]) + "\n"

    def _row(self, option: Option) -> tuple[str, ...]:
        needs = option.needs
        parts = (needs.weights, needs.gradients, needs.optimizer, needs.activations, needs.ring, needs.workspace)
        numbers = [f"{part / GIB:.2f}" for part in (*parts, needs.peak)]
        return (option.flags, *numbers, f"{option.seconds / self.best[0].seconds:.2f}")


def memory_to_use(device: torch.device, budget: int | None) -> int:
    """Bytes that a run may fill: of the budget no more than what the card has free, with some of that kept back.

    budget: of --vram_budget; None: all that is free. Raises UserError if that is unknown and no budget is given.
    """
    if budget is not None and not is_card(device):
        return budget
    try:
        free = int(free_bytes(device) * SHARE_OF_FREE)
    except UserError:
        if budget is None:
            raise
        return budget
    if budget is not None and budget > free:
        log.warning(f"--vram_budget {gb(budget)}: only {gb(free)} of the card are free, which is what counts")
    return free if budget is None else min(budget, free)


def gb(size: int) -> str:
    return f"{size / GIB:.2f} GB"


def _thinned(options: Sequence[Option], rows: int, keep: Collection[Option | None]) -> list[Option]:
    """The first, the last, evenly spaced ones between, and those to keep."""
    if len(options) <= rows:
        return list(options)
    indices = {round(i * (len(options) - 1) / (rows - 1)) for i in range(rows)}
    return [option for i, option in enumerate(options) if i in indices or option in keep]


class PeakCheck:
    """Logs once the measured and the predicted memory of a step. `step_taken` does not wait for the device."""

    def __init__(self, predicted: Prediction, device: torch.device) -> None:
        self.predicted, self.device = predicted, device
        self.steps = 0

    def step_taken(self) -> None:
        """Count an optimizer step. The first makes the optimizer's states; the second is measured."""
        self.steps += 1
        if self.steps == 1:
            forget_peak(self.device)
        elif self.steps == 2:
            self.say(peak_bytes(self.device) + CUDA_CONTEXT)  # which torch does not see

    def say(self, measured: int) -> None:
        """Log the comparison with `measured` bytes, the context among them, and how activations compare."""
        predicted = self.predicted
        factor = (measured - predicted.peak + predicted.activations) / max(1, predicted.activations)
        log.info(f"memory: {gb(predicted.peak)} predicted, {gb(measured)} measured: activations x {factor:.2f}")


# ---- the plan of a run ----------------------------------------------------------------------------------------------


def plan_memory(planned: Planned) -> MemoryPlan:
    """The plan of a run."""
    case = case_of(planned)
    options = tuple(
        Option(choice, predict(case, choice), seconds(case, choice)) for choice in candidates(planned, case)
    )
    return MemoryPlan(case, options, planned.memory, planned.device)


def candidates(planned: Planned, case: Case) -> Iterator[MemoryChoice]:
    """Choices worth trying. Options that were given are kept.

    Without --vram_budget (and without --plan), only what is "auto" is free.
    """
    given = planned.memory
    fixed = replace(MemoryChoice.of(given), compiled=planned.choice.compiled)
    free = given.vram_budget is not None or given.plan
    budgets = BUDGETS if _is_open(given.activation_budget, free) and not given.gradient_checkpointing else None
    storages = ("plain", "fp8") if free and fixed.storage == "plain" and len(case.weights.blocks) > 1 else None
    moves = case.has_host and planned.processes == 1  # a block that is split has no other place
    movable = moves and _may_swap(planned)
    counts = swap_counts(case.most_swapped) if movable and _is_open(given.blocks_to_swap, free) else None
    hoists = (False, True) if free and moves and not fixed.hoist and _may_hoist(planned, case) else None
    offloads = (False, True) if free and moves and not fixed.offload else None
    for storage, budget, offload, count, hoist in itertools.product(
        storages or (fixed.storage,),
        budgets or (fixed.activation_budget,),
        offloads or (fixed.offload,),
        counts or (fixed.blocks_to_swap,),
        hoists or (fixed.hoist,),
    ):
        if offload and budget == 1 and not fixed.offload:
            continue
        yield replace(
            fixed, storage=storage, activation_budget=budget, offload=offload, blocks_to_swap=count, hoist=hoist
        )


def _is_open(value: str | float | None, free: bool) -> bool:
    return value == AUTO or (value is None and free)


def _may_swap(planned: Planned) -> bool:
    learning = planned.learning
    if planned.deepspeed or (learning.swap_options is not None and learning.swap_options.swaps_blocks):
        return False  # weights are moved already, or which blocks is given
    return DENOISER not in learning.changed or (learning.in_backward is not None and not planned.averages_weights)


def _may_hoist(planned: Planned, case: Case) -> bool:
    learning = planned.learning
    alone = learning.parts == {DENOISER} and DENOISER not in learning.changed
    return bool(case.weights.modulations) and alone and not planned.deepspeed


def swap_counts(most: int) -> list[int]:
    """0, and evenly spaced numbers up to the most that --blocks_to_swap takes."""
    return sorted({round(i * most / SWAP_STEPS) for i in range(SWAP_STEPS + 1)})
