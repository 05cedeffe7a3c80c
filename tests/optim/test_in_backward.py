# SPDX-License-Identifier: Apache-2.0
"""Steps during the backward pass: the plain step to the last bit, the clipping rule, and what is in memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.errors import UserError
from library.optim.bf16 import build_bf16
from library.optim.in_backward import InBackward, check_in_backward, only, units
from library.optim.optimizers import OPTIMIZERS, choose_optimizer
from library.optim.options import FullOptimizerOptions, OptimizerOptions
from tests.trainers.helpers import differing

BY_WEIGHT = [
    name for name, row in OPTIMIZERS.items() if row.by_weight and importlib.util.find_spec(row.path.partition(".")[0])
] + ["Adagrad", "RMSprop"]  # two of torch.optim that have no row
WAYS: dict[str, dict[str, Any]] = {
    "quick": {"fused_backward_pass": True},
    "blocks": {"blockwise_fused_optimizers": True},
    "groups": {"fused_optimizer_groups": 3},
}
WIDTH = 64  # bitsandbytes keeps states of fewer than 4096 numbers in float32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Model(nn.Module):
    """An embedder, three blocks, a head; and a weight that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(5))
        self.embed = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Training:
    """A model in two learning-rate groups, and its optimizer; with `way`, steps during the backward pass."""

    def __init__(
        self, name: str, *, way: dict[str, Any] | None = None, each: bool = False, max_norm: float = 0.0,
        update: str = "plain", changed: Callable[[Sequence[nn.Parameter]], None] | None = None,
    ) -> None:  # fmt: skip
        torch.manual_seed(1)
        self.model = Model().to(torch.float32 if update == "plain" else torch.bfloat16)
        rate = 1e-2
        arguments = ("relative_step=False", "scale_parameter=False") if name == "Adafactor" else None
        choice = choose_optimizer(OptimizerOptions(optimizer_type=name, learning_rate=rate, optimizer_args=arguments))
        outside = [self.model.unused, *self.model.embed.parameters(), *self.model.head.parameters()]
        groups = [{"params": outside, "lr": rate, "name": "outside"},
                  {"params": [*self.model.blocks.parameters()], "lr": rate / 3, "name": "blocks"}]  # fmt: skip
        self.built = build_bf16(choice, groups, update, seed=7, chunk=5000)
        parts = [[p] for p in self.model.parameters()] if each else None
        if way is not None:
            parts = units(self.built.optimizer.param_groups, self.model.blocks, FullOptimizerOptions(**way))
        self.in_backward = InBackward(self.built.optimizer, parts, max_norm, changed) if parts else None

    def loss(self, step: int, micro: int) -> Tensor:
        draw = torch.Generator().manual_seed(100 * step + micro)
        x, y = (torch.randn(8, 4, generator=draw) for _ in range(2))
        return (self.model(x.to(self.model.unused.dtype)).float() - y).square().mean()

    def step(self, step: int, micros: int = 1) -> Tensor:
        """One optimizer step; the gradient norm before clipping."""
        if step % 2:  # what a schedule does
            for group in self.built.optimizer.param_groups:
                group["lr"] *= 0.9
        for micro in range(micros):
            if self.in_backward:
                self.in_backward.last_micro_batch(micro == micros - 1)
            self.loss(step, micro).backward()
        if self.in_backward:
            return self.in_backward.finish()
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.built.optimizer.step()
        self.built.optimizer.zero_grad()
        return norm

    def run(self, steps: range, micros: int = 1) -> list[Tensor]:
        return [self.step(step, micros) for step in steps]


def assert_equal(one: Training, other: Training) -> None:
    """Weights and optimizer states, to the last bit."""
    assert differing(one.model.state_dict(), other.model.state_dict()) == []
    assert differing(one.built.state_dict(), other.built.state_dict()) == []


# ---- the plain step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_WEIGHT)
def test_equals_the_plain_step(name: str) -> None:
    for micros in (1, 3):
        plain = Training(name)
        norms = plain.run(range(4), micros)
        for fused in (Training(name, each=True), *(Training(name, way=way) for way in WAYS.values())):
            torch.testing.assert_close(fused.run(range(4), micros), norms)
            assert_equal(fused, plain)
            assert all(p.grad is None for p in fused.model.parameters())


@pytest.mark.parametrize("update", ["stochastic", "kahan"])
@pytest.mark.parametrize("name", ["AdamW", "Lion", "Adafactor"])
def test_bf16_weights_are_updated_in_any_order(name: str, update: str) -> None:
    if name not in BY_WEIGHT:
        pytest.skip(f"{name} is not installed")
    plain = Training(name, update=update)
    start = [p.clone() for p in plain.model.parameters()]
    plain.run(range(4), 2)
    ways = (Training(name, update=update, way=way) for way in WAYS.values())
    for fused in (Training(name, update=update, each=True), *ways):
        fused.run(range(4), 2)
        assert_equal(fused, plain)
    assert not any(torch.equal(p, q) for p, q in list(zip(plain.model.parameters(), start, strict=True))[1:])


