# SPDX-License-Identifier: Apache-2.0
"""What every optimizer of the table has to do: fall on a toy, and continue bit-exactly from its saved state."""

from __future__ import annotations

import importlib.util
import io

import pytest
import torch

from library.optim.optimizers import OPTIMIZERS, choose_optimizer
from library.optim.options import OptimizerOptions

INSTALLED = [name for name, row in OPTIMIZERS.items() if importlib.util.find_spec(row.path.partition(".")[0])]
GENERATOR_SEED = 7
RATES = {"SGDNesterov": 0.02, "SGDNesterov8bit": 0.02, "SGDScheduleFree": 0.3, "RAdamScheduleFree": 0.1}

STEPS = {"DAdaptAdaGrad": 360, "Adafactor": 260, "Muon": 320}  # the slow starters


def rate(name):
    """A learning rate with which the toy converges: about 1 for those that find their own."""
    return 1.0 if OPTIMIZERS[name].finds_rate else RATES.get(name, 1e-2)


class Toy:
    """Least squares: two groups of weights (one large enough for 8-bit states), a batch per step."""

    def __init__(self, name, dtype=torch.float32):
        generator = torch.Generator().manual_seed(GENERATOR_SEED)
        self.target = torch.randn(96, 64, generator=generator)
        self.weight = torch.nn.Parameter((0.3 * torch.randn(96, 64, generator=generator)).to(dtype))
        self.bias = torch.nn.Parameter(torch.full((96,), 0.5, dtype=dtype))
        choice = choose_optimizer(OptimizerOptions(optimizer_type=name, learning_rate=rate(name)))
        groups = [{"params": [self.weight], "lr": rate(name)}, {"params": [self.bias], "lr": rate(name)}]
        self.built = choice.build(groups)

    def loss(self, step):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
        error = x @ (self.weight.float() - self.target).T + self.bias.float()
        return error.square().mean()

    def train(self, first, last):
        for step in range(first, last):
            self.built.optimizer.zero_grad(set_to_none=True)
            self.loss(step).backward()
            self.built.optimizer.step()

    def tensors(self):
        return [self.weight.detach().clone(), self.bias.detach().clone()]


def saved_and_read(state):
    """As a file: what is not saved cannot be continued from. weights_only refuses what is no plain data."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", INSTALLED)
def test_falls(name):
    toy = Toy(name)
    start = toy.loss(0).item()
    toy.train(0, STEPS.get(name, 160))
    toy.built.eval_mode()
    assert toy.loss(0).item() < 0.5 * start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", INSTALLED)
def test_continues_exactly(name, dtype):
    first = Toy(name, dtype)
    first.train(0, 5)
    weights, state = saved_and_read([first.tensors(), first.built.state_dict()])
    second = Toy(name, dtype)
    with torch.no_grad():
        second.weight.copy_(weights[0])
        second.bias.copy_(weights[1])
    second.built.load_state_dict(state)
    first.train(5, 9)
    second.train(5, 9)
    for one, two in zip(first.tensors(), second.tensors(), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.tensors()[0], weights[0])
    # and once more: a resumed run is resumed
    for key, value in flat(first.built.state_dict()).items():
        other = flat(second.built.state_dict())[key]
        same = torch.equal(value, other) and value.dtype == other.dtype if torch.is_tensor(value) else value == other
        assert same, key


def flat(value, prefix=""):
    """Nested state as {path: leaf}."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{prefix}/{i}").items()}
    return {prefix: value}


@pytest.mark.parametrize("name", [n for n in INSTALLED if OPTIMIZERS[n].schedule_free])
def test_schedule_free_modes_swap_the_weights_and_back(name):
    toy = Toy(name)
    toy.train(0, 12)
    training = toy.tensors()
    toy.built.eval_mode()
    assert not torch.equal(toy.tensors()[0], training[0])
    toy.built.eval_mode()
    toy.built.train_mode()
    assert all(torch.equal(now, old) for now, old in zip(toy.tensors(), training, strict=True))
    toy.train(12, 14)


@pytest.mark.parametrize("name", [n for n in INSTALLED if OPTIMIZERS[n].schedule_free])
def test_a_state_saved_in_eval_mode_continues_exactly(name):
    never_stopped, stopped, resumed = Toy(name), Toy(name), Toy(name)
    never_stopped.train(0, 20)
    stopped.train(0, 12)
    stopped.built.eval_mode()
    weights, state = saved_and_read([stopped.tensors(), stopped.built.state_dict()])
    with torch.no_grad():
        resumed.weight.copy_(weights[0])
        resumed.bias.copy_(weights[1])
    resumed.built.load_state_dict(state)
    resumed.train(12, 20)
    stopped.built.train_mode()
    stopped.train(12, 20)
    for want, one, two in zip(never_stopped.tensors(), stopped.tensors(), resumed.tensors(), strict=True):
        assert torch.equal(want, one)
        assert torch.equal(want, two)
