# SPDX-License-Identifier: Apache-2.0
"""`start.py doctor`: what it says of machines and environments in every state, and what it never says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from library.machine import INSTALL_TORCH, private
from tests.setup.fakes import FakeMachine
from tools.setup import doctor
from tools.setup.environment import ROOT, Environment

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the environments' Pythons are shell scripts here")
TOKEN = "hf_secretsecretsecret"


def environment(folder: Path, script: str) -> Environment:
    """A project whose environment's Python is a shell script."""
    made = Environment(folder)
    made.python.parent.mkdir(parents=True)
    made.python.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    made.python.chmod(0o755)
    return made


def lines_of(report: doctor.DoctorReport, name: str) -> list[str]:
    return [value for fact, value in report.facts if fact == name]


def test_whole_command(tmp_path):
    """All that is asked for is there, in two columns; the user's name, home folder and tokens are not."""
    home = tmp_path / "home" / "marker-person"
    home.mkdir(parents=True)
    own = {"HOME": str(home), "LOGNAME": "marker-person", "HF_TOKEN": TOKEN, "HF_HOME": str(home / "hub")}
    done = subprocess.run(
        [sys.executable, "start.py", "doctor"], cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names = [line.split("  ")[0] for line in done.stdout.partition("\n\n")[0].splitlines()]
    for name in ("Trainyard", "system", "memory", "disk", "card", "torch", "torch runs on", "--compile", "diffusers"):
        assert name in names
    assert "HF_HOME" in names and "~/hub" in done.stdout
    assert "marker-person" not in done.stdout and TOKEN not in done.stdout
    assert "Nothing is missing." in done.stdout or "Missing:\n- " in done.stdout
    assert done.stderr == ""


def test_no_environment_and_no_torch(tmp_path):
    """A Python with nothing installed: the command that installs."""
    code = f"from tools.setup.doctor import *; print(doctor(Environment(Path({str(tmp_path)!r}))).text())"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "- the environment: python start.py setup\n" in done.stdout
    assert "there is no .venv" in done.stdout


def test_torch_that_cannot_be_imported(tmp_path):
    """The error's first line and the command; the packages are listed all the same."""
    (tmp_path / "broken" / "torch").mkdir(parents=True)
    error = "raise ImportError('libcudart.so.13: cannot open shared object file')"
    (tmp_path / "broken" / "torch" / "__init__.py").write_text(error, encoding="utf-8")
    script = f'PYTHONPATH={tmp_path / "broken"} exec {sys.executable} "$@"'
    report = doctor.doctor(environment(tmp_path, script))
    assert lines_of(report, "torch") == ["not known: ImportError: libcudart.so.13: cannot open shared object file"]
    assert lines_of(report, "accelerate")
    assert report.missing[-1] == f"a torch that can be imported: {INSTALL_TORCH}"


def test_python_that_dies(tmp_path):
    """What it said before counts; noise of libraries does not."""
    script = f"echo noise; echo '{json.dumps(['torch', '2.13.0'])}'; kill -9 $$"
    report = doctor.doctor(environment(tmp_path, script))
    assert lines_of(report, "torch") == ["2.13.0"]
    assert lines_of(report, "environment") == ["its Python ended with code -9"]
    assert report.missing[-1].endswith("delete .venv, then python start.py setup")


def test_driver(tmp_path, monkeypatch):
    """Card and driver as the driver tells; one that does not work is a thing to mend."""
    fake = FakeMachine(tmp_path, monkeypatch)
    answers = environment(tmp_path / "project", "true")
    fake.nvidia("560.94", ("NVIDIA GeForce RTX 3060", "12288", "8.6"))
    report = doctor.doctor(answers)
    card = "NVIDIA GeForce RTX 3060, 12288 MiB, compute capability 8.6, driver 560.94"
    assert lines_of(report, "card") == [card] and report.missing == []
    fake.tool("nvidia-smi", "Failed to initialize NVML: Driver/library version mismatch", 18)
    report = doctor.doctor(answers)
    assert "version mismatch" in lines_of(report, "NVIDIA")[0]
    assert INSTALL_TORCH in report.missing[0] and "driver" in report.missing[0]


def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_DISK", 1 << 40)
    assert "disk space: " in doctor.doctor(environment(tmp_path, "true")).missing[0]


def test_private(monkeypatch):
    """Home folder and user name where they are parts of paths; words that only begin so stay."""
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("LOGNAME", "ann")
    said = private("/home/ann/x /home/annette/x /mnt/ann/models annual C:\\Users\\ann")
    assert said == "~/x /home/~/x /mnt/~/models annual C:\\Users\\~"
