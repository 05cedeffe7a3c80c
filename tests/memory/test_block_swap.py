# SPDX-License-Identifier: Apache-2.0
"""Swapped equals not swapped, to the bit, with every slot poisoned wherever nothing should be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.memory.block_swap import BlockSwap, spread
from library.memory.host_image import NOTHING, HostImage, is_placeholder, tensors_of
from library.memory.ring import CopyQueue, Ring, RingSlot
from tests.memory.swap_models import MODELS, Sample, recompute, stack

CPU = torch.device("cpu")


class PoisonedRing(Ring):
    """Every byte of a slot is NaN until something is copied into it. Writes down the order of copies."""

    def __init__(self, *args: object) -> None:
        self.order: list[int] = []
        super().__init__(*args)  # type: ignore[arg-type]

    def emptied(self, slot: RingSlot) -> None:
        slot.memory.fill_(NOTHING)

    def _load(self, index: int, slot: RingSlot) -> None:
        self.order.append(index)
        super()._load(index, slot)


class PoisonedSwap(BlockSwap):
    ring_class = PoisonedRing

    @property
    def order(self) -> list[int]:
        assert isinstance(self.ring, PoisonedRing)
        return self.ring.order


def attach_lora(sample: Sample) -> list[nn.Parameter]:
    """A low-rank change on every Linear inside blocks, through forward hooks, as adapters do it."""
    torch.manual_seed(1)
    found: list[nn.Parameter] = []
    for block in sample.blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                down = nn.Parameter(torch.randn(2, module.in_features) / 4)
                up = nn.Parameter(torch.randn(module.out_features, 2) / 4)
                module.register_forward_hook(lambda _, args, y, d=down, u=up: y + args[0] @ d.t() @ u.t())
                found += [down, up]
    return found


def gradients(sample: Sample, parameters: Sequence[nn.Parameter], passes: int = 2) -> list[Tensor]:
    """The losses of so many accumulated passes, and all gradients after the last."""
    losses = []
    for seed in range(passes):
        loss = sample.loss(seed)
        loss.backward()
        losses.append(loss.detach())
    found = [p.grad.clone() if p.grad is not None else torch.zeros(()) for p in parameters]
    for p in parameters:
        p.grad = None
    return [*losses, *found]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    wrong = [i for i, (one, other) in enumerate(zip(found, expected)) if not torch.equal(one, other)]
    assert not wrong, f"{len(wrong)} of {len(found)} differ, the first is number {wrong[0]}"


# ---- equal to the bit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_losses_and_gradients_are_those_of_the_whole_model(name: str, method: str, recomputed: bool) -> None:
    """For 1 ... all blocks and with two and three slots; gradients are accumulated over two passes."""
    sample = MODELS[name]()
    parameters = attach_lora(sample) if method == "lora" else [*sample.denoiser.requires_grad_().parameters()]
    if recomputed:
        for block in sample.blocks:
            recompute(block)
    expected = gradients(sample, parameters)
    assert sum(int(value.count_nonzero()) > 0 for value in expected) > 10
    with torch.no_grad():
        validation = sample.loss(7)
    weights = {name: value.clone() for name, value in sample.denoiser.state_dict().items()}
    total = len(sample.blocks)
    for count in range(1, total + 1) if total < 6 else (1, total // 2, total):
        swap = PoisonedSwap(sample.blocks, spread(total, count), CPU, slots=2 + count % 2)
        swap.install()
        assert_equal(gradients(sample, parameters), expected)
        with torch.no_grad():
            assert torch.equal(sample.loss(7), validation)
        with torch.inference_mode():
            assert torch.equal(sample.loss(7), validation)
        swap.home()
        assert all(torch.equal(value, weights[name]) for name, value in sample.denoiser.state_dict().items())
        assert_equal(gradients(sample, parameters), expected)
        assert swap.ring.copies_home == 0
        swap.remove()
    assert_equal(gradients(sample, parameters), expected)


def test_half_and_autocast() -> None:
    sample = MODELS["flux"]()
    sample.denoiser.bfloat16()
    parameters = attach_lora(sample)

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(sample, parameters)

    expected = run()
    swap = PoisonedSwap(sample.blocks, range(len(sample.blocks)), CPU)
    swap.install()
    assert_equal(run(), expected)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_passes_between_forward_and_backward(recomputed: bool) -> None:
    """As for diff_output_preservation: the prediction of who comes next is wrong then, the result is not."""
    sample = stack()
    for block in sample.blocks if recomputed else ():
        recompute(block)
    parameters = [*sample.denoiser.requires_grad_().parameters()]
    sample.loss(0).backward()
    expected = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    swap = PoisonedSwap(sample.blocks, range(6), CPU)
    swap.install()
    first = sample.loss(0)
    with torch.no_grad():
        sample.loss(1)
    other = sample.loss(2)
    first.backward()
    assert_equal([p.grad for p in parameters], expected)
    other.backward()


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_at_home_between_forward_and_backward(recomputed: bool) -> None:
    """Afterwards every block comes back into another slot than the one that its weights were saved in."""
    sample = stack()
    parameters = attach_lora(sample)
    for block in sample.blocks if recomputed else ():
        recompute(block)
    expected = gradients(sample, parameters, passes=1)
    swap = PoisonedSwap(sample.blocks, range(6), CPU)
    swap.install()
    loss = sample.loss(0)
    before = {index: swap.ring.slot_of(index) for index in (4, 5)}
    swap.home()
    loss.backward()
    assert_equal([loss.detach(), *(p.grad for p in parameters)], expected)
    swap.reset()
    swap.ring.arrange([5, 4], lambda index: False)
    assert all(swap.ring.slot_of(index) is not slot for index, slot in before.items())


def test_blocks_in_any_order_and_more_than_once() -> None:
    sample = stack()
    order = (3, 0, 5, 5, 1, 3)

    def loss() -> list[Tensor]:
        x = torch.ones(2, 8).requires_grad_()
        y = x
        for index in order:
            y = sample.blocks[index](y)
        y.square().sum().backward()
        return [x.grad]

    expected = loss()
    swap = PoisonedSwap(sample.blocks, range(6), CPU)
    swap.install()
    assert_equal(loss(), expected)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_compiled_blocks(method: str, recomputed: bool) -> None:
    """Compiled graphs save views of weights. aot_eager: autograd as with inductor, without its code."""
    torch._dynamo.reset()
    sample = stack(4)
    parameters = attach_lora(sample) if method == "lora" else [*sample.denoiser.requires_grad_().parameters()]
    for block in sample.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager")  # type: ignore[method-assign]
        if recomputed:
            recompute(block)
    expected = gradients(sample, parameters)
    swap = PoisonedSwap(sample.blocks, range(4), CPU)
    swap.install()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_equal(gradients(sample, parameters), expected)


def test_blocks_that_are_compiled_while_they_are_swapped() -> None:
    torch._dynamo.reset()
    sample = stack(4)
    parameters = attach_lora(sample)
    expected = gradients(sample, parameters)
    swap = PoisonedSwap(sample.blocks, range(4), CPU)
    swap.install()
    for block in sample.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager")  # type: ignore[method-assign]
    for found, wanted in zip(gradients(sample, parameters), expected):
        torch.testing.assert_close(found, wanted)


# ---- transfers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_each_step_copies_what_it_must(count: int, slots: int) -> None:
    """Forward and backward each find as many blocks present as there are slots."""
    sample = stack()
    parameters = attach_lora(sample)
    swap = PoisonedSwap(sample.blocks, spread(6, count), CPU, slots=slots)
    swap.install()
    gradients(sample, parameters, passes=1)
    for _ in range(2):
        before = swap.ring.copies
        gradients(sample, parameters, passes=1)
        assert swap.ring.copies - before == 2 * max(0, count - slots)
    assert swap.ring.copies_home == 0
    assert swap.ring.nbytes == min(slots, count) * max(HostImage(tensors_of(block)).nbytes for block in swap.swapped)


def test_the_order_of_transfers() -> None:
    sample = stack(5)
    parameters = attach_lora(sample)
    swap = PoisonedSwap(sample.blocks, range(5), CPU)
    swap.install()
    gradients(sample, parameters, passes=2)
    assert swap.order == [0, 1, 2, 3, 4, 2, 1, 0, 2, 3, 4, 2, 1, 0]
    swap.order.clear()
    with torch.no_grad():
        sample.loss(0)
        sample.loss(0)
    assert swap.order == [2, 3, 4, 0, 1, 2, 3, 4, 0]


def test_blocks_without_a_backward_pass_are_not_sent_for() -> None:
    """Nothing learns before block 3: its backward pass is the last, and what follows is the next forward pass."""
    sample = stack(6)
    parameters = [*sample.blocks[3].requires_grad_().parameters()]
    swap = PoisonedSwap(sample.blocks, range(6), CPU)
    swap.install()
    gradients(sample, parameters, passes=1)
    assert swap.order == [0, 1, 2, 3, 4, 5, 3, 0]


class LateQueue(CopyQueue):
    """Copies that are as late as their order allows: when the computation, another way or the host waits for them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.told: list[Callable[[], Any]] = []
        self.done = 0

    def follow(self, *others: CopyQueue) -> None:
        for other in others:
            assert isinstance(other, LateQueue)
            self.told.append(partial(other.reach, other.mark()))

    def run(self, function: Callable[[], Any]) -> None:
        self.told.append(function)

    def mark(self) -> int:
        return len(self.told)

    def reach(self, mark: int) -> None:
        while self.done < mark:
            self.done += 1
            self.told[self.done - 1]()

    def finish(self) -> None:
        self.reach(self.mark())


