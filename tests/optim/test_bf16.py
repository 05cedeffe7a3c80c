# SPDX-License-Identifier: Apache-2.0
"""bf16 weights that lose no update: rounding, remainder, and every kind of optimizer through them."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import Tensor, nn

from library.exchange import Rows
from library.optim.bf16 import Bf16Optimizer, build_bf16, join, round_stochastic, split
from library.optim.flat import FlatParameters
from library.optim.in_backward import only
from library.optim.optimizers import OPTIMIZERS, choose_optimizer
from library.optim.options import OptimizerOptions
from library.rng import torch_generator

FLOAT32 = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, 1.001, -3.14159, 1e-3, 6.1e-39, -1e-45, 3.3895314e38, 3.4028235e38, 65504.0, -(2.0**-126)]
)
INSTALLED = [name for name, row in OPTIMIZERS.items() if importlib.util.find_spec(row.path.partition(".")[0])]
BY_WEIGHT = [name for name in INSTALLED if OPTIMIZERS[name].by_weight]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.001, -1.001, 0.3, -2.7e-5, 123456.7, 6.1e-39, -9.2e-41])
def test_stochastic_rounding_is_unbiased(value):
    x = torch.full((200_000,), value)
    rounded = round_stochastic(x, generator()).double()
    low, high = rounded.min().item(), rounded.max().item()
    step = high - low  # the two neighbours, and nothing else
    assert sorted(rounded.unique().tolist()) == [low, high]
    exact = x[0].double().item()
    assert low < exact < high
    # the mean of n draws of two values `step` apart has a deviation of at most step / 2 / sqrt(n) = 0.0012 steps
    assert abs(rounded.mean().item() - exact) < 0.005 * step


def test_shards_round_as_a_whole_weight_does():
    whole = torch.randn(7, 33, generator=generator())
    expected, start = round_stochastic(whole, generator(5)), 0
    for shard in whole.split(3):
        found = round_stochastic(shard, generator(5), Rows(start, 7))
        assert torch.equal(found, expected[start : start + len(shard)])
        start += len(shard)


def test_stochastic_rounding_leaves_bf16_numbers_alone():
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    exact = exact[exact.isfinite()]
    for seed in range(3):
        assert torch.equal(round_stochastic(exact.float(), generator(seed)).view(torch.int16), exact.view(torch.int16))


def test_numbers_that_are_none_stay():
    patterns = torch.tensor([0x7F800000, -0x800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32)
    odd = patterns.view(torch.float32)  # inf, -inf, and four kinds of nan
    for rounded in (round_stochastic(odd.repeat(100), generator()).view(100, 6), split(odd)[0].expand(100, 6)):
        assert torch.all(rounded[:, 0] == math.inf) and torch.all(rounded[:, 1] == -math.inf)
        assert torch.all(rounded[:, 2:].isnan())


def test_two_parts_are_exactly_the_float32_number():
    everywhere = torch.randint(-(2**31), 2**31 - 1, (300_000,), generator=generator(), dtype=torch.int64)
    x = torch.cat([everywhere.to(torch.int32).view(torch.float32), FLOAT32])
    x = x[x.isfinite()]
    high, low = split(x)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join(high, low).view(torch.int32), x.view(torch.int32))
    normal = (x.abs() > 1e-37) & high.isfinite()  # what is nearer to the next power of 2 than to the largest is inf
    assert torch.all((high.float() - x).abs()[normal] <= x.abs()[normal] * 2**-8)  # the nearest one, not a cut


# ---- a small regression ---------------------------------------------------------------------------------------------


class Regression:
    """Two layers that learn a line of a made-up teacher, with gradients in the dtype of the weights."""

    def __init__(self, name: str, dtype: torch.dtype, rounding: str, rate: float, *, chunk: int = 1 << 24) -> None:
        draw = generator(1)
        self.x, teacher = torch.randn(64, 8, generator=draw), torch.randn(8, 4, generator=draw)
        self.y = self.x @ teacher
        hidden = 640 if "8bit" in name else 16  # bitsandbytes keeps states of fewer than 4096 numbers in float32
        shapes = ((hidden, 8), (4, hidden), (4,))
        start = [torch.randn(shape, generator=draw) / (hidden / 16) ** 0.5 for shape in shapes]
        self.params = [nn.Parameter(value.bfloat16().to(dtype)) for value in start]  # the same start in each dtype
        self.groups = [{"params": self.params[:1], "lr": rate, "name": "in"},
                       {"params": self.params[1:], "lr": rate, "name": "out"}]  # fmt: skip
        arguments = ("relative_step=False", "scale_parameter=False") if name == "Adafactor" else None
        self.choice = choose_optimizer(
            OptimizerOptions(optimizer_type=name, learning_rate=rate, optimizer_args=arguments)
        )
        self.built = build_bf16(self.choice, self.groups, rounding, seed=7, chunk=chunk)

    def loss(self) -> Tensor:
        first, second, bias = (p.float() for p in self.params)
        return (torch.tanh(self.x @ first.T) @ second.T + bias - self.y).square().mean()

    def step(self) -> float:
        loss = self.loss()
        self.built.optimizer.zero_grad()
        loss.backward()
        self.built.optimizer.step()
        return loss.item()

    def run(self, steps: int) -> list[float]:
        return [self.step() for _ in range(steps)]


# a rate whose updates are below half a bf16 digit of most weights, but which learns in float32
RATES = {"AdamW": 1e-3, "SGDNesterov": 2e-4, "Lion": 1e-3, "Adafactor": 1e-3, "AdamW8bit": 1e-4}


@pytest.mark.parametrize("name", [name for name in RATES if name in INSTALLED])
def test_tracks_float32_where_plain_bf16_does_not(name):
    runs = {
        "float32": Regression(name, torch.float32, "plain", RATES[name]).run(200),
        **{kind: Regression(name, torch.bfloat16, kind, RATES[name]).run(200) for kind in ("stochastic", "kahan")},
        "plain": Regression(name, torch.bfloat16, "plain", RATES[name]).run(200),
    }
    learned = runs["float32"][0] - runs["float32"][-1]
    assert learned > 0.2 * runs["float32"][0]
    off = {kind: max(abs(a - b) for a, b in zip(losses, runs["float32"])) / learned for kind, losses in runs.items()}
    assert off["kahan"] < 0.03, off  # the passes see rounded weights in each kind
    assert off["stochastic"] < 0.05, off
    assert off["plain"] > 3 * off["stochastic"] and off["plain"] > 0.1, off


def test_kept_remainder_is_exactly_float32_training():
    """With equal gradients the pair of parts is the float32 weight, bit for bit."""
    draw = generator(3)
    start = torch.randn(40, 40, generator=draw).bfloat16()
    half, full = nn.Parameter(start.clone()), nn.Parameter(start.float())
    choice = choose_optimizer(OptimizerOptions(optimizer_type="AdamW", learning_rate=1e-5))
    one = build_bf16(choice, [{"params": [half], "lr": 1e-5}], "kahan", seed=0)
    two = choice.build([{"params": [full], "lr": 1e-5}])
    for _ in range(50):
        gradient = torch.randn(40, 40, generator=draw).bfloat16()
        half.grad, full.grad = gradient, gradient.float()
        one.optimizer.step()
        two.optimizer.step()
    assert isinstance(one.optimizer, Bf16Optimizer)
    rest = one.optimizer.weights[0][0].rest
    assert rest is not None
    assert torch.equal(join(half.detach(), rest), full.detach())
    assert not torch.equal(full.detach(), start.float())


def test_draws_are_those_of_seed_step_and_number():
    """Literal formula, with the weights stepped one by one and in another order in each step."""
    start = [torch.randn(30, generator=generator(n)).bfloat16() for n in range(3)]
    params = [nn.Parameter(value.clone()) for value in start]
    groups = [{"params": params[:2], "lr": 1e-3}, {"params": params[2:], "lr": 1e-2}]
    choice = choose_optimizer(OptimizerOptions(optimizer_type="SGD", learning_rate=1e-3))
    optimizer = build_bf16(choice, groups, "stochastic", seed=7).optimizer
    places = {0: (0, 1e-3), 1: (0, 1e-3), 2: (1, 1e-2)}
    for step, order in enumerate(([0, 1, 2], [2, 0, 1], [1, 2, 0])):
        for n in order:
            params[n].grad = torch.full((30,), n + 1.0).bfloat16()
            with only(optimizer, {places[n][0]: [params[n]]}):
                optimizer.step()
        for n, p in enumerate(params):
            exact = torch.add(start[n].float(), torch.full((30,), n + 1.0), alpha=-places[n][1])
            start[n] = round_stochastic(exact, torch_generator(7, "bf16 update", step, n))
            assert torch.equal(p, start[n])
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("name", BY_WEIGHT)
def test_size_of_chunks_changes_nothing(name, rounding):
    runs = [Regression(name, torch.bfloat16, rounding, 1e-3, chunk=chunk) for chunk in (1, 70, 1 << 24)]
    losses = [run.run(5) for run in runs]
    assert losses[0] == losses[1] == losses[2]
    for p, q in zip(runs[0].params, runs[2].params):
        assert torch.equal(p, q)
    assert [len(list(run.built.optimizer._chunks())) for run in runs] == [3, 3 if "8bit" in name else 2, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("name", INSTALLED)
def test_resumes_exactly(name, rounding, tmp_path):
    rate = 1.0 if OPTIMIZERS[name].finds_rate else 1e-3
    straight, first, second = (Regression(name, torch.bfloat16, rounding, rate) for _ in range(3))
    expected = straight.run(8)
    losses = first.run(4)
    first.built.eval_mode()  # a state is taken after a save, where schedule-free weights are those to look at
    torch.save(first.built.state_dict(), tmp_path / "state.pt")
    first.built.train_mode()
    for p, q in zip(second.params, first.params):
        p.data.copy_(q)
    second.built.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    assert losses + second.run(4) == expected
    for p, q in zip(second.params, straight.params):
        assert torch.equal(p, q)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("name", [n for n in INSTALLED if OPTIMIZERS[n].schedule_free])
def test_looking_at_averaged_weights_changes_nothing(name, rounding):
    rate = 3e3 if OPTIMIZERS[name].finds_rate else 1e-2  # it begins with a millionth of the rate
    looked, straight = (Regression(name, torch.bfloat16, rounding, rate) for _ in range(2))
    for _ in range(12):
        assert looked.step() == straight.step()
        looked.built.eval_mode()
        looked.built.train_mode()
    looked.built.eval_mode()
    assert not torch.equal(looked.params[0], straight.params[0])  # there is something to look at


def test_another_rounding_is_another_state():
    state = Regression("AdamW", torch.bfloat16, "kahan", 1e-3).built.state_dict()
    with pytest.raises(ValueError, match="--bf16_update"):
        Regression("AdamW", torch.bfloat16, "stochastic", 1e-3).built.load_state_dict(state)


# ---- as part of the program -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_only_the_chunk_in_use_has_float32_memory(rounding):
    run = Regression("AdamW", torch.bfloat16, rounding, 1e-3, chunk=1)
    seen = []
    inner = run.built.optimizer.inner  # type: ignore[attr-defined]
    step = inner.step

    def watched() -> None:
        shadows = [weight.shadow for own in run.built.optimizer.weights for weight in own]  # type: ignore[attr-defined]
        seen.append(sum(s.untyped_storage().nbytes() for s in shadows if s.grad is not None))
        step()

    inner.step = watched
    run.step()
    assert seen == [4 * 16 * 8, 4 * 4 * 16, 4 * 4]
    assert all(p.dtype == torch.bfloat16 and p.grad.dtype == torch.bfloat16 for p in run.params)
    assert all(v.dtype == torch.float32 for s in run.built.optimizer.state.values() for v in s.values())


def test_works_behind_accelerate_and_a_schedule():
    from accelerate import Accelerator

    run, plain = (
        Regression("AdamW", torch.bfloat16, "stochastic", 1e-2),
        Regression("AdamW", torch.bfloat16, "stochastic", 1e-2),
    )
    optimizer = Accelerator(cpu=True).prepare(run.built.optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(run.built.optimizer, lambda step: 0.5**step)
    for index in range(3):
        for group in plain.built.optimizer.param_groups:
            group["lr"] = 1e-2 * 0.5**index
        plain.step()
        optimizer.zero_grad()
        run.loss().backward()
        optimizer.step()
        schedule.step()
    for p, q in zip(run.params, plain.params):
        assert torch.equal(p, q)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_flat_buffers_are_weights_too(rounding):
    run = Regression("AdamW", torch.bfloat16, rounding, 1e-3)
    flat = FlatParameters(run.groups)
    run.built = build_bf16(run.choice, flat.param_groups, rounding, seed=7)
    losses = []
    for _ in range(100):
        flat.zero_grad()
        loss = run.loss()
        loss.backward()
        run.built.optimizer.step()
        losses.append(loss.item())
    full = Regression("AdamW", torch.float32, "plain", 1e-3).run(100)
    assert max(abs(a - b) for a, b in zip(losses, full)) < 0.05 * (full[0] - full[-1])


def test_a_weight_without_gradient_stays():
    run = Regression("AdamW", torch.bfloat16, "stochastic", 1e-2)
    before = run.params[2].clone()
    run.loss().backward()
    run.params[2].grad = None
    run.built.optimizer.step()
    assert torch.equal(run.params[2], before)
