# SPDX-License-Identifier: Apache-2.0
"""--shard_base: two processes with half of the denoiser each learn what one with all of it does, to the bit.

The processes are started once and do all runs one after the other: starting them is what takes long.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from library.errors import UserError
from library.io.state import load_state
from tests.families import CASES
from tests.trainers import child
from tests.trainers.helpers import DEFAULTS, Recorded, differing, make_pictures, make_trainer, subset, write_dataset

STEPS = 2
PICTURES = 5
UNET_ONLY: dict[str, Any] = {"network_train_unet_only": True}
BF16: dict[str, Any] = {**UNET_ONLY, "mixed_precision": "bf16", "cache_latents": True}
SGD: dict[str, Any] = {"optimizer_type": "SGDNesterov", "learning_rate": 1.0}
# name -> row of CASES, options
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": ("flux", {**BF16, "gradient_checkpointing": True, "ema_decay": 0.9, "save_state": True}),
    "fp8": ("flux", {**BF16, "fp8_base_unet": True, "network_args": ["dora_wd=True"], "lora_format": "comfy"}),
    "nf4": ("flux", {**BF16, "base_quant": "nf4", "gradient_checkpointing": True}),
    "LoKr": ("sd3", {**BF16, "network_module": "networks.lokr", "optimizer_type": "AdamW8bit"}),
    "lumina": ("lumina", {**BF16, "optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False"]}),
    "sd": ("sd1", {**SGD, "network_dropout": 0.2, "clip_skip": 2}),
    "sdxl": ("sdxl", {**SGD, "network_args": ["dora_wd=True", "conv_dim=4"], "gradient_checkpointing": True}),
}
# Where a tensor has three gradients (the skip connections of a U-Net, texts whose encoder learns), the sum of those of
# one block is made first, and not the sum of the first two that come.
ANOTHER_SUM = ("sd", "sdxl")


@pytest.fixture(scope="module")
def data(ground: Path) -> Path:
    pictures = make_pictures(ground / "sharded", PICTURES)
    return write_dataset(ground / "sharded.toml", subset(pictures), batch_size=1)


@pytest.fixture(scope="module")
def models(ground: Path) -> Mapping[str, dict[str, Any]]:
    """The options that name each tiny model."""
    rows = dict.fromkeys(row for row, _ in RUNS.values())
    return {row: {**CASES[row].make(ground / f"sharded {row}"), **CASES[row].options} for row in rows}


@pytest.fixture(scope="module")
def shown(data: Path, ground: Path) -> dict[str, Any]:
    """Options with which a run validates, and makes previews before and after."""
    held_out = write_dataset(ground / "held out.toml", subset(ground / "sharded"), batch_size=1, validation_split=0.4)
    (ground / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\na dog --w 64 --h 64 --s 1 --d 2\n")
    previews = {"sample_prompts": ground / "prompts.txt", "sample_at_first": True, "sample_every_n_steps": STEPS}
    return {"dataset_config": held_out, **previews}


def options(name: str, models: Mapping[str, dict[str, Any]], data: Path, folder: Path, **own: Any) -> dict[str, Any]:
    row, values = RUNS[name]
    given = {"dataset_config": data, "output_dir": folder, "max_train_steps": STEPS}
    return {**DEFAULTS, **models[row], **given, **values, **own}


@pytest.fixture(scope="module")
def pairs(models: Mapping[str, dict[str, Any]], data: Path, shown: dict[str, Any], ground: Path) -> Path:
    """A folder with what each process has at the end of each run, and with the folders of the runs."""
    folder = ground / "sharded pairs"
    folder.mkdir()
    one = options("flux", models, data, folder / "one", gradient_accumulation_steps=2, max_train_steps=1)
    assert make_trainer(one, family="flux").run() == 0
    asked = {name: (name, {}) for name in RUNS}
    asked["shown"] = "flux", shown
    asked["resumed"] = "flux", {"resume": folder / "one/x-state"}
    jobs = {}
    for (job, (name, own)), port in zip(asked.items(), child.free_ports(len(asked))):
        values = options(name, models, data, folder / job, shard_base=True, **own)
        jobs[job] = child.Job(values, False, port, CASES[RUNS[name][0]].family)
    both = [child.start(child.runs_together, rank, jobs, folder) for rank in (0, 1)]
    codes = [child.exit_code(process, seconds=300) for process in both]
    assert codes == [0, 0], (folder / "0.log").read_text(encoding="utf-8")[-3000:]
    return folder


def alone(
    name: str, models: Mapping[str, dict[str, Any]], data: Path, folder: Path, first: dict[str, Tensor], **own: Any
) -> Recorded:
    """The same run by one process, which makes as many batches a step. first: gets the weights before."""
    values = options(name, models, data, folder, gradient_accumulation_steps=2, **own)
    trainer = make_trainer(values, family=CASES[RUNS[name][0]].family)

    def before(trainer: Recorded) -> None:
        first.update({name: value.clone() for name, value in trainer.trainables.state().items()})

    trainer.before = before
    assert trainer.run() == 0
    return trainer


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as opened:
        return load_file(path), dict(opened.metadata())


@pytest.mark.parametrize("name", RUNS)
def test_two_halves_learn_what_a_whole_does(
    name: str, models: Mapping[str, dict[str, Any]], data: Path, pairs: Path, tmp_path: Path
) -> None:
    first: dict[str, Tensor] = {}
    expected = alone(name, models, data, tmp_path, first)
    losses = torch.tensor([report.loss for report in expected.reports])
    whole, kept = child.local_bytes(expected.models.denoiser), 0
    after = expected.trainables.state()
    for rank in (0, 1):
        found, facts = read(pairs / f"{name} {rank}.safetensors")
        torch.testing.assert_close(found.pop("losses"), losses, rtol=1e-5, atol=0)
        found.pop("norms")
        if name in ANOTHER_SUM:
            assert distance(found, after) < 1e-4 * distance(after, first)
        else:
            assert differing(found, after) == []
        assert int(facts["bytes"]) < 0.52 * whole
        kept += int(facts["bytes"])
    assert kept == whole
    if name not in ANOTHER_SUM:
        assert differing(load_file(pairs / name / "x.safetensors"), load_file(tmp_path / "x.safetensors")) == []


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(torch.stack([torch.linalg.vector_norm(one[name] - other[name]) for name in one]).norm())


def test_all_validate_and_preview_and_one_writes(
    models: Mapping[str, dict[str, Any]], data: Path, shown: dict[str, Any], pairs: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, logger="trainyard")
    alone("flux", models, data, tmp_path, {}, **shown)
    assert differing(load_file(pairs / "shown/x.safetensors"), load_file(tmp_path / "x.safetensors")) == []
    (line,) = [record.message for record in caplog.records if record.message.startswith("validation loss")]
    assert line in (pairs / "0.log").read_text(encoding="utf-8")
    own, theirs = (sorted((folder / "sample").glob("*.png")) for folder in (tmp_path, pairs / "shown"))
    assert len(own) == len(theirs) == 2 * 2 + 1  # two prompts at two times, and the sheet of both
    assert all(Image.open(a).tobytes() == Image.open(b).tobytes() for a, b in zip(own, theirs))


def test_a_state_goes_on_with_another_number_of_processes(
    models: Mapping[str, dict[str, Any]], data: Path, pairs: Path, tmp_path: Path
) -> None:
    """One step of one process, one of two, and one of one again: what one process learns in all of them."""
    more = {"max_train_steps": STEPS + 1}
    alone("flux", models, data, tmp_path / "last", {}, resume=pairs / "resumed/x-state", **more)
    alone("flux", models, data, tmp_path / "whole", {}, **more)
    last, whole = (load_state(tmp_path / folder / "x-state") for folder in ("last", "whole"))
    for part in ("weights", "optimizer", "ema", "losses", "batch"):
        assert differing(getattr(last, part), getattr(whole, part)) == [], part


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "swap": ({"blocks_to_swap": 1}, r"--shard_base does not work with --blocks_to_swap"),
    "offload": (
        {"cpu_offload_checkpointing": True, "gradient_checkpointing": True},
        "--shard_base does not work with --cpu_offload_checkpointing",
    ),
    "hoist": ({"hoist_modulation": True}, "--shard_base does not work with --hoist_modulation"),
    "compile": ({"compile": True}, "--shard_base does not work with --compile"),
    "planner": ({"vram_budget": "8GB"}, "--shard_base: --vram_budget computes with a whole model"),
    "third party": ({"network_module": "lycoris.kohya"}, "--shard_base is for the networks of this program"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_moves_or_reads_weights_is_refused(
    name: str, models: Mapping[str, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    values, line = REFUSED[name]
    with pytest.raises(UserError) as caught:
        make_trainer(options("flux", models, data, tmp_path, shard_base=True, **values), family="flux").run()
    assert any(problem.startswith(line) for problem in caught.value.problems), caught.value.problems