class LateRing(PoisonedRing):
    new_queue = staticmethod(LateQueue)


class LateSwap(PoisonedSwap):
    ring_class = LateRing


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_copies_may_be_late(recomputed: bool, slots: int) -> None:
    """Nothing relies on a copy, in or out, that it does not wait for."""
    samples = [stack(), stack()]
    for sample in samples:
        sample.denoiser.requires_grad_()
        for block in sample.blocks if recomputed else ():
            recompute(block)
    expected = learn(samples[0], None, 3)
    swap = LateSwap(samples[1].blocks, range(6), CPU, slots=slots)
    swap.install()
    assert_equal(learn(samples[1], swap, 3), expected)


# ---- weights that learn ---------------------------------------------------------------------------------------------


def learn(
    sample: Sample, swap: BlockSwap | None, steps: int, *, accumulation: int = 1, looks: bool = False
) -> list[Tensor]:
    """Plain gradient descent in the backward pass; every second weight only when its block leaves, or at the end.

    looks: a pass without gradient comes between forward and backward.
    """
    parameters = [*sample.denoiser.parameters()]
    last = [False]

    @torch.no_grad()
    def update(chosen: Sequence[Tensor]) -> None:
        ready = [p for p in chosen if p.grad is not None and last[0]]
        for p in ready:
            p.sub_(p.grad, alpha=0.1)
            p.grad = None
        if swap is not None:
            swap.changed(ready)

    handles = [p.register_post_accumulate_grad_hook(lambda p: update([p])) for p in parameters[::2]]
    if swap is not None:
        swap.before_leaving = update
    for step in range(steps):
        for micro in range(accumulation):
            last[0] = micro == accumulation - 1
            loss = sample.loss(step * accumulation + micro)
            with torch.no_grad():
                sample.loss(98) if looks else None
            loss.backward()
        update(parameters)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        validation = sample.loss(99)
    if swap is not None:
        swap.home()
    return [validation, *(p.detach().clone() for p in parameters)]


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_updates_in_the_backward_pass_come_home(recomputed: bool, accumulation: int, slots: int) -> None:
    samples = [stack(), stack()]
    for sample in samples:
        sample.denoiser.requires_grad_()
        for block in sample.blocks if recomputed else ():
            recompute(block)
    expected = learn(samples[0], None, 3, accumulation=accumulation)
    swap = PoisonedSwap(samples[1].blocks, range(6), CPU, slots=slots)
    swap.install()
    assert_equal(learn(samples[1], swap, 3, accumulation=accumulation), expected)


