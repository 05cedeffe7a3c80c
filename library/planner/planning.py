# SPDX-License-Identifier: Apache-2.0
"""The planner: what a step takes with each way of saving memory, and which way is the fastest that fits.

plan = plan_memory(trainer)  # one step is simulated; no weights are read
plan.table()  # --plan
plan.choose(12 << 30)  # --vram_budget 12GB
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from library.device import forget_peak, free_bytes, is_card, peak_bytes
from library.errors import UserError
from library.families.family import ModelFamily
from library.log import get_logger
from library.memory.checkpointing import recomputed_blocks
from library.memory.choice import MemoryChoice
from library.memory.estimate import CUDA_CONTEXT, Case, Fixed, Prediction, Weights, predict
from library.memory.meter import bytes_of
from library.memory.options import AUTO, GIB, MemoryOptions
from library.memory.quantise import quantised_names, stored_bytes
from library.planner.optimizer_memory import appetite, float32_copies
from library.planner.simulation import Simulation, simulate
from library.planner.step_time import seconds

log = get_logger()

BUDGETS = (1.0, 0.75, 0.5, 0.25, 0.0)
SWAP_STEPS = 8  # numbers of blocks to swap that are tried, up to all that can be
SHARE_OF_FREE = 0.95  # of the memory that is free: the rest is for what kernels take and for gaps
QUANTISED = ("fp8", "int8", "nf4")
EXACT_IS_WORTH = 1.5  # times as long as with fewer bits per weight
ROWS = 14  # of the table


@dataclass(frozen=True)
class Option:
    """One way to run."""

    choice: MemoryChoice
    needs: Prediction
    seconds: float  # of a step, on the card of `step_time`: good for comparing only

    @property
    def flags(self) -> str:
        return " ".join(self.choice.flags()) or "(nothing)"


@dataclass(frozen=True)
class Plan:
    """All ways to run, and the figures that they come from."""

    case: Case
    options: tuple[Option, ...]
    given: MemoryOptions
    device: torch.device

    @cached_property
    def best(self) -> tuple[Option, ...]:
        """Those that nothing as exact beats in both memory and time, the fastest first."""
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
        """The fastest way in `limit` bytes. Fewer bits change what is learned: only where the time is well spent."""
        fitting = [option for option in self.best if option.needs.peak <= limit]
        exact = [option for option in fitting if option.choice.storage == "plain"]
        if exact and exact[0].seconds <= EXACT_IS_WORTH * fitting[0].seconds:
            return exact[0]
        return fitting[0] if fitting else None

    def choose(self, budget: int | None) -> MemoryChoice:
        """What is `within` the budget in bytes; None: within the memory that is free now. Says what it chose.

        Raises UserError when nothing fits.
        """
        limit = int(free_bytes(self.device) * SHARE_OF_FREE) if budget is None else budget
        chosen = self.within(limit)
        if chosen is None:
            raise UserError(self._too_large(limit))
        log.info(f"memory: {chosen.flags}: {gb(chosen.needs.peak)} predicted of {gb(limit)}")
        return chosen.choice

    def needs(self, choice: MemoryChoice) -> Prediction:
        """What a step takes with `choice`."""
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
        """The best ways, in GB (2^30 bytes). The time is that of the fastest way times so much."""
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


def gb(size: int) -> str:
    return f"{size / GIB:.2f} GB"


def _thinned(options: Sequence[Option], rows: int, keep: Collection[Option | None]) -> list[Option]:
    """First, last and evenly spaced ones between, and those to keep."""
    if len(options) <= rows:
        return list(options)
    indices = {round(i * (len(options) - 1) / (rows - 1)) for i in range(rows)}
    return [option for i, option in enumerate(options) if i in indices or option in keep]


def activation_factor(predicted: Prediction, measured: int) -> float:
    """By which the activations are off when a step took `measured` bytes, the context of CUDA among them."""
    return (measured - predicted.peak + predicted.activations) / max(1, predicted.activations)


class PeakCheck:
    """Says once what steps took on a card, beside what was predicted. `step_taken` does not wait for the card."""

    def __init__(self, predicted: Prediction, device: torch.device) -> None:
        self.predicted, self.device = predicted, device
        self.steps = 0

    def step_taken(self) -> None:
        """After each optimizer step. The first makes the optimizer's states: the second is a whole one."""
        self.steps += 1
        if self.steps == 1:
            forget_peak(self.device)
        elif self.steps == 2:
            self.say(peak_bytes(self.device) + CUDA_CONTEXT)  # which torch does not see

    def say(self, measured: int) -> None:
        """Of `measured` bytes, the context among them."""
        factor = activation_factor(self.predicted, measured)
        log.info(f"memory: {gb(self.predicted.peak)} predicted, {gb(measured)} measured: activations x {factor:.2f}")


