# SPDX-License-Identifier: Apache-2.0
"""--compile auto: whether a run is long enough to earn back the time that compiling its blocks takes."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from library.device import is_card
from library.log import get_logger
from library.memory.compiling import missing_compiler, signature
from library.planner.case import case_of
from library.planner.planned import Planned
from library.planner.step_time import seconds

log = get_logger()
# Estimated, for one kind of block at one size of picture, forward and backward, on the processor beside a card. The
# two kinds of FLUX.1 took two minutes on two slow cores (benchmarks/RESULTS.md).
SECONDS_OF_COMPILING = 30.0


def with_compilation(planned: Planned, *, batches: int, graphs: int, forbidden: str | None = None) -> Planned:
    """The run with its blocks compiled, if that pays; the reason is logged.

    batches: micro-batches of the whole run in this process. A resumed run decides as the one that it continues: what
    is compiled differs in the last digits from what is not. graphs: sizes of pictures that are compiled one by one.
    forbidden: why this run cannot be compiled.
    """
    reason = forbidden or _impossible(planned)
    if reason is not None:
        log.info(f"--compile auto: nothing is compiled: {reason}")
        return planned
    compiled = replace(planned, choice=replace(planned.choice, compiled=True))
    case = case_of(planned)
    plain, faster = seconds(case, planned.choice), seconds(case, compiled.choice)
    saved, cost = batches * (plain - faster), SECONDS_OF_COMPILING * graphs * kinds(planned)
    log.info(
        f"--compile auto: {'compiled' if saved > cost else 'nothing is compiled'}: {batches} batches save about "
        f"{duration(saved)} ({plain - faster:.2g} of {plain:.2g} s each), compiling takes about {duration(cost)}"
    )
    return compiled if saved > cost else planned


def kinds(planned: Planned) -> int:
    """The number of kinds of blocks, each of which is compiled once per size of picture."""
    blocks: list[nn.Module] = planned.family.blocks(planned.family.empty_denoiser())
    return len({signature(block) for block in blocks})


def _impossible(planned: Planned) -> str | None:
    if not is_card(planned.device):
        return "this run has no GPU (--compile compiles all the same)"
    lacking = missing_compiler(planned.memory.dynamo_backend, planned.device)
    return f"this machine has no {lacking}" if lacking is not None else None


def duration(seconds: float) -> str:
    """A duration for people."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