def test_an_update_waits_for_the_whole_gradient() -> None:
    """Block 0 is there when the second backward pass begins and loses its slot at once: its gradient is half then."""
    samples = [stack(), stack()]
    for sample in samples:
        sample.denoiser.requires_grad_()
    expected = learn(samples[0], None, 3, accumulation=2)
    swap = PoisonedSwap(samples[1].blocks, range(6), CPU)
    swap.install()
    assert_equal(learn(samples[1], swap, 3, accumulation=2, looks=True), expected)


def test_only_updates_are_copied_home() -> None:
    sample = stack()
    parameters = [*sample.denoiser.requires_grad_().parameters()]
    swap = PoisonedSwap(sample.blocks, range(6), CPU)
    swap.install()
    gradients(sample, parameters, passes=2)
    with torch.no_grad():
        sample.loss(0)
    assert swap.ring.copies_home == 0
    learn(sample, swap, 1)
    assert swap.ring.copies_home == 6
    before = swap.ring.copies_home
    with torch.no_grad():
        sample.loss(0)
    swap.home()
    assert swap.ring.copies_home == before


def test_an_update_of_a_block_that_is_away_is_refused() -> None:
    sample = stack()
    sample.denoiser.requires_grad_()
    swap = PoisonedSwap(sample.blocks, range(6), CPU)
    swap.install()
    with torch.no_grad():
        sample.loss(0)
    away = next(block for block in sample.blocks if is_placeholder(block.inner.weight))
    with pytest.raises(RuntimeError, match="away"):
        swap.changed([away.inner.weight])
    swap.home()
    swap.changed([away.inner.weight])


