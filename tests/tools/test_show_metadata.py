# SPDX-License-Identifier: Apache-2.0
"""tools/show_metadata.py: a page for people, JSON for programs, and one line where there is nothing to show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.tiny import make_tiny_sd
from tests.trainers.helpers import make_pictures, subset, train, write_dataset
from tools.show_metadata import main

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "show_metadata.py"
TENSORS = {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.float16), "c": torch.ones(())}


def written(path: Path, metadata: dict[str, str] | None) -> Path:
    save_file(TENSORS, path, metadata)
    return path


def page(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_trained_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path / "d.toml", subset(make_pictures(tmp_path / "cats", 5), num_repeats=2))
    run = train(make_tiny_sd(tmp_path / "m"), data, tmp_path / "out", max_train_steps=1)
    capsys.readouterr()
    lines = page(capsys, "--model", run.file, "--top", 2)
    titles = ["description", "network", "base model", "datasets", "training", "hashes"]
    assert [line for line in lines if line in titles] == titles
    words = [" ".join(line.split()) for line in lines]
    for expected in (
        "architecture stable-diffusion-v1/lora", "network_dim 4", "base_model_version sd_v1", "learning_rate 0.01",
        "folder cats: 5 pictures, repeated 2 times", "dataset 1: 10 pictures with repeats, 64x64, batch size 2",
        "8 tags in cats, the first 2:", "3 photo", "steps 1",
    ):  # fmt: skip
        assert expected in words, expected
    assert not any(word.endswith(" None") for word in words)
    assert "further options were not set; --json shows all" in lines[-1]
    assert len([line for line in page(capsys, "--model", run.file, "--top", 0) if line.startswith("    ")]) == 9

    assert main(["--model", str(run.file), "--json"]) == 0
    with safe_open(run.file, "pt") as file:
        assert json.loads(capsys.readouterr().out) == file.metadata()


def test_what_is_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = {"name": "é", "modelspec.thumbnail": "data:" + "x" * 1000, "ss_training_started_at": "soon",
                "ss_tag_frequency": "{broken", "ss_bucket_info": "null"}  # fmt: skip
    path = written(tmp_path / "a.safetensors", metadata)
    lines = page(capsys, "--model", path)
    assert lines[0] == f"a.safetensors: {path.stat().st_size:,} bytes, 3 tensors, 7 numbers in F32, 5 numbers in F16"
    assert "  name  é" in lines and "other entries" in lines
    assert f"  thumbnail  data:{'x' * 295} ... (1,005 letters)" in lines
    assert "  training_started_at  soon" in lines and "  tag_frequency  {broken" in lines


def test_no_metadata_is_one_line_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "a.safetensors", None)
    assert page(capsys, "--model", path)[1:] == ["no metadata"]
    assert page(capsys, "--model", path, "--json") == ["{}"]


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """A file of 8 GB, of which the disk holds none; as a script from any folder."""
    header = b'{"__metadata__":{"ss_seed":"3"},"w":{"dtype":"F16","shape":[4294967296],"data_offsets":[0,8589934592]}}'
    with open(tmp_path / "large.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 8589934592)
    command = [sys.executable, "-P", str(SCRIPT), "--model", "large.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "4,294,967,296 numbers in F16" in done.stdout and "  seed  3" in done.stdout


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "mine.safetensors", None)
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "short.safetensors").write_bytes((tmp_path / "mine.safetensors").read_bytes()[:-3])
    cases: list[tuple[tuple[object, ...], str]] = [
        ((), "--model is needed: the file to look into"),
        (("--model", tmp_path / "mime.safetensors"), f"does not exist. Did you mean {tmp_path / 'mine.safetensors'}?"),
        (("--model", tmp_path / "no" / "a.safetensors"), "a.safetensors does not exist"),
        (("--model", tmp_path), f"{tmp_path} is a folder"),
        (("--model", tmp_path / "text.safetensors"), "text.safetensors is no readable .safetensors file"),
        (("--model", tmp_path / "short.safetensors"), "short.safetensors is no readable .safetensors file"),
        (("--model", tmp_path / "mine.safetensors", "--top", -1), "--top must be at least 0, got -1"),
        (("--modle", "a"), "Unknown option --modle. Did you mean --model?"),
    ]
    for words, expected in cases:
        assert main([str(word) for word in words]) == 2
        captured = capsys.readouterr()
        assert expected in captured.err.splitlines()[0] and captured.out == "", captured.err
