# SPDX-License-Identifier: Apache-2.0
"""Every option of today's train_network.py is known, with the same default, and so is a file of the kohya_ss GUI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from safetensors import safe_open

from library.cli import option_groups
from library.families.registry import FAMILIES
from library.foreign_keys import FOREIGN_KEYS
from library.options import Spec, resolve, specs
from library.trainers.options import NetworkTrainerOptions
from tests.script_runner import run_script
from tests.trainers.helpers import make_pictures
from tools import make_options_doc

DATA = json.loads((Path(__file__).parents[1] / "data_files/trainers/train_network_options.json").read_text())
OPTIONS: dict[str, dict[str, Any]] = {row["name"]: row for row in DATA["options"]}
OURS: dict[str, Spec] = specs(option_groups("network", "sd"))

# Where we differ on purpose: option -> (values that we take besides or instead, why).
DIFFERENT: dict[str, tuple[list[Any], str]] = {
    "max_token_length": ([75, 150, 225], "theirs has no 75, which graphical programs write for the shortest length"),
    "dynamo_backend": (["no"], "graphical programs write no where nothing is compiled"),
    "huggingface_repo_type": (["model", "dataset", "space"], "theirs takes any text, and the hub knows these"),
    "huggingface_repo_visibility": (["public", "private"], "theirs takes any text, and the hub knows these"),
}
# A value of each kind as it stands on a command line, and what it is.
SAMPLES = {"bool": ("true", True), "int": ("3", 3), "float": ("0.5", 0.5), "int_or_float": ("0.25", 0.25)}
# Options that take only certain values, none of which is the sample of their kind.
OWN_SAMPLES = {
    "max_token_length": ("150", 150),
    "lr_scheduler_min_lr_ratio": ("0.5", 0.5),
    "resolution": ("512,768", (512, 768)),
    "face_crop_aug_range": ("1.5,3", (1.5, 3.0)),
    "caption_extension": (".tags", ".tags"),
    "caption_extention": ("tags", ".tags"),
}


# ---- the other scripts ----------------------------------------------------------------------------------------------

SCRIPTS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "data_files/trainers/script_options.json").read_text()
)["scripts"]
THEIRS: dict[str, dict[str, dict[str, Any]]] = {
    script: {
        **{name: row for name, row in OPTIONS.items() if name not in facts["without"]},
        **{row["name"]: row for row in facts["options"]},
    }
    for script, facts in SCRIPTS.items()
}
METHOD_AND_FAMILY = {script: make_options_doc.SCRIPTS[f"{script}.py"] for script in SCRIPTS}
# (script or part of its name, option) -> why its default or its choices are not those of today
DIFFERENT_THERE = {
    ("_train", "save_model_as"): "one format: what is asked for besides is answered with one line",
    ("lumina", "gemma2_max_token_length"): "theirs says None and takes 256",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_of_the_script_is_known_with_its_default(script: str) -> None:
    ours = specs(option_groups(*METHOD_AND_FAMILY[script]))
    assert sorted(THEIRS[script].keys() - ours.keys()) == []
    wrong = {}
    for name, theirs in THEIRS[script].items():
        if any(part in script and name == option for part, option in DIFFERENT_THERE):
            continue
        own = ours[name]
        default = list(own.default) or None if isinstance(own.default, tuple) else own.default
        if default != theirs["default"] or (own.hint is bool) != (theirs["type"] == "bool"):
            wrong[name] = (default, theirs["default"])
        for choice in theirs.get("choices", []):
            if choice is not None and name not in DIFFERENT:
                assert own.read(choice) is not None
    assert wrong == {}


def test_there_are_193() -> None:
    assert len(OPTIONS) == 193
    assert sorted(OPTIONS.keys() - OURS.keys()) == []


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name: str) -> None:
    theirs, ours = OPTIONS[name], OURS[name]
    assert (list(ours.default) or None if isinstance(ours.default, tuple) else ours.default) == theirs["default"]
    assert ours.takes_many == theirs.get("many", False)
    assert (ours.hint is bool) == (theirs["type"] == "bool")
    choices = [choice for choice in theirs.get("choices", []) if choice is not None]
    for choice in choices:
        assert ours.read(str(choice)) == choice  # as text, as a command line has it
        assert ours.read(choice) == choice  # as TOML has it
    if name not in DIFFERENT:
        assert ours.info.choices == () if not choices else set(map(str, choices)) >= set(ours.info.choices)
    if not choices and name not in DIFFERENT:
        text, value = OWN_SAMPLES.get(name) or SAMPLES.get(theirs["type"], ("text", "text"))
        if ours.takes_many:
            text, value = [text], (value,)
        if not ours.info.choices:
            assert ours.read(text) == value


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_token_length_that_a_graphical_program_writes(family: str) -> None:
    """lora-scripts has 255 as its default, of which sd-scripts makes three chunks."""
    spec = specs(option_groups("network", family))["max_token_length"]
    assert [spec.read(value) for value in (255, "255", 225)] == [225, 225, 225]


@pytest.mark.parametrize("name", DIFFERENT)
def test_deliberate_differences(name: str) -> None:
    for value in DIFFERENT[name][0]:
        assert OURS[name].read(value) == value
    with pytest.raises(ValueError):
        OURS[name].read(100)


# ---- the file of the kohya_ss GUI -----------------------------------------------------------------------------------

# What the LoRA tab writes with its defaults and some fields filled in. It leaves out what is empty, False or 0.
GUI: dict[str, Any] = {
    "bucket_no_upscale": True, "bucket_reso_steps": 64, "cache_latents": True, "caption_extension": ".txt",
    "clip_skip": 1, "discrete_flow_shift": 3.0, "dynamo_backend": "no", "enable_bucket": True, "epoch": 1,
    "gradient_accumulation_steps": 1, "gradient_checkpointing": True, "guidance_scale": 3.5, "huber_c": 0.1,
    "huber_scale": 1, "huber_schedule": "snr", "keep_tokens": 1, "learning_rate": 1e-4, "logit_std": 1,
    "loss_type": "l2", "lr_scheduler": "cosine", "lr_scheduler_args": [], "lr_scheduler_num_cycles": 1,
    "lr_scheduler_power": 1, "lr_warmup_steps": 1, "max_bucket_reso": 2048, "max_data_loader_n_workers": 0,
    "max_grad_norm": 1, "max_timestep": 1000, "max_token_length": 75, "max_train_steps": 3, "min_bucket_reso": 256,
    "mixed_precision": "bf16", "mode_scale": 1.29, "model_prediction_type": "sigma_scaled",
    "multires_noise_discount": 0.3, "network_alpha": 1, "network_args": [], "network_dim": 8,
    "network_module": "networks.lora", "noise_offset_type": "Original",
    "optimizer_args": [], "optimizer_type": "AdamW", "output_name": "last",
    "prior_loss_weight": 1, "resolution": "64,64", "sample_sampler": "euler_a", "save_every_n_epochs": 1,
    "save_model_as": "safetensors", "save_precision": "fp16", "sdpa": True, "t5xxl_max_token_length": 512,
    "text_encoder_lr": [5e-5, 0.0001], "timestep_sampling": "sigma", "train_batch_size": 2, "unet_lr": 1e-4,
    "wandb_run_name": "last", "xformers": True,
}  # fmt: skip
# The same fields as older versions and other programs write them: empty and 0 where nothing was chosen.
EMPTY: dict[str, Any] = {
    "adaptive_noise_scale": 0, "async_upload": False, "caption_dropout_every_n_epochs": 0, "caption_dropout_rate": 0,
    "clip_skip": 0, "dataset_config": "", "debiased_estimation_loss": False, "huggingface_repo_id": "",
    "huggingface_repo_type": "", "huggingface_repo_visibility": "", "huggingface_token": "", "ip_noise_gamma": 0,
    "keep_tokens": "0", "log_tracker_config": "", "log_with": "", "lr_scheduler_type": "", "lr_warmup_steps": 0,
    "max_timestep": 0, "max_train_epochs": 0, "max_train_steps": "3", "min_snr_gamma": 0, "min_timestep": 0,
    "multires_noise_iterations": 0, "network_dropout": 0, "network_weights": "", "noise_offset": 0, "reg_data_dir": "",
    "resume": "", "sample_every_n_epochs": 0, "sample_every_n_steps": 0, "save_every_n_steps": 0,
    "save_last_n_epochs": 0, "save_last_n_steps": 0, "save_last_n_steps_state": 0, "scale_weight_norms": 0, "seed": 0,
    "stop_text_encoder_training": 0, "training_comment": "", "v2": False, "v_pred_like_loss": 0, "vae": "",
    "vae_batch_size": 0, "wandb_api_key": "", "weighted_captions": False,
}  # fmt: skip


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(dict(sorted(values.items()))), encoding="utf-8")
    return path


def places(sd1: Path, folder: Path) -> dict[str, str]:
    make_pictures(folder / "img" / "2_sks cat", 3)
    (folder / "model").mkdir()
    prompts = folder / "model" / "prompt.txt"
    prompts.write_text("")  # the GUI makes this file, whether previews are wanted or not
    return {
        "pretrained_model_name_or_path": str(sd1),
        "train_data_dir": str(folder / "img"),
        "output_dir": str(folder / "model"),
        "logging_dir": str(folder / "log"),
        "sample_prompts": str(prompts),
    }


def test_every_key_of_the_gui_is_known() -> None:
    assert [key for key in DATA["gui_keys"] if key not in OURS and key not in FOREIGN_KEYS] == []
    assert [key for key in {**GUI, **EMPTY} if key not in DATA["gui_keys"]] == []


def test_file_of_the_gui_trains_to_the_end(sd1: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config_lora.toml", {**GUI, **places(sd1, tmp_path), "sample_every_n_steps": 1})
    ended = run_script("--config_file", str(config))
    assert ended.code == 0, ended.text
    with safe_open(tmp_path / "model" / "last.safetensors", "pt") as file:
        assert file.metadata()["ss_steps"] == "3" and file.metadata()["ss_network_dim"] == "8"
    said = [line for line in ended.text.splitlines() if "not used by this script" in line]
    assert len(said) == 1 and str(config) in said[0]
    foreign = [key for key in GUI if key not in OURS]
    assert sorted(said[0].rpartition(": ")[2].split(", ")) == sorted(foreign) and "epoch" in foreign
    assert "prompt.txt is empty: no previews are made" in ended.text
    assert ended.text.count("--xformers") == 1 and "--sdpa" in ended.text


def test_empty_fields_are_as_if_they_were_not_there(sd1: Path, tmp_path: Path) -> None:
    own = places(sd1, tmp_path)
    full = write_config(tmp_path / "full.toml", {**GUI, **own, **EMPTY})
    bare = write_config(
        tmp_path / "bare.toml",
        {k: v for k, v in {**GUI, **own}.items() if k not in EMPTY} | {"max_train_steps": 3, "seed": 0},
    )

    def read(path: Path) -> dict[str, Any]:
        families = FAMILIES["sd"].option_groups
        options = resolve(NetworkTrainerOptions, families, ["--config_file", str(path)], prog="test").options
        groups = {name: vars(group) for name, group in vars(options).items() if name != "config"}
        return {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}

    one, other = read(full), read(bare)
    differing = {name: (one[name], other[name]) for name in one if one[name] != other[name]}
    # 0 stays where it means the same as not given
    assert all(not value and not default for value, default in differing.values()), differing


def test_keys_of_other_architectures_are_answered_in_one_line(sd1: Path, tmp_path: Path) -> None:
    others = {key: "x" for key in DATA["gui_keys"] if key not in OURS}
    config = write_config(tmp_path / "all.toml", {**GUI, **places(sd1, tmp_path), **others})
    answers = resolve(
        NetworkTrainerOptions, FAMILIES["sd"].option_groups, ["--config_file", str(config)], prog="test"
    ).answers
    (line,) = [answer for answer in answers if "not used by this script" in answer]
    assert all(key in line for key in others)
