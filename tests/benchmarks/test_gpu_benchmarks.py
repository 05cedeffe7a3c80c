# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu end to end on tiny models: rows, failures, models made of holes, and the figures' arithmetic."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks.gpu import ours, run
from benchmarks.gpu.ceilings import as_card
from benchmarks.gpu.jobs import CARDS, JOBS, Way, card_of, ways, zero_stall_share
from benchmarks.gpu.models import ARCHITECTURES, fill, with_random_weights, write_hole
from benchmarks.gpu.timing import PROBES, Figures, idle_share
from library.families.registry import FAMILIES, open_family


def measured(job: str, way: Way, folder: Path) -> dict[str, Any]:
    """What one process of the benchmark measures, in this one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    result = folder / "result.json"
    spec = {"job": job, "way": dataclasses.asdict(way), "folder": str(folder), "result": str(result)}
    assert run.main(["--tiny", "--row", json.dumps({**spec, "begun": time.time()})]) == 0
    return json.loads(result.read_text(encoding="utf-8"))


@pytest.mark.parametrize("job", ["lumina_lora", "sd35m_full"])
def test_rows_of_both_programs(job, tmp_path):
    """The real trainer and the plain loop take the steps that are asked for, and train about as many numbers."""
    ours.prepare(JOBS[job], tmp_path, tiny=True)
    plain = measured(job, Way("diffusers", plain=True), tmp_path)
    eager = measured(job, Way("eager"), tmp_path)
    assert eager["trained"] == pytest.approx(plain["trained"], rel=0.1)  # we adapt Lumina's queries and keys as one
    for found in (plain, eager):
        assert len(found["steps"]) == run.TINY_STEPS and min(found["steps"]) > 0
        assert 0 < found["median"] <= found["p95"] <= found["first_step"]
        assert (tmp_path / "cache").is_dir()


def test_swapped_and_quantised_rows(tmp_path):
    """Options of memory go through as a user gives them."""
    job = "lumina_lora"
    ours.prepare(JOBS[job], tmp_path, tiny=True)
    words = next(way for way in ways(JOBS[job], zero_stall=0.4) if way.name == "fp8").words
    found = measured(job, Way("fp8", words, swapped=1.0), tmp_path)
    assert len(found["steps"]) == run.TINY_STEPS
    assert found["stall"] == 0  # blocks were swapped; only a card measures how long that took


def test_command(tmp_path, capsys):
    """The whole command: the machine's table, a job's table, and a file that says the same."""
    output = tmp_path / "results.md"
    words = ["--tiny", "--jobs", "lumina_lora", "--ways", "eager", "--output", str(output), "--folder", str(tmp_path)]
    assert run.main(words) == 0
    printed = capsys.readouterr().out
    assert output.read_text(encoding="utf-8") == printed
    lines = printed.splitlines()
    assert any(line.startswith("| bf16 matrix product") for line in lines)
    assert any(line.startswith("| copy of 1 MB to the device") for line in lines)
    (row,) = (line for line in lines if line.startswith("| eager |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == len(run.HEAD)
    assert float(cells[run.HEAD.index("s/step")]) > 0


def test_failed_row_says_why(tmp_path):
    """A process that ends early is a row of the table, with its last line."""
    answer = run.in_process({"job": "none", "way": {"words": []}}, run.parse(["--tiny"]), tmp_path)
    assert answer == "KeyError: 'none'"
    line = run.markdown_row(Way("wrong"), answer)
    assert line.count("|") == len(run.HEAD) + 1 and line.startswith("| wrong | not measured: KeyError")


def test_no_user_name_in_tables(tmp_path, monkeypatch, capsys):
    """An error's line may hold a path."""
    monkeypatch.setenv("HOME", "/home/ann")
    output = tmp_path / "results.md"
    run.Lines(output).add(run.markdown_row(Way("wrong"), "no such file: /home/ann/model"))
    assert "no such file: ~/model |" in output.read_text(encoding="utf-8") and "ann" not in capsys.readouterr().out


