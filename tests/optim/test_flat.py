# SPDX-License-Identifier: Apache-2.0
"""Flat buffers give the very weights that separate tensors give."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from library.device import unscale_half_gradients
from library.optim.flat import FlatParameters, flatten
from library.optim.optimizers import OPTIMIZERS, choose_optimizer
from library.optim.options import OptimizerOptions

SHAPES = [(8, 3, 3, 3), (5, 7), (1,), (130,), (4, 4)]
ELEMENTWISE = [
    name for name, row in OPTIMIZERS.items() if row.elementwise and importlib.util.find_spec(row.path.partition(".")[0])
]


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def grouped(params):
    return [{"params": params[:3], "lr": 1e-2, "name": "text"}, {"params": params[3:], "lr": 3e-2, "name": "denoiser"}]


def backward(params, step):
    """Gradients through autograd, two micro-batches, so that accumulation into the views is part of the test."""
    for half in range(2):
        generator = torch.Generator().manual_seed(100 * step + half)
        sum((p * torch.randn(p.shape, generator=generator)).sum() + p.square().sum() for p in params).backward()


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_same_bits_as_separate_tensors(name):
    plain, joined = parameters(), parameters()
    flat = FlatParameters(grouped(joined))
    options = OptimizerOptions(optimizer_type=name, learning_rate=1e-2)
    one = choose_optimizer(options).build(grouped(plain))
    two = choose_optimizer(options).build(flat.param_groups)
    for step in range(6):
        one.optimizer.zero_grad(set_to_none=True)
        flat.zero_grad()
        backward(plain, step)
        backward(joined, step)
        one.optimizer.step()
        two.optimizer.step()
        for p, q in zip(plain, joined, strict=True):
            assert torch.equal(p.grad, q.grad)
            assert torch.equal(p, q)
    assert [len(g["params"]) for g in two.optimizer.param_groups] == [1, 1]


@pytest.mark.parametrize("name", ["AdamW", "Lion", "SGDNesterov"])
def test_what_never_had_a_gradient_stays(name):
    """As separate tensors, whose gradient is None then; and it learns as soon as it has one."""
    plain, joined = parameters(), parameters()
    flat = FlatParameters(grouped(joined))
    options = OptimizerOptions(optimizer_type=name, learning_rate=1e-2, optimizer_args=("weight_decay=0.5",))
    one = choose_optimizer(options).build(grouped(plain))
    two = choose_optimizer(options).build(flat.param_groups)
    unused = 1
    for step in range(4):
        one.optimizer.zero_grad(set_to_none=True)
        flat.zero_grad()
        for params in (plain, joined):
            backward([p for number, p in enumerate(params) if number != unused], step)
        one.optimizer.step()
        with flat.silent_kept(processes=1):
            two.optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(plain, joined, strict=True))
    assert torch.equal(joined[unused], parameters()[unused])
    flat.zero_grad()
    backward(joined, 9)
    with flat.silent_kept(processes=1):
        two.optimizer.step()
    assert not torch.equal(joined[unused], parameters()[unused])


def test_parameters_stay_views():
    params = parameters()
    before = [p.detach().clone() for p in params]
    group = flatten(params)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    with torch.no_grad():
        group.buffer.add_(1)
    assert all(torch.equal(p, old + 1) for p, old in zip(params, before, strict=True))
    assert all(start % 64 == 0 for start in group.offsets)


def test_gradients_that_were_there_are_kept():
    params = parameters()
    backward(params, 0)
    before = [p.grad.clone() for p in params]
    flatten(params)
    assert all(torch.equal(p.grad, old) for p, old in zip(params, before, strict=True))


def test_clip_is_that_of_torch():
    plain, joined = parameters(), parameters()
    flat = FlatParameters(grouped(joined))
    backward(plain, 1)
    backward(joined, 1)
    want = nn.utils.clip_grad_norm_(plain, 0.5)
    got = flat.clip_grad_norm(0.5)
    torch.testing.assert_close(got, want)
    for p, q in zip(plain, joined, strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    unchanged = [q.grad.clone() for q in joined]
    flat.clip_grad_norm(100.0)
    assert all(torch.equal(q.grad, old) for q, old in zip(joined, unchanged, strict=True))


def test_groups_keep_their_settings():
    flat = FlatParameters(grouped(parameters()))
    assert [(g["lr"], g["name"]) for g in flat.param_groups] == [(1e-2, "text"), (3e-2, "denoiser")]
    assert flat.layout() == [[list(s) for s in SHAPES[:3]], [list(s) for s in SHAPES[3:]]]


def test_mixed_dtypes_are_refused():
    with pytest.raises(ValueError, match="one dtype and device"):
        flatten([*parameters(), *parameters(torch.bfloat16)])


def test_bf16_parameters():
    params = parameters(torch.bfloat16)
    flat = FlatParameters(grouped(params))
    assert all(group.buffer.dtype == torch.bfloat16 for group in flat.groups)
    backward(params, 0)
    assert all(p.grad.dtype == torch.bfloat16 and bool(p.grad.any()) for p in params)


def test_half_gradients_are_unscaled_and_clipped():
    """--full_fp16: what the trainer does with torch's scaler, which refuses fp16 gradients by itself."""
    weights = [nn.Parameter(torch.ones(n, dtype=torch.float16)) for n in (3, 5)]
    flat = FlatParameters([{"params": [w], "lr": 1.0} for w in weights])
    optimizer = torch.optim.SGD(flat.param_groups, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(factor: float) -> float:
        flat.zero_grad()
        scaler.scale(factor * (weights[0].float().sum() + weights[1].float().sum())).backward()
        scaler.unscale_(optimizer)
        norm = flat.clip_grad_norm(1.0).item()
        scaler.step(optimizer)
        scaler.update()
        return norm

    with pytest.raises(ValueError, match="FP16"):
        step(2.0)
    unscale_half_gradients(scaler)
    scaler.update(1024.0)
    assert step(2.0) == pytest.approx(2 * 8**0.5, rel=1e-3)
    after = [w.detach().clone() for w in weights]
    for weight in after:
        torch.testing.assert_close(weight.float(), torch.full_like(weight.float(), 1 - 1 / 8**0.5), rtol=1e-3, atol=0)
    assert step(1e4) == float("inf")  # 1024 e4 is beyond fp16: the step is left out and the scale halved
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(w, old) for w, old in zip(weights, after, strict=True))


CUTS = {
    "gradient set to None": lambda params, flat: setattr(params[1], "grad", None),
    "another gradient of the same values": lambda params, flat: setattr(params[4], "grad", params[4].grad.clone()),
    "an optimizer's zero_grad": lambda params, flat: torch.optim.SGD(flat.param_groups, lr=1.0).zero_grad(),
    "another gradient buffer": lambda params, flat: setattr(flat.groups[1].buffer, "grad", flat.groups[1].grad.clone()),
    "other memory": lambda params, flat: setattr(params[3], "data", params[3].data.clone()),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_step_that_would_pass_over_weights_is_an_error(name):
    params = parameters()
    flat = FlatParameters(grouped(params))
    backward(params, 0)
    flat.require_joined()
    CUTS[name](params, flat)
    with pytest.raises(RuntimeError, match=r"of \d weights of optimizer group [01] .* would not be trained"):
        flat.require_joined()
