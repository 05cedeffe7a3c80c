# SPDX-License-Identifier: Apache-2.0
"""library/device.py on a card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.device import HostCopy, empty_cache, forget_peak, free_bytes, kept_random_state, peak_bytes
from tests.tiny import make_tiny_sd
from tests.trainers.helpers import make_pictures, subset, train, write_dataset

pytestmark = pytest.mark.gpu
MIB = 1 << 20


def test_memory_is_counted() -> None:
    device = torch.device("cuda", 0)
    before = free_bytes(device)
    held = torch.empty(4 * MIB, dtype=torch.uint8, device=device)
    assert free_bytes(device) <= before - 4 * MIB
    torch.empty(8 * MIB, dtype=torch.uint8, device=device)
    after = peak_bytes(device)
    forget_peak(device)
    assert 4 * MIB <= peak_bytes(device) <= after - 8 * MIB
    del held
    empty_cache()


def test_values_arrive_and_draws_are_undone() -> None:
    device = torch.device("cuda", 0)
    values = torch.arange(3.0, device=device, requires_grad=True)
    copy = HostCopy(values * 2)
    assert copy.value().tolist() == [0.0, 2.0, 4.0] and copy.ready and copy.value().device.type == "cpu"
    torch.manual_seed(1)
    with kept_random_state(device):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), first)


def test_a_run_reports_each_step(tmp_path: Path) -> None:
    """The numbers of the steps come by HostCopy."""
    model = make_tiny_sd(tmp_path / "model", version=1)
    data = write_dataset(tmp_path / "data.toml", subset(make_pictures(tmp_path / "pictures", 4)))
    run = train(model, data, tmp_path / "out")
    assert [report.step for report in run.trainer.reports] == [1, 2, 3, 4]
    assert all(value > 0 for report in run.trainer.reports for value in (report.loss, report.grad_norm))
