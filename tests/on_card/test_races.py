# SPDX-License-Identifier: Apache-2.0
"""Every wait between streams is there: whatever the timing, no access to memory comes before what it depends on.

And each of them is needed: without it, the detector finds a race.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.memory.block_swap import BlockSwap
from library.memory.hoisting import Hoisting
from library.memory.offload import Offload
from library.memory.ring import CudaCopyQueue
from tests.memory.swap_models import Sample
from tests.on_card.samples import attach_lora, on_card

pytestmark = [pytest.mark.gpu, pytest.mark.simulated]

CARD = torch.device("cuda")
KEPT = {"kept": False, "recomputed": True}


def races_of(run: Callable[[], None]) -> list[str]:
    """The races of `run`, which has to have something to check."""
    from tests.cuda_simulation.races import Races

    with Races() as races:
        run()
    assert races.checked > 100
    return races.found


def swapped(
    name: str = "stack", *, full: bool = True, recomputed: bool = False, slots: int = 2, accumulation: int = 1
) -> Callable[[], None]:
    """Three steps with all blocks swapped; weights and adapters are updated in the backward pass."""

    def run() -> None:
        sample = on_card(name, recomputed=recomputed)
        if full:
            sample.denoiser.requires_grad_()
        else:
            attach_lora(sample)
        swap = BlockSwap(sample.blocks, range(len(sample.blocks)), CARD, slots=slots)
        swap.install()
        train(sample, swap, accumulation)
        swap.remove()

    return run


def train(sample: Sample, swap: BlockSwap, accumulation: int) -> None:
    learning = [p for p in sample.denoiser.parameters() if p.requires_grad]
    last = [False]

    def update(p: Tensor) -> None:
        if last[0]:
            with torch.no_grad():
                p.sub_(p.grad, alpha=0.1)
            p.grad = None
            swap.changed([p])

    for p in learning:
        p.register_post_accumulate_grad_hook(update)
    for micro_step in range(3 * accumulation):
        last[0] = micro_step % accumulation == accumulation - 1
        loss = sample.loss(micro_step)
        if micro_step == 1:  # a preview in between
            with torch.no_grad():
                sample.loss(9)
        loss.backward()
    swap.home()  # a file is saved
    assert all(bool(p.isfinite().all()) for p in learning)
    sample.loss(0).backward()


def offloaded(name: str = "stack") -> Callable[[], None]:
    """Three steps with activations in main memory."""

    def run() -> None:
        sample = on_card(name, recomputed=True)
        sample.denoiser.requires_grad_()
        offload = Offload(CARD, sample.denoiser.parameters(), smallest=1)
        for step in range(3):
            with offload.forward():
                loss = sample.loss(step)
            loss.backward()

    return run


def hoisted(name: str = "flux", *, recomputed: bool = False, swap: bool = False) -> Callable[[], None]:
    """Three steps and passes without gradient, with modulations hoisted."""

    def run() -> None:
        sample = on_card(name, recomputed=recomputed)
        attach_lora(sample)
        linears = modulations(sample)
        hoisting = Hoisting(sample.denoiser.time_text_embed, linears, CARD, blocks=sample.blocks)
        hoisting.install()
        swapping = BlockSwap(sample.blocks, range(len(sample.blocks) if swap else 0), CARD, without=hoisting.tensors)
        swapping.install()
        for step in range(3):
            sample.loss(step).backward()
            with torch.no_grad():
                sample.loss(5)
        swapping.remove()
        hoisting.remove()

    return run


def modulations(sample: Sample) -> list[nn.Linear]:
    named = [item for block in sample.blocks for item in block.named_modules()]
    return [m for name, m in named if name in ("norm1.linear", "norm1_context.linear", "norm.linear")]  # type: ignore[misc]


# ---- none -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recomputed", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["stack", "flux", "sd3", "unet"])
def test_swapped_blocks(name: str, full: bool, recomputed: bool) -> None:
    assert races_of(swapped(name, full=full, recomputed=recomputed)) == []


@pytest.mark.parametrize("recomputed", KEPT.values(), ids=KEPT)
def test_three_slots_and_accumulated_gradients(recomputed: bool) -> None:
    assert races_of(swapped(slots=3, recomputed=recomputed)) == []
    assert races_of(swapped(accumulation=2, recomputed=recomputed)) == []


@pytest.mark.parametrize("name", ["stack", "flux", "sd3"])
def test_offloaded_activations(name: str) -> None:
    assert races_of(offloaded(name)) == []


@pytest.mark.parametrize("swap", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("recomputed", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_hoisted_modulations(name: str, recomputed: bool, swap: bool) -> None:
    assert races_of(hoisted(name, recomputed=recomputed, swap=swap)) == []


# ---- each wait is needed --------------------------------------------------------------------------------------------


def follow_others_alone(queue: CudaCopyQueue, *others: CudaCopyQueue) -> None:
    for other in others:
        queue.stream.wait_stream(other.stream)


def follow_computation_alone(queue: CudaCopyQueue, *others: CudaCopyQueue) -> None:
    queue.stream.wait_stream(torch.cuda.current_stream())


FAULTS: dict[str, tuple[type, str, Callable[..., Any], Callable[[], None]]] = {
    "the computation does not wait for a block": (CudaCopyQueue, "reach", lambda queue, mark: None, swapped()),
    "a copy does not wait for the computation": (CudaCopyQueue, "follow", follow_others_alone, swapped()),
    "a copy in does not wait for the copy out": (CudaCopyQueue, "follow", follow_computation_alone, swapped()),
    "the host does not wait for blocks at home": (CudaCopyQueue, "finish", lambda queue: None, swapped()),
    "the computation does not wait for activations": (CudaCopyQueue, "reach", lambda queue, mark: None, offloaded()),
    "activations leave before they are computed": (CudaCopyQueue, "follow", follow_others_alone, offloaded()),
    "activations are freed while they leave": (CudaCopyQueue, "lend", lambda queue, tensor: None, offloaded()),
    "blocks do not wait for modulations": (Hoisting, "_wait", lambda hoisting, block, args: None, hoisted()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_missing_wait_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, name, function, run = FAULTS[fault]  # the runs are among those above, which have no races
    monkeypatch.setattr(cls, name, function)
    assert races_of(run)