# ---- the plan of a run ----------------------------------------------------------------------------------------------


def plan_memory(trainer: Any) -> Plan:
    """The plan of a run that is checked and has its device and plan, but no models yet."""
    case = case_of(trainer)
    memory = trainer.options.memory
    options = tuple(
        Option(choice, predict(case, choice), seconds(case, choice)) for choice in candidates(trainer, case)
    )
    return Plan(case, options, memory, trainer.device)


def case_of(trainer: Any) -> Case:
    """What the simulation of a step, the headers and the optimizer say."""
    family: ModelFamily = trainer.family
    found = simulate(trainer)
    denoiser = family.empty_denoiser(trainer.load_dtype("denoiser"), "plain" if _quantised(trainer) else _kept(trainer))
    has_host = is_card(trainer.device) or trainer.options.memory.plan
    return Case(
        found.step,
        weights_of(family, denoiser, trainer, found),
        fixed_of(trainer, found),
        lambda count, choice: _recomputed(found.encoder_blocks, count, choice),
        lambda count: family.swapped(denoiser, count, trainer.swap_options),
        max(0, family.most_swapped(denoiser)) if found.swaps else 0,
        has_host,
    )


def _kept(trainer: Any) -> Any:
    return trainer.storage("denoiser")


def _quantised(trainer: Any) -> bool:
    return _kept(trainer) in QUANTISED


def _recomputed(encoder_blocks: int, count: int, choice: MemoryChoice) -> Collection[int]:
    """Text encoders that learn are recomputed with any budget; compiled blocks as a whole only with budget 0."""
    encoders = range(encoder_blocks if choice.activation_budget < 1 else 0)
    budget = choice.activation_budget if not choice.compiled or choice.activation_budget == 0 else 1.0
    own = recomputed_blocks([1.0] * (count - encoder_blocks), budget)
    return [*encoders, *(encoder_blocks + index for index in own)]


def weights_of(family: ModelFamily, denoiser: nn.Module, trainer: Any, found: Simulation) -> Weights:
    """Bytes of the denoiser's weights, block by block."""
    frozen = "denoiser" not in trainer.changed
    linears = {id(denoiser.get_submodule(name)) for name in quantised_names(denoiser)} if frozen else set()
    modulated = family.modulations(denoiser) if frozen and found.hoists else None
    layers = modulated[1] if modulated else []
    storages = ("plain", *QUANTISED) if frozen else ("plain",)
    size = lambda module, storage: _bytes(module, storage, linears)
    blocks = family.blocks(denoiser)
    by_block = {s: tuple(size(block, s) for block in blocks) for s in storages}
    inside = {id(layer): i for i, block in enumerate(blocks) for layer in block.modules()}
    sums = {s: [0] * len(blocks) for s in storages}
    for layer, storage in itertools.product(layers, storages):
        if id(layer) in inside:
            sums[storage][inside[id(layer)]] += size(layer, storage)
    item = trainer.dtype.itemsize
    largest = (
        max((m.weight.numel() for m in denoiser.modules() if isinstance(m, nn.Linear) and id(m) in linears), default=0)
        * item
    )
    return Weights(
        by_block,
        {s: size(denoiser, s) - sum(by_block[s]) for s in storages},
        cast={s: largest for s in storages if s in QUANTISED and not _quantised(trainer)},
        modulations={s: tuple(size(layer, s) for layer in layers) for s in storages} if layers else {},
        modulations_in={s: tuple(own) for s, own in sums.items()},
        modulation_outputs=sum(layer.out_features for layer in layers) * found.samples * item,
    )


