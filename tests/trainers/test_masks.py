# SPDX-License-Identifier: Apache-2.0
"""Masks in every method: the loss divided by the mask's mean, keeping what masks hide, and the line about them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.trainers.helpers import DEFAULTS, Run, make_pictures, make_trainer, settle, subset, write_dataset

METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # method of the trainer and its options
    "LoRA": ("network", {"network_module": "networks.lora"}),
    "full": ("finetune", {}),
    "DreamBooth": ("dreambooth", {}),
    "textual inversion": ("textual_inversion", {"token_string": "mysks", "init_word": "cat"}),
    "LLLite": ("lllite", {"network_dim": 8}),
}


@pytest.fixture(scope="module")
def half_opaque(ground: Path) -> Path:
    """A batch of pictures whose left half is opaque, with control images."""
    captions = ("mysks, blue", "mysks girl, red, star")
    folder = make_pictures(ground / "half opaque", 2, captions=captions)
    shutil.copytree(folder, ground / "half opaque controls")
    for path in folder.glob("*.png"):
        picture, alpha = Image.open(path), Image.new("L", (64, 64))
        alpha.paste(255, (0, 0, 32, 64))
        picture.putalpha(alpha)
        picture.save(path)
    return folder


def run(method: str, sd1: Path, pictures: Path, folder: Path, **values: Any) -> Run:
    name, own = METHODS[method]
    controls = {"conditioning_data_dir": f"{pictures} controls"} if method == "LLLite" else {}
    data = write_dataset(folder / "d.toml", subset(pictures, alpha_mask=True, **controls))
    sizes = {key: value for key, value in DEFAULTS.items() if method == "LoRA" or not key.startswith("network")}
    given = {
        **sizes, "pretrained_model_name_or_path": sd1, "dataset_config": data, "output_dir": folder / "out",
        "max_train_steps": 1, **own, **values,
    }  # fmt: skip
    trainer = make_trainer(given, family="sd", method=name)
    code = trainer.run()
    settle()
    return Run(trainer, code, folder / "out")


@pytest.mark.parametrize("method", METHODS)
def test_half_a_picture_teaches_as_much_as_a_whole_one(
    method: str, sd1: Path, half_opaque: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        alone = run(method, sd1, half_opaque, tmp_path / "alone").losses[0]
    lines = [record.message for record in caplog.records if record.message.startswith("masks: ")]
    assert lines == ["masks: 2 of 2 pictures have one, and 50.0% of their area trains"]
    normalized = run(method, sd1, half_opaque, tmp_path / "normalized", masked_loss_normalize=True).losses[0]
    assert normalized == pytest.approx(2 * alone, rel=1e-5)


@pytest.mark.parametrize("method", ["LoRA", "LLLite"])
def test_what_a_mask_hides_is_kept(method: str, sd1: Path, half_opaque: Path, tmp_path: Path) -> None:
    """Nothing has changed in the first step; then the network has, and staying near counts."""
    values = {"learning_rate": 0.1, "seed": 3, "max_train_steps": 4}
    alone = run(method, sd1, half_opaque, tmp_path / "alone", **values).losses
    kept = run(method, sd1, half_opaque, tmp_path / "kept", masked_prior_weight=50, cache_latents=True, **values).losses
    assert kept[0] == pytest.approx(alone[0], rel=1e-5)
    assert kept[1] > 1.001 * alone[1]  # the same weights in both, which the first step made
