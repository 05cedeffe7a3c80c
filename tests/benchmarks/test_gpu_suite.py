# SPDX-License-Identifier: Apache-2.0
"""The GPU suite in one command: on the simulated card at tiny size, without a card, and with tests that fail."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import suite
from benchmarks.gpu.run import HEAD
from library.machine import INSTALL_TORCH
from tests.script_runner import ROOT
from tests.setup.fakes import FakeMachine

NO_SIMULATED_CARD = 3  # exit code of `python -m tests.cuda_simulation`
FAILING = """
import pytest
@pytest.mark.gpu
def test_wrong():
    assert 1 == 2, "not equal"
@pytest.mark.gpu
def test_right():
    assert True
def test_of_no_card():
    raise AssertionError("not marked, so not run")
"""


def test_whole_suite_on_the_simulated_card(tmp_path):
    """A test that passes, one that fails, then benchmarks; the file has machine, versions, tables and tests."""
    (tmp_path / "test_failing.py").write_text(FAILING, encoding="utf-8")
    tests = f"tests/on_card/test_device_line.py,{tmp_path / 'test_failing.py'}"
    command = [sys.executable, "-m", "tests.cuda_simulation", "benchmarks/gpu/suite.py", "--tests", tests]
    command += ["--tiny", "--jobs", "lumina_lora", "--ways", "eager", "--output", str(tmp_path / "results")]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=alone, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode == NO_SIMULATED_CARD:
        pytest.skip(done.stdout.strip())
    assert done.returncode == suite.EXIT_TESTS_FAILED, done.stdout
    text = (tmp_path / "results" / "RESULTS.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0].startswith("## Training on ") and lines[0].endswith(", tiny models")
    assert any(line.startswith("cuda:0: ") and " bf16 yes" in line and "CUDA" in line for line in lines)
    assert any(", diffusers " in f", {line}" and "peft " in line for line in lines)
    assert "| bf16 matrix product" in text and "| copy of 1 MB to the device, pinned |" in text
    (row,) = (line for line in lines if line.startswith("| eager |"))
    cells = dict(zip(HEAD, (cell.strip() for cell in row.strip("|").split("|")), strict=True))
    for name in ("s/step", "peak GB", "reserved GB", "set-up GB", "host s/step", "first step s", "main memory GB"):
        assert float(cells[name]) > 0 or name.endswith("GB"), name
    assert ": 3 passed, 1 failed, 0 skipped in " in text
    assert "::test_wrong`: AssertionError: not equal" in text
    assert str(tmp_path / "results" / "RESULTS.md") in done.stdout and str(tmp_path / "results") not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_no_card(tmp_path, monkeypatch, capsys):
    """One line and exit code 2, before a test is run; the command where a card is there that torch cannot use."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    fake = FakeMachine(tmp_path, monkeypatch)
    assert suite.main(["--output", str(tmp_path / "results")]) == 2
    fake.nvidia("560.94", ("NVIDIA GeForce RTX 3060", "12288", "8.6"))
    assert suite.main(["--output", str(tmp_path / "results")]) == 2
    plain, with_card = capsys.readouterr().err.splitlines()
    assert plain.startswith("error: the GPU suite needs a card with CUDA: torch sees none")
    assert "NVIDIA GeForce RTX 3060" in with_card and INSTALL_TORCH in with_card
    assert not (tmp_path / "results").exists()


def test_no_tests(tmp_path):
    """A failure, not nothing to report."""
    found = suite.run_tests([str(tmp_path / "none.py")], tmp_path / "report.xml")
    assert found.passed == 0
    assert found.failures == (("pytest", "it ended with code 4, not after all tests"),)
    assert "- failed: `pytest`: it ended" in found.section("none.py")