def _bytes(module: nn.Module, storage: str, linears: Collection[int]) -> int:
    """Of a module on the meta device, when the Linears with these ids are kept in `storage`."""
    total = sum(t.nbytes for t in {id(t): t for t in (*module.parameters(), *module.buffers())}.values())
    if storage != "plain":
        for child in module.modules():
            if isinstance(child, nn.Linear) and id(child) in linears:
                total += stored_bytes(child, storage) - child.weight.nbytes  # type: ignore[arg-type]
    return total


def fixed_of(trainer: Any, found: Simulation) -> Fixed:
    """Everything besides the denoiser."""
    options, prepared = trainer.options, trainer.prepared
    dtype = torch.float32 if options.bf16_update != "plain" else found.dtype
    count, kind = sum(map(math.prod, found.shapes)), options.bf16_update
    hunger = appetite(prepared.optimizer, dtype)
    copies = float32_copies(prepared.optimizer, found.shapes) if kind != "plain" else 0
    in_backward = trainer.steps_in_backward
    return Fixed(
        others=found.encoders + found.vae + found.batch,
        encoders=_frozen_encoders(trainer),
        learning=found.learning,
        average=4 * count if options.ema.ema_decay is not None else 0,
        gradients=0 if in_backward else count * found.dtype.itemsize,
        gradients_stay=found.flat,
        optimizer=hunger.states(found.shapes) + (2 * count if kind == "kahan" else 0),
        update=hunger.update(found.shapes) + copies,
        in_backward=in_backward,
        context=CUDA_CONTEXT if is_card(trainer.device) or options.memory.plan else 0,
    )


def _frozen_encoders(trainer: Any) -> dict[str, int]:
    """Bytes of the text encoders that run in each step and do not learn, by the way they are kept."""
    family: ModelFamily = trainer.family
    names = [n for n in family.encoders if n not in trainer.learning and not trainer.options.cache.texts]
    own = trainer.choice.encoder_storage
    return {
        storage: sum(
            bytes_of((*module.parameters(), *module.buffers()))
            for module in (family.part(n).empty(trainer.load_dtype(n), trainer.storage(n)) for n in names)
        )
        for storage in {own}
    }


# ---- candidates -----------------------------------------------------------------------------------------------------


def candidates(trainer: Any, case: Case) -> Iterator[MemoryChoice]:
    """Ways to run that are worth trying: what was given stays as it is.

    Without --vram_budget (and without --plan), only what is "auto" is free.
    """
    given: MemoryOptions = trainer.options.memory
    fixed = MemoryChoice.of(given)
    free = given.vram_budget is not None or given.plan
    budgets = BUDGETS if _is_open(given.activation_budget, free) and not given.gradient_checkpointing else None
    storages = ("plain", "fp8") if free and fixed.storage == "plain" and len(case.weights.blocks) > 1 else None
    movable = case.has_host and _may_swap(trainer)
    counts = swap_counts(case.most_swapped) if movable and _is_open(given.blocks_to_swap, free) else None
    hoists = (False, True) if free and case.has_host and not fixed.hoist and _may_hoist(trainer, case) else None
    offloads = (False, True) if free and case.has_host and not fixed.offload else None
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


def _is_open(value: Any, free: bool) -> bool:
    return value == AUTO or (value is None and free)


def _may_swap(trainer: Any) -> bool:
    options, own = trainer.options, trainer.swap_options
    learns = "denoiser" in trainer.changed
    if own is not None and own.swaps_blocks:
        return False  # which blocks is given
    return not options.distributed.deepspeed and (
        not learns or (trainer.steps_in_backward and options.ema.ema_decay is None)
    )


def _may_hoist(trainer: Any, case: Case) -> bool:
    alone = trainer.learning == frozenset({"denoiser"}) and "denoiser" not in trainer.changed
    return bool(case.weights.modulations) and alone and not trainer.options.distributed.deepspeed


def swap_counts(most: int) -> list[int]:
    """0, and evenly spaced numbers up to the most that --blocks_to_swap takes."""
    return sorted({round(i * most / SWAP_STEPS) for i in range(SWAP_STEPS + 1)})
