# SPDX-License-Identifier: Apache-2.0
"""What a run says of its device: the line itself, and the warnings beside a card that torch cannot use."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from library.device import DistributedSettings, free_bytes, make_accelerator
from library.device_report import describe_device, torch_build, unused_card
from library.errors import UserError
from library.log import get_logger
from library.machine import INSTALL_TORCH, System, main_memory

CARD = "NVIDIA GeForce RTX 3060, 12288 MiB, compute capability 8.6, driver 560.94"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="nvidia-smi is a shell script here")


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A machine with a card that torch does not see: nvidia-smi answers, and writes down that it was asked."""
    answer = "560.94, NVIDIA GeForce RTX 3060, 12288, 8.6"
    asked = write_tool(tmp_path / "bin", f"echo '{answer}'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    return asked


def write_tool(folder: Path, command: str) -> Path:
    """nvidia-smi as a shell script. Returns the file that is there once it was asked."""
    folder.mkdir(exist_ok=True)
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ntouch {folder}/asked\n{command}\n", encoding="utf-8")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return folder / "asked"


def accelerator(mixed_precision: str) -> torch.device:
    AcceleratorState._reset_state(reset_partial_state=True)
    return make_accelerator(mixed_precision, DistributedSettings()).device


def test_line_on_the_cpu(caplog):
    """Slow, how many cores and how much memory, which torch."""
    line = describe_device(torch.device("cpu"))
    memory = main_memory(System.here())
    assert line.startswith(f"the CPU, where training is slow: {os.cpu_count()} cores, ")
    assert memory is not None and f"{memory.total / 2**30:.1f} GB" in line
    assert line.endswith(f"torch {torch_build()}")
    assert torch_build().startswith(torch.__version__.partition("+")[0])
    assert "CPU, where training is slow (2 processes): " in describe_device(torch.device("cpu"), 2)
    assert 0 < free_bytes(torch.device("cpu")) <= memory.total


def test_warning_of_a_build_without_cuda(nvidia_smi, monkeypatch, caplog):
    """Every start says what it runs on; beside an unused card loudly, with the command, in one line."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(get_logger(), "propagate", True)  # `setup_logging` of an earlier test switched it off
    with caplog.at_level("INFO", logger="trainyard"):
        assert accelerator("bf16").type == "cpu"
    assert any(line.startswith("running on the CPU, where training is slow: ") for line in caplog.messages)
    # pytest hears a logger twice that did not propagate when the test began
    (warning,) = {record.getMessage() for record in caplog.records if record.levelname == "WARNING"}
    assert "\n" not in warning
    assert warning.startswith(f"TRAINING ON THE CPU, NOT ON THE CARD: torch cannot use {CARD}: ")
    assert f"is not built for CUDA: {INSTALL_TORCH}" in warning
    with pytest.raises(UserError) as caught:
        accelerator("fp16")
    assert caught.value.problems[0].startswith("--mixed_precision fp16 needs a GPU")
    assert INSTALL_TORCH in caught.value.problems[1]


def test_warning_of_an_old_driver(nvidia_smi, monkeypatch):
    """A build for CUDA: the reason is torch's own, without its advice to do something else."""

    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update it.\nx")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", refuse)
    found = unused_card()
    assert found is not None
    assert "(CUDA 13.0) says: The NVIDIA driver on your system is too old (found version 11040): " in found
    assert INSTALL_TORCH in found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    found = unused_card()
    assert found is not None and found.endswith("CUDA_VISIBLE_DEVICES=3 hides it: unset that variable")


def test_warning_of_a_driver_that_does_not_work(nvidia_smi):
    """nvidia-smi is there and fails: what it says is shown."""
    write_tool(nvidia_smi.parent, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    found = unused_card()
    assert found is not None and "Driver/library version mismatch" in found and INSTALL_TORCH in found


@pytest.mark.parametrize(
    ("name", "value"), [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("ACCELERATE_USE_CPU", "true")]
)
def test_no_warning_where_the_cpu_is_wanted(nvidia_smi, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert unused_card() is None
    assert not nvidia_smi.exists()


def test_the_driver_is_not_asked_beside_a_working_card(nvidia_smi, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert unused_card() is None
    assert not nvidia_smi.exists()
