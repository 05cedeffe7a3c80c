# SPDX-License-Identifier: Apache-2.0
"""What is measured: the jobs, the ways in which each is run, and what the cards can do. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from library.families.recipes import BenchmarkJob
from library.families.registry import FAMILIES

RANK = 16
SHARES = (25, 50, 75, 100)  # percent of the blocks that can be swapped; 0 is the row "eager"


JOBS: dict[str, BenchmarkJob] = {name: job for sheet in FAMILIES.values() for name, job in sheet.benchmarks.items()}


# ---- ways -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One row. `words` are options as a user gives them."""

    name: str
    words: tuple[str, ...] = ()
    plain: bool = False  # the loop of diffusers' examples, not our trainer
    recompute: bool = False  # of the plain loop
    swapped: float | None = None  # share of the blocks that can be swapped


GC, COMPILE, HOIST = "--gradient_checkpointing", "--compile", "--hoist_modulation"
PLAIN = (Way("diffusers", plain=True), Way("diffusers, recomputed", plain=True, recompute=True))
COMMON = (
    Way("eager"),
    Way("recomputed", (GC,)),
    Way("half recomputed", ("--activation_budget", "0.5")),
    Way("compiled", (COMPILE,)),
    Way("compiled, second start", (COMPILE,)),
    Way("compiled, recomputed", (COMPILE, GC)),
)
FROZEN = (
    Way("fp8", ("--fp8_base_unet",)),
    Way("fp8, compiled", ("--fp8_base_unet", COMPILE)),
    Way("int8", ("--base_quant", "int8")),
    Way("nf4", ("--base_quant", "nf4")),
)
LEARNING = (Way("updated in the backward pass", ("--fused_backward_pass",)),)
HOISTED = (Way("hoisted", (HOIST,)), Way("hoisted, fp8", (HOIST, "--fp8_base_unet")))
SMALLEST = ("--fp8_base_unet", GC, "--cpu_offload_checkpointing")
SMALLEST_FULL = ("--blockwise_fused_optimizers", "--optimizer_type", "Adafactor", GC, "--cpu_offload_checkpointing")


def ways(job: BenchmarkJob, *, zero_stall: float) -> list[Way]:
    """The rows of a job. zero_stall: the share of the blocks that can be copied while others compute."""
    rows = [*PLAIN, *COMMON, *(LEARNING if job.full else FROZEN), *(HOISTED if job.hoists else ())]
    rows += [Way(f"{percent} % swapped", swapped=percent / 100) for percent in SHARES]
    rows.append(Way(f"{zero_stall:.0%} swapped, compiled: the zero-stall share", (COMPILE,), swapped=zero_stall))
    rows.append(Way(f"{zero_stall:.0%} swapped: the zero-stall share", swapped=zero_stall))
    smallest = SMALLEST_FULL if job.full else (*SMALLEST, HOIST) if job.hoists else SMALLEST
    rows.append(Way("smallest memory", smallest, swapped=1.0))
    return rows


# ---- cards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """What a card reaches: bf16 matrix products in TF/s, and copies from pinned main memory in GB/s."""

    peak_tf: float
    copy_gb_s: float


CARDS = {"H200": Card(790, 50), "H100": Card(790, 50), "4090": Card(165, 25)}


def card_of(name: str, *, peak_tf: float | None, measured: Card | None) -> Card:
    """What is given, else what is known of the card, else what was measured."""
    known = next((card for part, card in CARDS.items() if part in name), measured) or CARDS["4090"]
    return Card(peak_tf or known.peak_tf, known.copy_gb_s)


def zero_stall_share(job: BenchmarkJob, card: Card) -> float:
    """Share of the blocks, in bf16, whose copies are hidden behind the computation of a forward pass."""
    seconds = job.forward_tf / card.peak_tf
    return min(1.0, seconds * card.copy_gb_s / job.block_gb)


def chosen(names: str | None) -> Sequence[str]:
    """Names of jobs, from a list with commas. Raises ValueError naming those that do not exist."""
    wanted = names.split(",") if names else [*JOBS]
    unknown = [name for name in wanted if name not in JOBS]
    if unknown:
        raise ValueError(f"--jobs: there is no {', '.join(unknown)}; there are {', '.join(JOBS)}")
    return wanted
