# SPDX-License-Identifier: Apache-2.0
"""--shard_base: two processes with half of the denoiser each learn what one with all of it does, to the bit.

The processes are started once and do all runs one after the other: starting them is what takes long.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

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


def options(name: str, models: Mapping[str, dict[str, Any]], data: Path, folder: Path, **own: Any) -> dict[str, Any]:
    row, values = RUNS[name]
    given = {"dataset_config": data, "output_dir": folder, "max_train_steps": STEPS}
    return {**DEFAULTS, **models[row], **given, **values, **own}


@pytest.fixture(scope="module")
def pairs(models: Mapping[str, dict[str, Any]], data: Path, ground: Path) -> Path:
    """A folder with what each process has at the end of each run, and with the folders of the runs."""
    folder = ground / "sharded pairs"
    folder.mkdir()
    jobs = {
        name: child.Job(
            options(name, models, data, folder / name, shard_base=True), False, port, CASES[RUNS[name][0]].family
        )
        for name, port in zip(RUNS, child.free_ports(len(RUNS)))
    }
    both = [child.start(child.runs_together, rank, jobs, folder) for rank in (0, 1)]
    codes = [child.exit_code(process, seconds=300) for process in both]
    assert codes == [0, 0], (folder / "0.log").read_text(encoding="utf-8")[-3000:]
    return folder


def alone(
    name: str, models: Mapping[str, dict[str, Any]], data: Path, folder: Path, first: dict[str, Tensor]
) -> Recorded:
    """The same run by one process, which makes as many batches a step. first: gets the weights before."""
    values = options(name, models, data, folder, gradient_accumulation_steps=2)
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
        norms = found.pop("norms")
        print(name, facts["bytes"], whole, distance(found, after), distance(after, first), norms)
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
