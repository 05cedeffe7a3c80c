# SPDX-License-Identifier: Apache-2.0
"""Every preset of the kohya_ss GUI is accepted; what means nothing for the model is one line."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from library.cli import METHODS
from library.data.config import load_dataset_config
from library.data.config_problems import bucket_problems
from library.errors import UserError
from library.families.registry import FAMILIES, family_class
from library.optim.optimizers import choose_optimizer
from library.options import Resolved, resolve
from library.trainers.checks import check_schedule
from tests.trainers.helpers import make_pictures
from tools.make_options_doc import SCRIPTS

FILE = Path(__file__).parents[1] / "data_files/trainers/gui_presets.json"
PRESETS: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["presets"]
# What the GUI writes besides, whatever the preset
ALWAYS = {
    "enable_bucket": True, "max_data_loader_n_workers": 0, "dynamo_backend": "no", "loss_type": "l2", "sdpa": True,
    "huber_scale": 1, "logit_std": 1, "mode_scale": 1.29, "wandb_run_name": "last", "output_name": "last",
    "save_model_as": "safetensors", "caption_extension": ".txt", "train_batch_size": 1, "guidance_scale": 3.5,
}  # fmt: skip
# preset -> what its line must name
NAMED = {
    "flux1D - adamw8bit fp8": ("min_snr_gamma", "noise_offset", "multires_noise_iterations", "sample_every_n_steps"),
    "SDXL - LoRA finetuning phase 1": ("save_last_n_steps_state",),
    "SDXL - AI_Now PagedAdamW8bit": ("learning_rate_te1", "learning_rate_te2"),
    "sd3_bdsqlsz_v1": ("learning_rate_te1", "learning_rate_te2"),
    "dadaptation": ("sample_every_n_epochs",),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gui") / "img"
    make_pictures(folder / "2_sks cat", 1)
    return folder


def read(script: str, path: Path, values: dict[str, Any], *words: str) -> Resolved:
    method, family = SCRIPTS[script]
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    return resolve(METHODS[method][1], FAMILIES[family].option_groups, ["--config_file", str(path), *words], prog="t")


def places(data: Path) -> dict[str, str]:
    own = {"pretrained_model_name_or_path": "m.safetensors", "train_data_dir": str(data)}
    return {**own, "output_dir": str(data.parent / "out")}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_accepted(name: str, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script, values = PRESETS[name]["script"], PRESETS[name]["values"]
    own = {**ALWAYS, **values, **places(data), **({"network_weights": "x"} if values.get("dim_from_weights") else {})}
    found = read(script, tmp_path / "gui.toml", own)
    said = [line for line in found.answers if line.startswith(str(tmp_path))]
    assert len(said) == 1
    assert all(re.search(rf"\b{key}\b", said[0]) for key in NAMED.get(name, ("epoch",) if "epoch" in values else ()))
    options = found.options
    check_schedule(options, choose_optimizer(options.optimizer))
    family = family_class(FAMILIES[SCRIPTS[script][1]])
    with caplog.at_level(logging.ERROR):
        (dataset,) = load_dataset_config(options.data, bucket_step=family.sheet.bucket_step, cache=options.cache)
    assert not [*bucket_problems(dataset.buckets, family.sheet.bucket_step)]


def test_on_the_command_line_the_same_is_a_mistake(data: Path, tmp_path: Path) -> None:
    for script, words, told in (
        ("flux_train_network.py", ("--min_snr_gamma", "5"), "--min_snr_gamma has no meaning here"),
        ("train_network.py", ("--save_last_n_steps_state", "1"), "--save_last_n_steps_state has no effect"),
        ("sdxl_train.py", ("--learning_rate_te1", "1"), "need --train_text_encoder"),
    ):
        with pytest.raises(UserError, match=told):
            read(script, tmp_path / "gui.toml", places(data), *words)


def test_what_makes_the_rest_possible_is_chosen(data: Path, tmp_path: Path) -> None:
    """As other programs take it: blocks wait in main memory, captions are cached, and nothing is said on the rest."""
    for script, *words in (
        ("sd3_train.py", "--blocks_to_swap", "2"),
        ("lumina_train.py", "--blocks_to_swap", "auto"),
        ("flux_train.py", "--blocks_to_swap", "1"),
        ("flux_train.py", "--double_blocks_to_swap", "1"),
    ):
        found = read(script, tmp_path / "c.toml", places(data), *words)
        assert found.options.optimizer.fused_backward_pass
        assert any("--fused_backward_pass is chosen" in line for line in found.answers)
    found = read("lumina_train_network.py", tmp_path / "c.toml", places(data), "--cache_text_encoder_outputs")
    assert found.options.network.network_train_unet_only and "is chosen" in found.answers[-1]
    with pytest.raises(UserError, match=r"give both rates as --text_encoder_lr A B"):
        read("sdxl_train_network.py", tmp_path / "c.toml", places(data), "--text_encoder_lr1", "1e-4")