@pytest.mark.parametrize("update", ["plain", "stochastic", "kahan"])
def test_runs_change_over(update: str) -> None:
    """A state of the plain step goes on in the backward pass, and the other way round."""
    straight = Training("AdamW", update=update)
    straight.run(range(4))
    for first, then in ((None, WAYS["quick"]), (WAYS["blocks"], None)):
        begun, resumed = Training("AdamW", way=first, update=update), Training("AdamW", way=then, update=update)
        begun.run(range(2))
        resumed.model.load_state_dict(begun.model.state_dict())
        resumed.built.load_state_dict(begun.built.state_dict())
        resumed.run(range(2, 4))
        assert_equal(resumed, straight)


def test_weights_that_stop_learning() -> None:
    """From a step on no gradient comes for them (--stop_text_encoder_training): they stay, and keep their count."""
    for update in ("plain", "stochastic"):
        plain, fused = (Training("AdamW", update=update, way=way) for way in (None, WAYS["quick"]))
        for run in (plain, fused):
            run.run(range(2))
            run.model.embed.requires_grad_(False)
        kept = fused.model.embed.weight.clone()
        for run in (plain, fused):
            run.run(range(2, 4))
        assert torch.equal(fused.model.embed.weight, kept)
        assert_equal(fused, plain)


# ---- clipping -------------------------------------------------------------------------------------------------------


def test_clips_each_gradient_by_its_own_norm() -> None:
    limit = 0.05
    plain, fused = Training("AdamW"), Training("AdamW", way=WAYS["blocks"], max_norm=limit)
    for step in range(3):
        for micro in range(2):
            plain.loss(step, micro).backward()
        squares = 0.0
        for p in plain.model.parameters():
            if p.grad is not None:
                norm = p.grad.square().sum().sqrt()
                squares += norm.item() ** 2
                p.grad *= min(1.0, limit / (norm.item() + 1e-6))
        for group in plain.built.optimizer.param_groups:
            group["lr"] *= 0.9 if step % 2 else 1.0
        plain.built.optimizer.step()
        plain.built.optimizer.zero_grad()
        assert fused.step(step, 2).item() == pytest.approx(squares**0.5, rel=1e-5)
        assert squares**0.5 > limit
        for p, q in zip(plain.model.parameters(), fused.model.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_the_norm_of_bf16_gradients_is_that_of_float32() -> None:
    run = Training("AdamW", update="stochastic", way=WAYS["quick"])
    run.loss(0, 0).backward()  # a pass before the last: gradients as usual
    want = sum(float(p.grad.double().square().sum()) for p in run.model.parameters() if p.grad is not None) ** 0.5
    for p in run.model.parameters():
        p.grad = None
    norm = run.step(0)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(want, rel=1e-5)


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_one_unit_at_a_time(way: str) -> None:
    alive: list[int] = []
    run = Training("AdamW", way=WAYS[way])
    assert run.in_backward is not None
    # the embedder's gradients come last and the head's first: they are one unit, which waits
    outside = {run.model.unused, *run.model.embed.parameters(), *run.model.head.parameters()}
    inside = [p for p in run.model.parameters() if p not in outside]
    for p in inside:
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad.numel() for q in inside if q.grad is not None))
        )
    run.run(range(2))
    sizes = [sum(p.numel() for p in unit if p not in outside) for unit in run.in_backward.units]
    assert len(alive) == 2 * len(inside)
    assert max(alive) <= max(sizes) < sum(p.numel() for p in inside) / 2


def test_units_of_each_option() -> None:
    model = Model()
    groups = [{"params": [*model.embed.parameters(), *model.blocks.parameters(), *model.head.parameters()]}]
    blocks = [list(block.parameters()) for block in model.blocks]
    outside = [*model.embed.parameters(), *model.head.parameters()]

    def found(**way: Any) -> list[list[nn.Parameter]]:
        return units(groups, model.blocks, FullOptimizerOptions(**way))

    def same(one: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]]) -> bool:
        return [[id(p) for p in unit] for unit in one] == [[id(p) for p in unit] for unit in other]

    assert same(found(blockwise_fused_optimizers=True), [outside, *blocks])
    assert same(found(fused_backward_pass=True), [outside, *blocks])  # small weights: a unit each would only cost time
    assert same(found(fused_optimizer_groups=1), [[*outside, *chain(*blocks)]])
    three = found(fused_optimizer_groups=3)
    assert same([[*chain(*three)]], [[*outside, *chain(*blocks)]])
    sizes = [sum(p.numel() for p in unit) for unit in three]
    assert len(sizes) == 3 and max(sizes) < 2 * min(sizes)
    assert len(found(fused_optimizer_groups=1000)) == len(groups[0]["params"])


