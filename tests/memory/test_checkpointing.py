# SPDX-License-Identifier: Apache-2.0
"""Recomputation changes no number, keeps the share that it was given, and can be asked for more later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.memory.checkpointing import Recomputation, recomputed_blocks

WIDTH = 8


class Block(nn.Module):
    """Two layers with dropout between them; counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return x + scale * self.second(nn.functional.dropout(self.first(x).tanh(), 0.5))


def make_blocks(count: int = 4) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Block() for _ in range(count))


def run(blocks: nn.ModuleList) -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradients, and bytes of activations that are kept between forward and backward."""
    parameters = {p.data_ptr() for p in blocks.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    x = torch.randn(64, WIDTH)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for block in blocks:
            x = block(x, scale=0.5)
        loss = x.square().mean()
    found = sum(kept.values())
    return loss.detach(), list(torch.autograd.grad(loss, list(blocks.parameters()))), found


@pytest.mark.parametrize("budget", [0, 0.5, 1])
def test_nothing_changes_but_memory(budget: float) -> None:
    plain, gradients, _ = run(make_blocks())
    blocks = make_blocks()
    again = Recomputation(blocks).set_budget(budget)
    loss, recomputed, _ = run(blocks)
    assert torch.equal(loss, plain)
    assert all(torch.equal(a, b) for a, b in zip(recomputed, gradients, strict=True))
    assert [block.calls for block in blocks] == [2 if index in again else 1 for index in range(4)]


def test_less_is_kept_with_a_smaller_budget_and_undo_brings_everything_back() -> None:
    blocks = make_blocks(8)
    recomputation, kept = Recomputation(blocks), {}
    for budget in (1, 0.5, 0):  # lowered between the steps of one run
        recomputation.set_budget(budget)
        kept[budget] = run(blocks)[2]
    half = (kept[1] - kept[0]) / 2
    assert kept[0] < 0.3 * kept[1]
    assert kept[0.5] - kept[0] == pytest.approx(half, rel=0.05)
    recomputation.forwards.undo()
    assert run(blocks)[2] == kept[1]
    assert all("forward" not in vars(block) for block in blocks)


def test_a_forward_that_was_replaced_before_stays() -> None:
    blocks = make_blocks(1)
    inner = blocks[0].forward

    def twice(x: Tensor, **more: Any) -> Tensor:
        return inner(inner(x, **more), **more)

    blocks[0].forward = twice
    recomputation = Recomputation(blocks)
    recomputation.set_budget(0)
    run(blocks)
    assert blocks[0].calls == 4
    recomputation.forwards.undo()
    assert blocks[0].forward is twice


def test_without_gradients_nothing_is_wrapped() -> None:
    blocks = make_blocks(1)
    Recomputation(blocks).set_budget(0)
    with torch.no_grad():
        assert blocks[0](torch.ones(1, WIDTH)).grad_fn is None
    assert blocks[0].calls == 1


@pytest.mark.parametrize(
    ("count", "budget", "expected"),
    [(4, 0, [0, 1, 2, 3]), (4, 1, []), (4, 0.5, [1, 3]), (8, 0.25, [0, 2, 3, 4, 6, 7]), (3, 0.1, [0, 1, 2])],
)
def test_which_blocks(count: int, budget: float, expected: list[int]) -> None:
    assert recomputed_blocks([1.0] * count, budget) == expected


def test_weights_count() -> None:
    weights = [float(i % 7 + 1) for i in range(57)]
    for budget in (0.1, 0.3, 0.5, 0.8):
        again = recomputed_blocks(weights, budget)
        kept = sum(weights) - sum(weights[i] for i in again)
        assert kept == pytest.approx(budget * sum(weights), abs=max(weights))
    with pytest.raises(ValueError, match="57 blocks have 2 weights"):
        Recomputation(make_blocks(57), [1.0, 2.0])
