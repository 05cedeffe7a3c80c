# SPDX-License-Identifier: Apache-2.0
"""The moving average against its recursion, and the swap."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.optim import ema as ema_module
from library.optim.ema import Ema, warm_decay
from library.optim.flat import FlatParameters


def test_decay_warms_up():
    assert [warm_decay(0.99, n) for n in (0, 1, 90, 890, 10_000)] == pytest.approx([0.1, 2 / 11, 0.91, 0.99, 0.99])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recursion(dtype):
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    ema, want = Ema([p], 0.9), torch.ones(3)
    for step in range(200):
        with torch.no_grad():
            p.add_(0.25)
        ema.update(step)
        d = min(0.9, (1 + step) / (10 + step))
        want = d * want + (1 - d) * p.detach().float()
    assert ema.averages[0].dtype == torch.float32
    torch.testing.assert_close(ema.averages[0], want)


def test_swap_and_back():
    p = nn.Parameter(torch.zeros(2))
    ema = Ema([p], 0.9)
    with torch.no_grad():
        p.fill_(1.0)
    ema.update(0)
    with ema.swapped():
        assert p.tolist() == pytest.approx([0.9, 0.9])
    assert p.tolist() == [1.0, 1.0]
    with pytest.raises(RuntimeError, match="stop"), ema.swapped():
        raise RuntimeError("stop")
    assert p.tolist() == [1.0, 1.0]


def test_state_round_trip_is_exact():
    p, q = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
    first, second = Ema([p], 0.99), Ema([q], 0.99)
    first.update(3)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    assert torch.equal(first.averages[0], second.averages[0])
    with pytest.raises(ValueError, match="other weights"):
        Ema([nn.Parameter(torch.rand(5))], 0.9).load_state_dict(first.state_dict())


# ---- flat buffers ---------------------------------------------------------------------------------------------------

SHAPES = [(3, 5), (7,), (), (2, 65), (130,)]


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in SHAPES]


def joined(params: list[nn.Parameter]) -> FlatParameters:
    return FlatParameters([{"params": params[:2]}, {"params": params[2:]}])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_buffers_are_averaged_as_their_parts(dtype, monkeypatch):
    one, two = weights(dtype), weights(dtype)
    plain, flat = Ema(one, 0.9), Ema(two, 0.9, joined(two))
    monkeypatch.setattr(ema_module, "CHUNK", 20)  # of what is not float32, a few numbers at a time
    assert len(flat.tensors) == 2 and [len(range(*p.indices(5))) for p in plain._parts()] == (
        [5] if dtype == torch.float32 else [1, 2, 1, 1]
    )
    for step in range(20):
        draw = torch.Generator().manual_seed(step)
        for p, q in zip(one, two, strict=True):
            change = torch.randn(p.shape, generator=draw)
            with torch.no_grad():
                p.add_(change), q.add_(change)
        plain.update(step), flat.update(step)
    assert all(torch.equal(p, q) for p, q in zip(plain.averages, flat.averages, strict=True))
    before = [q.detach().clone() for q in two]
    with flat.swapped():
        assert all(torch.equal(q, a.to(dtype)) for q, a in zip(two, plain.averages, strict=True))
    assert all(torch.equal(q, old) for q, old in zip(two, before, strict=True))


def test_states_are_the_same_with_and_without_buffers(tmp_path):
    """A state that was written before averages were joined is read, and the other way round."""
    values = {str(i): torch.randn(shape) for i, shape in enumerate(SHAPES)}
    params, others = weights(), weights()
    flat, plain = Ema(params, 0.9, joined(params)), Ema(others, 0.9)
    flat.load_state_dict(values)
    flat.update(100)
    torch.save(flat.state_dict(), tmp_path / "ema.pt")
    plain.load_state_dict(torch.load(tmp_path / "ema.pt"))
    assert all(torch.equal(p, q) for p, q in zip(plain.averages, flat.averages, strict=True))
    torch.testing.assert_close(plain.averages[0], 0.9 * values["0"] + 0.1 * others[0].detach())


def test_buffers_of_other_weights_are_refused():
    params = weights()
    with pytest.raises(ValueError, match="other weights"):
        Ema(params[:3], 0.9, joined(weights()))