def test_reason():
    assert run.reason("loading\nerror: CUDA out of memory\nerror: b\n", 2) == "CUDA out of memory; b"
    assert run.reason("a\nb\n\n", 1) == "b"
    compiler = "Traceback\n  File x\ntorch._dynamo.exc.InternalTorchDynamoError: why\n\nSet X=1 for more\n"
    assert run.reason(compiler, 1) == "torch._dynamo.exc.InternalTorchDynamoError: why"
    assert run.reason("", -9) == "ended with -9"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_nothing_to_measure_on(capsys):
    assert run.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_unknown_job(capsys):
    assert run.main(["--tiny", "--jobs", "sdxl"]) == 2
    assert "sdxl_lora" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--ways", "eagre"], "Did you mean 'eager'?"), (["--steps", "0"], "--steps: 1 or more, not 0")],
)
def test_nothing_to_measure(words, said, capsys):
    """No empty tables."""
    assert run.main(["--tiny", *words]) == 2
    assert said in capsys.readouterr().err


def test_nothing_measured_of_the_machine():
    """What it reaches is then taken to be a known card's, and not zero."""
    assert as_card([("launch", 5.0, "us")]) is None
    assert card_of("no known name", peak_tf=None, measured=None).peak_tf > 0


# ---- models of holes ------------------------------------------------------------------------------------------------


def test_hole_takes_no_disk(tmp_path):
    """A file as long as the real one, of which only the header is there."""
    module = ARCHITECTURES["sd35m"].empty(tiny=False)
    write_hole(tmp_path, module)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    assert path.stat().st_size > 4e9
    assert path.stat().st_blocks * 512 < 1e6


def test_weights_are_random_and_equal_in_both_programs(tmp_path):
    """The family's loader and the plain loop make the same numbers, of the variance that keeps signals alive."""
    architecture = ARCHITECTURES["lumina"]
    ours.prepare(JOBS["lumina_lora"], tmp_path, tiny=True)
    entry = FAMILIES["lumina"]
    options = entry.option_groups["model"](pretrained_model_name_or_path=str(tmp_path / "model"))
    family = with_random_weights(open_family(entry, options), architecture)
    loaded = family.load_denoiser(torch.bfloat16, "cpu").state_dict()
    filled = fill(architecture.empty(tiny=True), "cpu").state_dict()
    assert loaded.keys() == filled.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, filled[name]), name
    weight = loaded["layers.0.feed_forward.linear_1.weight"].float()
    assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.05)
    assert torch.equal(loaded["layers.0.norm1.linear.bias"], torch.zeros_like(loaded["layers.0.norm1.linear.bias"]))


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def test_idle_share():
    """Overlapping spans count once: of 0..10, 4..5 and 7..9 are empty."""
    assert idle_share([(0, 3), (5, 7), (2, 4), (9, 10)]) == pytest.approx(0.3)
    assert idle_share([(0, 4), (1, 2)]) == 0


def test_figures():
    steps = [0.001 * n for n in range(1, 31)]
    found = Figures(steps, 1.0, 0.0031, None, None, None, None, 0, 0)
    assert found.median == pytest.approx(0.0155)
    assert found.p95 == pytest.approx(0.029)  # the 29th of 30
    assert found.host_idle == pytest.approx(0.8)
    assert PROBES >= 1


@pytest.mark.parametrize(
    ("job", "card", "share"),
    [("flux_lora_1024", "H200", 0.20), ("flux_lora_1024", "4090", 0.48), ("sdxl_lora", "H200", 0.10),
     ("flux_lora_512", "H200", 0.06), ("sd15_lora", "4090", 1.0), ("sd35m_full", "4090", 0.38)],
)  # fmt: skip
def test_zero_stall_share(job, card, share):
    """Figures worked out by hand: copies of a pass, in GB, over the blocks' GB, at most 1."""
    found = zero_stall_share(JOBS[job], CARDS[card])
    assert found == pytest.approx(share, abs=0.006) if share < 1 else found > 0.27
