# SPDX-License-Identifier: Apache-2.0
"""The line that names the card of a run, and the warning of a card without bf16."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState

from library.device import DistributedSettings, make_accelerator
from library.device_report import describe_device, has_bf16, has_fp8_products
from library.log import get_logger

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def shown_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """`setup_logging` of an earlier test may have switched this off."""
    monkeypatch.setattr(get_logger(), "propagate", True)


def start(caplog: pytest.LogCaptureFixture, mixed_precision: str) -> list[str]:
    """What the start of a run logs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    caplog.clear()
    with caplog.at_level("INFO", logger="trainyard"):
        assert make_accelerator(mixed_precision, DistributedSettings()).device.type == "cuda"
    # pytest hears a logger twice that did not propagate when the test began
    return [*dict.fromkeys(record.getMessage() for record in caplog.records if record.name == "trainyard")]


def test_line_of_the_card(caplog, monkeypatch):
    """Name, memory and abilities as torch has them; of several processes, all their cards."""
    found = torch.cuda.get_device_properties(DEVICE)
    (line, *_) = start(caplog, "no")
    assert line == f"running on {describe_device(DEVICE)}"
    assert line.startswith(f"running on cuda:0: {found.name}, {found.total_memory / 2**30:.1f} GB, ")
    assert f"compute {found.major}.{found.minor}, bf16 {'yes' if has_bf16(DEVICE) else 'no'}, fp8 products " in line
    assert "CUDA" in line or "ROCm" in line
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert describe_device(DEVICE, 16).startswith("cuda:0-7 (16 processes): ")


def test_card_without_bf16(caplog, monkeypatch):
    """A card of Pascal's kind, as far as torch tells: bf16 is emulated, and fp16 is named instead."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 1))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not has_fp8_products(DEVICE)
    _, warning = start(caplog, "bf16")
    assert warning.startswith("--mixed_precision bf16: ") and "(compute 6.1) has no bf16" in warning
    assert warning.endswith("use --mixed_precision fp16")
    assert len(start(caplog, "fp16")) == 1