def test_weights_written_at_home_are_used() -> None:
    sample, other = stack(), stack()
    swap = PoisonedSwap(sample.blocks, range(6), CPU)
    swap.install()
    sample.loss(0)
    swap.home()
    for one, two in zip(sample.denoiser.parameters(), other.denoiser.parameters()):
        one.data.mul_(0.5)
        two.data.mul_(0.5)
    assert torch.equal(sample.loss(1), other.loss(1))


# ---- tensors --------------------------------------------------------------------------------------------------------


def test_absent_weights_are_poison_without_memory() -> None:
    sample = stack()
    swap = PoisonedSwap(sample.blocks, range(6), CPU)
    swap.install()
    weights = [*sample.denoiser.parameters()]
    shapes = [(p.shape, p.dtype, p.device) for p in stack().denoiser.parameters()]
    assert [(p.shape, p.dtype, p.device) for p in weights] == shapes
    assert all(p.isnan().all() and is_placeholder(p) for p in weights)
    pointers = [p.data_ptr() for p in weights]
    sample.denoiser.to("cpu")
    assert [p.data_ptr() for p in weights] == pointers


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)


def test_an_image_holds_every_dtype_layout_and_size() -> None:
    module = nn.Module()
    for number, dtype in enumerate((*DTYPES, torch.int64, torch.bool)):
        values = torch.randint(0, 2, (3, 5 + number)).to(dtype)
        module.register_buffer(f"buffer{number}", values, persistent=bool(number % 2))
    module.register_buffer("empty", torch.zeros(0, 4))
    module.register_buffer("number", torch.tensor(3.5))
    module.weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    module.packed = nn.Parameter(torch.randint(0, 255, (7, 1), dtype=torch.uint8), requires_grad=False)
    module.again = module.weight
    expected = {name: value.clone() for name, value in module.named_buffers()} | {
        name: value.detach().clone() for name, value in module.named_parameters()
    }
    image = HostImage(tensors_of(module))
    assert image.slices[0].tensor is module.weight and image.learning_bytes == 256
    assert len({place.start for place in image.slices}) >= len(image.slices) - 1  # the empty one takes no room
    memory = torch.full((image.nbytes,), NOTHING, dtype=torch.uint8)
    memory.copy_(image.memory)
    for values in (image.at_home, image.views(memory)):
        image.point(image.placeholders(CPU))
        assert module.weight.isnan().all() and module.packed.eq(255).all() and module.buffer5.eq(-1).all()
        image.point(values)
        found = {**dict(module.named_buffers()), **dict(module.named_parameters())}
        assert all(torch.equal(found[name].float(), value.float()) for name, value in expected.items())
        starts = [value.data_ptr() - values[0].data_ptr() for value in values if value.numel()]
        assert all(start % 256 == 0 for start in starts)
        assert module.weight.is_contiguous(memory_format=torch.channels_last) and module.weight.grad_fn is None
    assert image.memory.data_ptr() % 4096 == 0


def test_blocks_without_weights() -> None:
    blocks = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Identity()]
    model, x = nn.Sequential(*blocks), torch.ones(2, 4).requires_grad_()
    expected = torch.autograd.grad(model(x).sum(), x)
    swap = PoisonedSwap(blocks, range(4), CPU)
    swap.install()
    for _ in range(2):
        assert_equal(torch.autograd.grad(model(x).sum(), x), expected)
    empty = PoisonedSwap(blocks[1::2], range(2), CPU)
    empty.install()
    assert empty.ring.nbytes == empty.ring.copies == 0


def test_what_blocks_share_stays() -> None:
    blocks = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)]
    blocks[2].bias = blocks[0].bias
    swap = PoisonedSwap(blocks, range(3), CPU, slots=2)
    swap.install()
    assert [is_placeholder(b.bias) for b in blocks] == [False, True, False]
    assert all(is_placeholder(b.weight) for b in blocks)


