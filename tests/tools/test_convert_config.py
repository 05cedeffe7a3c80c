# SPDX-License-Identifier: Apache-2.0
"""tools/convert_config.py: examples of other trainers' documentation become runs, and what is lost is named."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from library.options import read_toml
from tests.families import flux, sana
from tests.trainers.helpers import Recorded, make_method, make_pictures, quick_previews
from tools import make_coming_from_doc
from tools.convert_config import main
from tools.other_trainers import READERS
from tools.other_trainers.keys import OPTIMIZER_NAMES

EXAMPLES = Path(__file__).parents[1] / "data_files/trainers/others"
# example -> options and keys of the first dataset that must come out of it, among them defaults that are not ours
EXPECTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ai_toolkit_kontext.yaml": (
        {"task": "edit", "model_type": "kontext", "network_dim": 16, "optimizer_type": "AdamW8bit",
         "learning_rate": 1e-4, "max_train_steps": 3000, "timestep_sampling": "sigmoid", "max_grad_norm": 1.0,
         "save_last_n_steps": 750, "fp8_base_unet": True},
        {"resolution": 512, "enable_bucket": True, "bucket_reso_steps": 64},
    ),
    "diffusers_sana.sh": (
        {"network_dim": 4, "network_alpha": 4, "gradient_accumulation_steps": 4, "lr_scheduler": "constant",
         "optimizer_args": ["betas=(0.9, 0.999)", "weight_decay=0.0001", "eps=1e-08"], "save_every_n_steps": 500},
        {"resolution": 1024, "batch_size": 1, "enable_bucket": False},
    ),
    "diffusion_pipe_flux.toml": (
        {"network_dim": 32, "network_alpha": 32, "timestep_sampling": "flux_shift", "guidance_scale": 1.0,
         "max_train_epochs": 1000, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 100,
         "save_state_every_minutes": 120, "fp8_base_unet": True, "save_precision": "bf16"},
        {"resolution": 512, "batch_size": 1, "enable_bucket": True, "max_bucket_reso": 736},
    ),
    "simpletuner_flux.json": (
        {"network_dim": 16, "network_alpha": 16, "network_dropout": 0.1, "max_grad_norm": 2.0,
         "lr_scheduler": "polynomial", "lr_scheduler_power": 0.8, "discrete_flow_shift": 3.0, "guidance_scale": 1.0},
        {"resolution": 1024, "batch_size": 1},
    ),
    "musubi_kontext.sh": (
        {"task": "edit", "model_type": "kontext", "network_dim": 32, "network_alpha": 1.0,
         "clip_l": "path/to/text_encoder2", "t5xxl": "path/to/text_encoder1", "ae": "path/to/ae_model",
         "guidance_scale": 1.0, "model_prediction_type": "raw"},
        {"resolution": [1024, 1024], "batch_size": 1, "bucket_reso_steps": 16},
    ),
    "onetrainer_flux.json": (
        {"network_dim": 16, "network_alpha": 1.0, "learning_rate": 3e-4, "max_train_epochs": 100,
         "lr_warmup_steps": 200, "timestep_sampling": "sigmoid", "base_quant": "nf4", "mixed_precision": "bf16"},
        {"resolution": 768, "batch_size": 4},
    ),
    "kohya_gui_sdxl.json": (
        {"network_module": "networks.lora", "max_train_epochs": 10, "lr_warmup_steps": 0.1,
         "optimizer_args": ["weight_decay=0.1"]},
        {},
    ),
}  # fmt: skip


def convert(source: Path, output: Path, *words: str) -> int:
    return main([str(source), "--output", str(output), *words])


@pytest.mark.parametrize("name", EXPECTED)
def test_example_is_converted(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, data = EXPECTED[name]
    assert convert(EXAMPLES / name, tmp_path / "run") == 0
    assert capsys.readouterr().out.endswith(f" --config_file {tmp_path / 'run.toml'}\n")
    found = read_toml(tmp_path / "run.toml", "test")
    assert {key: found.get(key) for key in options} == options
    if data:
        first = read_toml(tmp_path / "run_dataset.toml", "test")["datasets"][0]
        assert {key: first.get(key) for key in data} == data
    before = (tmp_path / "run.toml").read_bytes()
    assert convert(EXAMPLES / name, tmp_path / "run") == 2  # never replaced unless asked
    assert (tmp_path / "run.toml").read_bytes() == before
    assert "--overwrite" in capsys.readouterr().err
    assert convert(EXAMPLES / name, tmp_path / "run", "--overwrite") == 0


def small(folder: Path, data: Path, controls: Path) -> None:
    """The converted dataset with our pictures, 64 pixels wide."""
    path = folder / "run_dataset.toml"
    text = re.sub(r"(?m)^(resolution|\w+_bucket_reso) = .*", r"\1 = 64", path.read_text(encoding="utf-8"))
    text = re.sub(r"(?m)^image_dir = .*", f'image_dir = "{data}"', text)
    text = re.sub(r"(?m)^conditioning_data_dir = .*", f'conditioning_data_dir = "{controls}"', text)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", ["ai_toolkit_kontext.yaml", "diffusers_sana.sh"])
def test_converted_example_trains(name: str, tmp_path: Path) -> None:
    """One step on a tiny model, with the converted options but for what a small machine has not."""
    assert convert(EXAMPLES / name, tmp_path / "run") == 0
    kind = flux if "kontext" in name else sana
    model = kind.make(tmp_path / "model")
    data, controls = (make_pictures(tmp_path / part, 2, first=first) for part, first in (("data", 0), ("controls", 0)))
    for path in controls.glob("*.png"):
        path.write_bytes((make_pictures(tmp_path / "other", 1, first=9) / "p09.png").read_bytes())
    small(tmp_path, data, controls)
    own = {
        "optimizer_type": "AdamW", "mixed_precision": "no", "max_train_steps": 1, "max_data_loader_n_workers": 0,
        "output_dir": tmp_path / "out", "output_name": "x", "fp8_base_unet": "false", "log_with": "tensorboard",
        "sample_at_first": "false", "gradient_accumulation_steps": 1, **quick_previews(tmp_path),
    }  # fmt: skip
    family = "flux" if kind is flux else "sana"
    method = make_method("network", {"config_file": tmp_path / "run.toml", **model, **own}, family=family)
    assert Recorded(method).run() == 0
    with safe_open(tmp_path / "out/x.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == str(EXPECTED[name][0]["network_dim"])


def test_what_is_lost_or_changed_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = (EXAMPLES / "ai_toolkit_kontext.yaml").read_text(encoding="utf-8")
    job = job.replace("steps: 3000", "steps: 3000\n        stepz: 3\n        linear_timesteps: true")
    (tmp_path / "job.yaml").write_text(job.replace('"adamw8bit"', '"automagic"'), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert convert(tmp_path / "job.yaml", tmp_path / "run") == 0
    for start in ("not carried over: train.stepz: not a known key (nearest: steps)",
                  "not carried over: train.linear_timesteps: no weights",
                  "not carried over: train.optimizer: 'automagic' has no counterpart here: AdamW",
                  "not carried over: train.timestep_type: 'weighted'",
                  "changed: model.qtype: qfloat8"):  # fmt: skip
        assert sum(message.startswith(start) for message in caplog.messages) == 1, start
    assert not any("device" in message for message in caplog.messages)


BAD = {
    "not.yaml": ("a: [", "is not valid YAML"),
    "unsafe.yaml": ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
    "other.yaml": ("a: 1", "is of no trainer that is known"),
    "wan.toml": ("dataset = 'd.toml'\n[model]\ntype = 'wan'", "model.type: 'wan' is not trained here"),
    "data.json": ('{"model_family": "flux", "model_type": "lora"}', "data_backend_config: is missing"),
    "none.sh": ("echo hello", "holds no command"),
    "quote.sh": ("python train_dreambooth_lora_sana.py --a 'b", "cannot be read as a command"),
    "pixart.sh": ("python train_dreambooth_lora_hidream.py", "trains no model that is trained here"),
    "folder.sh": ("python train_dreambooth_lora_sana.py --dataset_name a", "--instance_data_dir: is missing"),
    "value.sh": ("python train_dreambooth_lora_sana.py --instance_data_dir a --learning_rate x", "for --learning_rate"),
    "kind.json": ('{"model_type": "FLUX_DEV_1", "base_model_name": "m", "output_model_destination":1}', "not expected"),
    "name.ini": ("", "ends with none of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, told = BAD[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert convert(tmp_path / name, tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line and name in line
    assert not (tmp_path / "run.toml").exists()


def test_from_names_the_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shutil.copy(EXAMPLES / "kohya_gui_sdxl.json", tmp_path / "a.json")
    assert convert(Path(source), tmp_path / "run", "--from", "onetrainer") == 2
    assert "is not a file of onetrainer" in capsys.readouterr().err
    assert convert(Path(source), tmp_path / "run", "--from", "kohya_ss") == 0


def test_optimizers_that_are_named_exist() -> None:
    from library.optim.optimizers import OPTIMIZERS

    assert set(OPTIMIZER_NAMES.values()) <= set(OPTIMIZERS)
    assert all(name == name.lower() for name in OPTIMIZER_NAMES)


def test_page_is_up_to_date() -> None:
    text = make_coming_from_doc.PAGE.read_text(encoding="utf-8")
    assert text == make_coming_from_doc.text(), "run python tools/make_coming_from_doc.py"
    assert all(f"## {module.TITLE}\n" in text for module in READERS.values())
