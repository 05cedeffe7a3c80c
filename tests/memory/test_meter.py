# SPDX-License-Identifier: Apache-2.0
"""Living bytes, against sums written down by hand; fake tensors against real ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from library.memory.estimate import StepFigures
from library.memory.meter import Meter, bytes_of, watched
from library.memory.work import Work

FLOAT = 4  # bytes


def test_made_kept_and_freed() -> None:
    x = torch.ones(1000)
    meter = Meter()
    with meter:
        a = x + 1
        b = a[:10]  # a view has no memory of its own
        c = a.double()
        del a
        assert meter.live == 1000 * FLOAT + 1000 * 8  # b keeps what it looks at
        del b, c
    assert meter.live == 0
    assert meter.peak == 1000 * FLOAT + 1000 * 8


def test_what_was_there_counts_once() -> None:
    weight = torch.ones(10, 10)
    meter = Meter()
    assert meter.hold([weight, weight.T, weight[0]]) == 400
    with meter:
        product = weight.T @ weight
    assert meter.live == 800 and meter.by_tag["held"] == 400
    del weight, product
    assert meter.live == 0


def test_what_autograd_keeps_is_alive() -> None:
    layer, x = nn.Linear(100, 50, bias=False), torch.ones(30, 100)
    meter = Meter()
    meter.hold([layer.weight, x])
    before = meter.live
    with meter:
        loss = layer(x).relu().square().sum()
        # relu keeps its output, which square keeps as well; the product itself is gone
        assert meter.live - before == (30 * 50 + 1) * FLOAT
        loss.backward()
        del loss
        assert meter.live - before == bytes_of([layer.weight.grad])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(x)))


def passes() -> StepFigures:
    """Two blocks of width 32 over 64 rows."""
    blocks = [Block(32), Block(32)]
    x = torch.ones(64, 32)
    meter = Meter(counts_work=True)
    meter.hold([x, *(p for block in blocks for p in block.parameters())])
    with meter, watched(meter, blocks) as watch:
        loss = blocks[1](blocks[0](x)).square().mean()
        watch.forward_done()
        loss.backward()
        del loss
    return watch.figures()


def test_blocks_and_their_borders() -> None:
    found = passes()
    row = 64 * 32 * FLOAT
    # first's output and gelu's output, both four times as wide, and the block's own output
    assert [block.kept for block in found.blocks] == [2 * 4 * row + row] * 2
    (output,), (second_input,) = found.blocks[0].outputs, found.blocks[1].inputs
    assert output == second_input and found.stored[output].size == row and found.stored[output].block == 0
    order = [(s.phase, s.block) for s in found.segments if s.block is not None]
    assert order == [("forward", 0), ("forward", 1), ("backward", 1), ("backward", 0)]
    assert all(s.peak >= s.start for s in found.segments)
    assert found.kept >= 2 * (8 * row + row)


def test_products_are_counted() -> None:
    found = passes()
    product = 2 * 64 * 32 * 128
    assert [block.work.flops for block in found.blocks] == [2 * product] * 2
    # backward: weights of all four layers, and inputs of all but the first
    assert found.work.flops == 4 * product + (4 + 3) * product
    assert found.work.calls > 20 and found.work.moved > 0


def test_attention_is_counted() -> None:
    q = torch.ones(2, 4, 16, 8, requires_grad=True)
    meter = Meter(counts_work=True)
    with meter:
        out = F.scaled_dot_product_attention(q, q, q)
        forward = meter.work.flops
        out.sum().backward()
    assert forward == 2 * 2 * 2 * 4 * 16 * 16 * 8  # two products, a multiplication and an addition each
    assert meter.work.flops == 3 * forward


def test_fake_tensors_measure_the_same() -> None:
    real = passes()
    with FakeTensorMode():
        fake = passes()
    assert fake.segments == real.segments
    assert [block.kept for block in fake.blocks] == [block.kept for block in real.blocks]
    assert fake.work == real.work and isinstance(fake.work, Work)