def test_blocks_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="no such blocks: \\[1\\]"):
        BlockSwap([nn.Linear(4, 4)], [1], CPU)


# ---- failures -------------------------------------------------------------------------------------------------------


class OutOfMemory(Exception):
    pass


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_a_failed_pass_leaves_no_trace(where: str, recomputed: bool) -> None:
    sample = stack()
    parameters = attach_lora(sample)
    for block in sample.blocks if recomputed else ():
        recompute(block)
    expected = gradients(sample, parameters)
    swap = PoisonedSwap(sample.blocks, range(6), CPU)
    swap.install()

    def fail(*_: object) -> None:
        raise OutOfMemory

    def fail_in_backward(module: nn.Module, args: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(fail)

    hook = fail if where == "forward" else fail_in_backward
    handle = sample.blocks[2].outer.register_forward_hook(hook)
    with pytest.raises(OutOfMemory):
        sample.loss(0).backward()
    handle.remove()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    for p in parameters:
        p.grad = None
    swap.reset()
    assert_equal(gradients(sample, parameters), expected)


# ---- other blocks ---------------------------------------------------------------------------------------------------

SETS = ([1, 4], [0, 2, 4, 5], [2], [0, 1, 2, 3, 4, 5], [], [3, 5])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_blocks_from_now_on(method: str) -> None:
    """Equal to the bit; images of blocks that stay are kept; updates in the backward pass come home in between."""
    samples = [stack(), stack()]
    for sample in samples:
        sample.denoiser.requires_grad_(method == "full")
    parameters = [attach_lora(sample) if method == "lora" else [] for sample in samples]
    swap = PoisonedSwap(samples[1].blocks, SETS[0], CPU)
    swap.install()
    for chosen in SETS[1:]:
        before = dict(swap._image_of)
        swap.change(chosen)
        kept = before.keys() & set(chosen)
        assert all(swap._image_of[index] is before[index] for index in kept)
        assert sorted(swap._image_of) == chosen
        if method == "lora":
            assert_equal(gradients(samples[1], parameters[1]), gradients(samples[0], parameters[0]))
        else:
            assert_equal(learn(samples[1], swap, 2), learn(samples[0], None, 2))
    swap.remove()
    weights = samples[0].denoiser.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in samples[1].denoiser.state_dict().items())


@pytest.mark.parametrize("where", ["image", "way back", "ring"])
def test_a_change_that_fails_halfway_can_be_done_again(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the second image, at the second block that comes back, or at the ring; no weight is lost."""
    sample = stack()
    parameters = attach_lora(sample)
    expected = gradients(sample, parameters)
    weights = {name: value.clone() for name, value in sample.denoiser.state_dict().items()}
    swap = PoisonedSwap(sample.blocks, [0, 2, 4], CPU)
    swap.install()
    gradients(sample, parameters)
    target, name, fails_at = {
        "image": (HostImage, "__init__", 2), "way back": (HostImage, "bring", 2), "ring": (PoisonedRing, "__init__", 1),
    }[where]  # fmt: skip
    real, calls = getattr(target, name), []

    def failing(*args: Any) -> None:
        calls.append(None)
        if len(calls) == fails_at:
            raise OutOfMemory
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, failing)
        with pytest.raises(OutOfMemory):
            swap.change([1, 3, 5])
    swap.reset()
    swap.home()
    assert all(torch.equal(value, weights[key]) for key, value in sample.denoiser.state_dict().items())
    swap.change([1, 2, 3, 4])
    assert_equal(gradients(sample, parameters), expected)
    assert sorted(swap._image_of) == [1, 2, 3, 4]


def test_main_memory_holds_one_image_more_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = stack()
    swap = PoisonedSwap(sample.blocks, [0, 2, 4], CPU)  # the small ones
    swap.install()
    held: list[int] = []
    send_away = swap._send_away
    monkeypatch.setattr(swap, "_send_away", lambda index: (send_away(index), held.append(len(swap._image_of)))[0])
    swap.change([1, 3, 5])
    assert max(held) == len(swap._image_of) == len(held) == 3


def test_spread() -> None:
    assert spread(6, 2) == [1, 4] and spread(5, 5) == [0, 1, 2, 3, 4] and spread(7, 0) == []
    for total in range(1, 60):
        for count in range(1, total + 1):
            found = spread(total, count)
            gaps = [b - a for a, b in pairwise(found)]
            assert len(found) == count and found[0] >= 0 and found[-1] < total
            assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)