def test_large_weights_are_units_of_their_own() -> None:
    weights = [nn.Parameter(torch.empty(n, device="meta")) for n in (1, 1 << 24, 3, (1 << 25) + 1, 5, 1 << 25, 6)]
    block = nn.ParameterList(weights)
    parts = units([{"params": weights}], [block], FullOptimizerOptions(fused_backward_pass=True))
    assert [len(part) for part in parts] == [3, 1, 1, 1, 1]


# ---- as part of the program -----------------------------------------------------------------------------------------


def test_tells_what_has_changed_and_steps_on_demand() -> None:
    told: list[Tensor] = []
    plain, fused = Training("AdamW"), Training("AdamW", way={"fused_optimizer_groups": 1}, changed=told.extend)
    assert fused.in_backward is not None
    second = fused.model.blocks[1]

    def leave(*_: Any) -> None:
        before = second.linear.weight.clone()
        fused.in_backward.step_now([*second.parameters()])  # type: ignore[union-attr]
        assert torch.equal(before, second.linear.weight) != fused.in_backward.started  # type: ignore[union-attr]

    fused.model.blocks[0].linear.weight.register_post_accumulate_grad_hook(leave)  # block 1 is done when 0 begins
    plain.step(0, 2)
    fused.step(0, 2)
    assert_equal(fused, plain)
    assert {id(p) for p in told[:4]} == {id(p) for p in second.parameters()}
    assert sorted(map(id, told)) == sorted(id(p) for p in fused.model.parameters())
    assert not fused.in_backward.started


def test_a_gradient_after_the_step_is_no_silent_mistake() -> None:
    run = Training("AdamW", way=WAYS["quick"])
    assert run.in_backward is not None
    run.in_backward.last_micro_batch(True)
    run.loss(0, 0).backward()
    with pytest.raises(RuntimeError, match="another gradient"):
        run.loss(0, 1).backward()


def test_removed() -> None:
    run = Training("AdamW", way=WAYS["quick"])
    assert run.in_backward is not None
    run.in_backward.last_micro_batch(True)
    run.in_backward.remove()
    run.loss(0, 0).backward()
    assert run.model.head.weight.grad is not None


def test_works_behind_a_schedule() -> None:
    """torch's schedules warn when no step came before them."""
    run = Training("AdamW", way=WAYS["quick"])
    schedule = torch.optim.lr_scheduler.LambdaLR(run.built.optimizer, lambda step: 0.5**step)
    run.step(0)
    schedule.step()
    assert [group["lr"] for group in run.built.optimizer.param_groups] == pytest.approx([5e-3, 5e-3 / 3])


def test_only_puts_everything_back() -> None:
    run = Training("AdamW")
    optimizer = run.built.optimizer
    before = [(id(group), [id(p) for p in group["params"]]) for group in optimizer.param_groups]
    with pytest.raises(RuntimeError, match="stop"), only(optimizer, {1: [run.model.blocks[0].linear.weight]}):
        assert [len(group["params"]) for group in optimizer.param_groups] == [1]
        raise RuntimeError("stop")
    assert [(id(group), [id(p) for p in group["params"]]) for group in optimizer.param_groups] == before


def test_each_weight_is_in_one_unit() -> None:
    run = Training("AdamW")
    weights = [*run.model.parameters()]
    for parts in ([weights[1:]], [weights, weights[:1]]):
        with pytest.raises(ValueError, match="one unit"):
            InBackward(run.built.optimizer, parts, 0.0)


# ---- options --------------------------------------------------------------------------------------------------------


def test_one_way_at_a_time() -> None:
    assert [FullOptimizerOptions(**way).in_backward for way in WAYS.values()] == [
        "--fused_backward_pass", "--blockwise_fused_optimizers", "--fused_optimizer_groups",
    ]  # fmt: skip
    assert FullOptimizerOptions().in_backward is None
    for way in WAYS.values():
        assert list(FullOptimizerOptions(**way).problems()) == []
    (problem,) = FullOptimizerOptions(fused_backward_pass=True, fused_optimizer_groups=4).problems()
    assert problem == (
        "--fused_backward_pass and --fused_optimizer_groups each say which weights are stepped together: "
        "give one of them"
    )


def test_what_cannot_be_is_refused() -> None:
    fine: dict[str, Any] = {"by_weight": True, "scaled": False, "processes": 1, "deepspeed": False}
    check_in_backward("--fused_backward_pass", "AdamW", **fine)
    wrong = {"by_weight": False, "scaled": True, "processes": 2, "deepspeed": True}
    words = {"by_weight": "Prodigy", "scaled": "fp16", "processes": "one process", "deepspeed": "--deepspeed"}
    for key, value in wrong.items():
        with pytest.raises(UserError, match=words[key]) as error:
            check_in_backward("--fused_backward_pass", "Prodigy", **{**fine, key: value})
        assert error.value.problems[0].startswith("--fused_backward_pass ") and len(error.value.problems) == 1
