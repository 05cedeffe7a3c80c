# SPDX-License-Identifier: Apache-2.0
"""ParkedStorage activations come back as they were, once per storage, one ahead, and nothing is left of them."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from library.memory.block_swap import BlockSwap
from library.memory.checkpointing import Recomputation
from library.memory.host_image import is_placeholder
from library.memory.offload import Offload, PackedView, ParkedStorage

CPU = torch.device("cpu")
WIDTH, ROWS = 16, 8
BYTES = 4 * WIDTH * ROWS


class Block(nn.Module):
    """Takes and gives two pieces of one storage, as single blocks of FLUX do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, text: Tensor, picture: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([text, picture], 0)
        x = x + time * self.second(nn.functional.dropout(self.first(x).tanh(), 0.3))
        return x[:2], x[2:]


def make_blocks(budget: float = 0.0) -> nn.ModuleList:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(5))
    Recomputation(blocks).set_budget(budget)
    return blocks


def step(blocks: nn.ModuleList, offload: Offload | None) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    time = torch.randn(ROWS, WIDTH, requires_grad=True)
    text, picture = torch.randn(2, WIDTH), torch.randn(ROWS - 2, WIDTH)

    def forward() -> Tensor:
        a, b = text, picture
        for block in blocks:
            a, b = block(a, b, time)
        return a.square().sum() + b.square().sum()

    if offload is None:
        loss = forward()
    else:
        with offload.forward():
            loss = forward()
    return loss.detach(), list(torch.autograd.grad(loss, [time, *blocks.parameters()]))


def alive() -> list[ParkedStorage]:
    return [thing for thing in gc.get_objects() if type(thing) is ParkedStorage]


@pytest.mark.parametrize("budget", [0, 0.5, 1])
def test_exact_and_nothing_is_left(budget: float) -> None:
    blocks = make_blocks(budget)
    loss, gradients = step(blocks, None)
    offload = Offload(CPU, blocks.parameters(), smallest=BYTES)
    made = []
    for _ in range(3):
        found, same = step(blocks, offload)
        assert torch.equal(found, loss)
        assert all(torch.equal(a, b) for a, b in zip(same, gradients, strict=True))
        made.append(offload.pool.made)
        assert not alive() and not offload._storages
        assert sum(buffer.numel() for buffer in offload.pool.free) == offload.pool.made  # all of it has come back
    assert 0 < made[0] == made[1] == made[2]


def test_only_the_inputs_of_recomputed_blocks_and_each_storage_once() -> None:
    blocks = make_blocks()
    offload = Offload(CPU, blocks.parameters(), smallest=BYTES)
    step(blocks, offload)
    # the time once; text and picture are one storage from the second block on; before it both are too small
    assert offload.pool.made == 5 * BYTES + BYTES  # ... and what the sum of squares keeps


def test_small_tensors_and_weights_stay() -> None:
    offload = Offload(CPU, smallest=BYTES)
    weight, small = torch.randn(64, 64), torch.randn(4)
    offload.staying.add(weight.untyped_storage().data_ptr())
    with offload.forward():
        assert isinstance(offload.pack(weight), Tensor) and isinstance(offload.pack(weight.t()[:3]), Tensor)
        assert isinstance(offload.pack(small), Tensor)
        assert isinstance(offload.pack(torch.randn(64, 64)), PackedView)


def test_weights_that_have_moved_stay_when_that_is_said() -> None:
    """Blocks that come back from being swapped lie elsewhere; what leaves the card gives its address to others."""
    blocks = make_blocks().requires_grad_(False)
    swap = BlockSwap(blocks, [0, 2], CPU)
    swap.install()
    offload = Offload(CPU, blocks.parameters(), smallest=1)
    swap.change([1, 2, 3])
    with offload.forward():
        assert isinstance(offload.pack(blocks[0].first.weight), PackedView)
        offload.keep(blocks.parameters())
        assert isinstance(offload.pack(blocks[0].first.weight), Tensor)
    left = blocks[1].first.weight
    assert is_placeholder(left) and len(offload.staying) < len([*blocks.parameters()])
    swap.remove()


def test_strides_and_what_was_written_between() -> None:
    offload, x = Offload(CPU, smallest=1), torch.randn(6, 4, dtype=torch.float64)
    with offload.forward():
        first = offload.pack(x[1:5].t())
        expected = x[1:5].t().clone()
        x.mul_(2)
        second = offload.pack(x[::2, 1])
    assert isinstance(first, PackedView) and isinstance(second, PackedView) and first.parked is not second.parked
    assert torch.equal(first.tensor(), expected) and first.tensor().stride() == (1, 4)
    assert torch.equal(second.tensor(), x[::2, 1])


def test_an_address_that_is_used_again_is_another_tensor() -> None:
    offload = Offload(CPU, smallest=1)
    with offload.forward():
        places = [offload.pack(torch.full((1024,), float(i))) for i in range(20)]
    for i, place in enumerate(places):
        assert isinstance(place, PackedView) and torch.equal(place.tensor(), torch.full((1024,), float(i)))


def test_the_newest_is_still_there_and_the_one_before_is_fetched_ahead() -> None:
    offload = Offload(CPU, smallest=1)
    with offload.forward():
        places = [offload.pack(torch.full((16,), float(i))) for i in range(4)]
    parked = [place.parked for place in places if isinstance(place, PackedView)]
    assert [p.there is not None for p in parked] == [False, False, False, True]
    places[3].tensor()  # type: ignore[union-attr]
    assert [p.there is not None for p in parked] == [False, False, True, True]
    places[2].tensor()  # type: ignore[union-attr]
    assert [p.there is not None for p in parked] == [False, True, True, True]


def test_two_predictions_before_their_backward_passes() -> None:
    blocks = make_blocks()
    plain = step(blocks, None)
    offload = Offload(CPU, blocks.parameters(), smallest=BYTES)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with offload.forward():
        kept = (x * 3).tanh().square().sum()
    assert torch.equal(step(blocks, offload)[0], plain[0])
    (found,) = torch.autograd.grad(kept, [x])
    y = (x * 3).tanh()
    torch.testing.assert_close(found, 6 * y * (1 - y * y))
