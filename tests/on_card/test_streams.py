# SPDX-License-Identifier: Apache-2.0
"""Block swap and hoisting with the streams of a card: the same results to the bit; the host waits in no step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from library.memory.block_swap import BlockSwap
from tests.cuda_simulation.simulate import is_simulated
from tests.memory.swap_models import recompute, stack
from tests.memory.test_block_swap import PoisonedSwap, assert_equal
from tests.memory.test_hoisting import PoisonedHoisting

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda")


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_swapped_blocks(recomputed: bool) -> None:
    """On a real card, blocks large enough for copies to be under way while they are needed."""
    width = 64 if is_simulated() else 1024
    results = []
    for swapped in (False, True):
        sample = stack(8, width=width)
        sample.denoiser.to(CARD).requires_grad_()
        for block in sample.blocks if recomputed else ():
            recompute(block)
        swap = PoisonedSwap(sample.blocks, range(8) if swapped else (), CARD)
        swap.install()
        parameters = [*sample.denoiser.parameters()]

        @torch.no_grad()
        def update(p: Tensor, swap: BlockSwap = swap) -> None:
            p.sub_(p.grad, alpha=0.1)
            p.grad = None
            swap.changed([p])

        handles = [p.register_post_accumulate_grad_hook(update) for p in parameters]
        x = torch.randn(256, width, device=CARD, generator=torch.Generator(CARD).manual_seed(0))
        swap.measure()
        sample.denoiser(x).square().mean().backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(4):
            sample.denoiser(x).square().mean().backward()
        torch.cuda.set_sync_debug_mode("default")
        assert not swapped or (swap.stalled() > 0 and swap.ring.copies > 0 and swap.ring.copies_home > 0)
        for handle in handles:
            handle.remove()
        swap.home()
        results.append([p.detach().cpu() for p in parameters])
    assert_equal(results[1], results[0])


@pytest.mark.parametrize("in_blocks", [False, True])
def test_hoisted_modulations(in_blocks: bool) -> None:
    torch.manual_seed(0)
    embedder = nn.Linear(8, 1024).requires_grad_(False).to(CARD)
    blocks = [nn.ModuleDict({"linear": nn.Linear(1024, 4096)}).requires_grad_(False) for _ in range(8)]

    def run(x: Tensor) -> list[Tensor]:
        embedding = embedder(x)
        y = torch.nn.functional.silu(embedding)
        return [block(y) for block in blocks]

    for block in blocks:
        block.forward = block["linear"].forward  # type: ignore[method-assign]
        block.to(CARD)
    xs = [torch.randn(4, 8, device=CARD) for _ in range(3)]
    expected = [run(x) for x in xs]
    for block in blocks:
        block.forward = lambda y, b=block: b["linear"](y)  # type: ignore[method-assign]
    linears = [block["linear"] for block in blocks]
    hoisting = PoisonedHoisting(embedder, linears, CARD, blocks=blocks if in_blocks else ())  # type: ignore[arg-type]
    hoisting.install()
    for x, wanted in zip(xs, expected):
        assert_equal(run(x), wanted)
