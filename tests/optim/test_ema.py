# SPDX-License-Identifier: Apache-2.0
"""The moving average against its recursion, and the swap."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.optim.ema import Ema, warm_decay


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
