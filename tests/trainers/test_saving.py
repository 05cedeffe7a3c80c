# SPDX-License-Identifier: Apache-2.0
"""When a run saves, under which names, in which form, and what it removes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.errors import EXIT_STOPPED
from library.io.state import load_state
from library.options import read_toml
from tests.trainers.helpers import DEFAULTS, Recorded, train

# Three steps an epoch. What is there after the run, without ".safetensors"; "-state" are folders.
SCHEDULES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "at the end": ({"max_train_steps": 2}, ["x"]),
    "a state at the end": ({"max_train_steps": 2, "save_state_on_train_end": True}, ["x", "x-state"]),
    "epochs": ({"max_train_epochs": 3, "save_every_n_epochs": 1}, ["x", "x-000001", "x-000002"]),
    "every second epoch": ({"max_train_epochs": 5, "save_every_n_epochs": 2}, ["x", "x-000002", "x-000004"]),
    "ratio": ({"max_train_epochs": 4, "save_n_epoch_ratio": 2}, ["x", "x-000002"]),
    "steps": ({"max_train_steps": 5, "save_every_n_steps": 2}, ["x", "x-step00000002", "x-step00000004"]),
    "last epochs": (
        {"max_train_epochs": 5, "save_every_n_epochs": 1, "save_last_n_epochs": 2, "save_state": True},
        ["x", "x-000003", "x-000003-state", "x-000004", "x-000004-state", "x-state"],
    ),
    "last steps, fewer states": (
        {"max_train_steps": 6, "save_every_n_steps": 1, "save_last_n_steps": 2, "save_state": True,
         "save_last_n_steps_state": 1},
        ["x", "x-state", "x-step00000003", "x-step00000004", "x-step00000004-state", "x-step00000005",
         "x-step00000005-state"],
    ),
    "epochs and steps": (
        {"max_train_epochs": 2, "save_every_n_steps": 3, "save_every_n_epochs": 1}, ["x", "x-000001", "x-step00000003"],
    ),
    # each state that is due takes the place of the one before, but not of one that belongs to a save
    "states by the clock": (
        {"max_train_steps": 5, "save_state_every_minutes": 1e-9}, ["x", "x-step00000004-state"],
    ),
    "states by the clock and with saves": (
        {"max_train_steps": 4, "save_state_every_minutes": 1e-9, "save_every_n_steps": 2, "save_state": True},
        ["x", "x-state", "x-step00000002", "x-step00000002-state", "x-step00000003-state"],
    ),
    "without a name": (
        {"output_name": None, "max_train_epochs": 2, "save_every_n_steps": 2, "save_every_n_epochs": 1,
         "save_state": True},
        ["at-step00000002", "at-step00000002-state", "at-step00000004", "at-step00000004-state", "epoch-000001",
         "epoch-000001-state", "last", "last-state"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_names_of_saves(name: str, sd1: Path, dataset: Path, tmp_path: Path) -> None:
    values, expected = SCHEDULES[name]
    train(sd1, dataset, tmp_path, cache_latents=True, network_train_unet_only=True, **values)
    found = {path.name.removesuffix(".safetensors") for path in tmp_path.iterdir() if path.suffix != ".toml"}
    assert found == set(expected)
    for state in tmp_path.glob("*-state"):
        load_state(state)


def test_the_time_of_a_run_is_limited(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    def end_of_time(trainer: Recorded) -> None:
        assert trainer.checked.stop.most_seconds == 90
        if trainer.position.step == 1:  # in the second step
            trainer.checked.stop.most_seconds = 0

    run = train(sd1, dataset, tmp_path, max_train_minutes=1.5, each_step=end_of_time)
    assert run.code == EXIT_STOPPED and run.names("*-state") == ["x-step00000002-state"]


def test_save_after_a_step_holds_the_weights_of_that_step(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    train(
        sd1, dataset, tmp_path, save_every_n_steps=2, each_step=lambda trainer: seen.append(trainer.network.state(None))
    )
    for step, file in ((2, "x-step00000002"), (4, "x")):
        saved = load_file(tmp_path / f"{file}.safetensors")
        assert all(torch.equal(saved[key], value) for key, value in seen[step - 1].items())


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_save_precision(precision: str, dtype: torch.dtype, sd1: Path, dataset: Path, tmp_path: Path) -> None:
    """The file is in that format, the state is as trained."""
    run = train(sd1, dataset, tmp_path, save_precision=precision, save_state=True, max_train_steps=1)
    assert {value.dtype for value in run.weights.values()} == {dtype}
    assert {value.dtype for value in run.state.weights.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["ckpt", "pt"])
def test_other_file_types(kind: str, sd1: Path, dataset: Path, tmp_path: Path) -> None:
    run = train(sd1, dataset, tmp_path / "a", save_model_as=kind, max_train_steps=1)
    twin = train(sd1, dataset, tmp_path / "b", max_train_steps=1)
    assert run.names() == sorted([f"x.{kind}", "x.config.toml"])
    found = torch.load(tmp_path / "a" / f"x.{kind}", weights_only=True)
    assert all(torch.equal(found[key], value) for key, value in twin.weights.items()) and len(found) == len(
        twin.weights
    )


def test_metadata_tells_the_run(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    run = train(
        sd1, dataset, tmp_path, max_train_epochs=2, gradient_accumulation_steps=2, network_args=["conv_dim=2"],
        training_comment="hello", metadata_author="me", optimizer_type="AdamW", optimizer_args=["weight_decay=0.1"],
    )  # fmt: skip
    told = run.metadata
    expected = {
        "ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_seed": "7",
        "ss_network_args": '{"conv_dim": "2", "dropout": null}', "ss_steps": "4", "ss_epoch": "2", "ss_num_epochs": "2",
        "ss_max_train_steps": "4", "ss_num_batches_per_epoch": "3", "ss_gradient_accumulation_steps": "2",
        "ss_num_train_images": "5", "ss_training_comment": "hello", "ss_base_model_version": "sd_v1",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)", "ss_output_name": "x",
        "modelspec.author": "me", "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "epsilon",
    }  # fmt: skip
    assert {key: told.get(key) for key in expected} == expected
    assert len(told["sshs_model_hash"]) == 64 and len(told["sshs_legacy_hash"]) == 8

    bare = train(sd1, dataset, tmp_path / "bare", max_train_steps=1, no_metadata=True).metadata
    assert set(bare) < set(told) and "ss_network_module" in bare and "ss_seed" not in bare


def test_config_beside_the_output_repeats_the_run(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    run = train(
        sd1, dataset, tmp_path / "first", max_train_steps=2, unet_lr=1e-3, network_args=["conv_dim=2", "conv_alpha=1"]
    )
    config = tmp_path / "first" / "x.config.toml"
    values = read_toml(config, "--config_file")
    assert values["network_args"] == ["conv_dim=2", "conv_alpha=1"] and values["unet_lr"] == 1e-3
    others = dict.fromkeys(DEFAULTS)
    again = train(sd1, dataset, tmp_path / "second", config_file=config, **others)
    assert all(torch.equal(again.weights[key], value) for key, value in run.weights.items())
