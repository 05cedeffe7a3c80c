# SPDX-License-Identifier: Apache-2.0
"""Full training beyond the contract of the families: encoders that learn, rates, the run's outputs, its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.cli import EXIT_STOPPED
from library.errors import UserError
from library.families.registry import FAMILIES
from library.optim.bf16 import Bf16Optimizer
from library.optim.ema import warm_decay
from library.options import Resolved, resolve
from library.trainers.methods.finetune_options import FineTuneTrainerOptions
from tests.families import sd3
from tests.trainers.finetune_runs import Recorded, finetune, open_adapters
from tests.trainers.helpers import argv, make_method, make_pictures, micro_generator, subset, train, write_dataset

HALF: dict[str, Any] = {"mixed_precision": "bf16", "full_bf16": True}


@pytest.fixture(scope="module")
def one_batch(ground: Path) -> Path:
    return write_dataset(ground / "one_batch.toml", subset(make_pictures(ground / "two", 2)))


# ---- several parts that learn ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd3_model(ground: Path) -> dict[str, Any]:
    return {"family": "sd3", **sd3.make(ground / "sd3")}


CLIPS: dict[str, Any] = {"train_text_encoder": True, "learning_rate_te1": 2e-4, "learning_rate_te2": 3e-4}


def test_text_encoders_learn_as_the_literal_reference(
    sd3_model: dict[str, Any], one_batch: Path, tmp_path: Path
) -> None:
    run = finetune(one_batch, tmp_path / "run", **sd3_model, **CLIPS, max_train_steps=1, keep_gradients=True)
    network = train(None, one_batch, tmp_path / "network", **sd3_model, network_module=None, max_train_steps=1)
    prefixes = {name: run.trainer.family.sheet.adapter_prefixes[name] for name in ("clip_l", "clip_g")}
    adapters = open_adapters(network.weights, tuple(f"{prefix}_" for prefix in prefixes.values()))
    batch = run.trainer.data.load(run.trainer.data.plan_epoch(1)[0], step=0)
    loss = sd3.loss(sd3_model, batch, adapters, micro_generator(run, 0))
    loss.backward()
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    found: dict[str, Tensor] = {}
    for name, gradient in run.trainer.gradients[0].items():
        part, _, path = name.partition(".")
        if part in prefixes:
            path = path.removeprefix("text_model.").removesuffix(".weight").replace(".", "_")
            found[f"{prefixes[part]}_text_model_{path}"] = gradient
    expected = {k.removesuffix(".lora_up.weight"): v.grad for k, v in adapters.items() if k.endswith("up.weight")}
    expected = {name: gradient for name, gradient in expected.items() if gradient is not None}
    assert {name.partition("_text")[0] for name in expected} == set(prefixes.values())
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) < 1e-5 * largest, name


def test_each_part_has_its_rate_and_the_rest_stays(sd3_model: dict[str, Any], one_batch: Path, tmp_path: Path) -> None:
    before: dict[str, dict[str, Tensor]] = {}

    def models(trainer: Recorded) -> dict[str, Any]:
        blocks = list(trainer.family.blocks(trainer.models.denoiser))
        return {"first block": blocks[0], "last block": blocks[-1], **trainer.models.encoders}

    def look(trainer: Recorded) -> None:
        for name, module in models(trainer).items():
            before[name] = {key: value.clone() for key, value in module.state_dict().items()}

    run = finetune(
        one_batch, tmp_path, **sd3_model, **{**CLIPS, "learning_rate_te2": 0}, num_last_block_to_freeze=1,
        max_train_steps=2, save_state=True, before=look,
    )  # fmt: skip
    groups = run.trainer.updates.optim.optimizer.param_groups
    assert {group["name"]: group["lr"] for group in groups} == {"denoiser": 1e-3, "clip_l": 2e-4}
    changed = {
        name: sum(not torch.equal(before[name][key], value) for key, value in module.state_dict().items())
        for name, module in models(run.trainer).items()
    }
    assert changed["last block"] == changed["clip_g"] == changed["t5xxl"] == 0
    assert changed["first block"] > 10 and changed["clip_l"] > 10
    learned = run.state.weights.keys()
    assert {name.split(".")[0] for name in learned} == {"denoiser", "clip_l"}
    assert not any(name.startswith("denoiser.transformer_blocks.1.") for name in learned)
    assert run.names("*.safetensors") == ["x.safetensors", "x_clip_l.safetensors"]
    saved = load_file(tmp_path / "x_clip_l.safetensors")
    own = {
        f"text_model.{k.removeprefix('text_model.')}": v
        for k, v in run.trainer.models.encoders["clip_l"].state_dict().items()
    }
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(saved[name], own[name])


def test_only_what_does_not_learn_is_cached(sd3_model: dict[str, Any], one_batch: Path, tmp_path: Path) -> None:
    plain = finetune(one_batch, tmp_path / "plain", **sd3_model, **CLIPS, max_train_steps=2)
    cached = finetune(
        one_batch, tmp_path / "cached", **sd3_model, **CLIPS, max_train_steps=2, cache_text_encoder_outputs=True
    )
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    assert cached.trainer.models.encoders.keys() == {"clip_l", "clip_g"}
    with pytest.raises(UserError, match="fixes the outputs of the text encoders"):
        finetune(
            one_batch, tmp_path / "all", **sd3_model, train_text_encoder=True, train_t5xxl=True,
            cache_text_encoder_outputs=True,
        )  # fmt: skip


# ---- what the frame gives -------------------------------------------------------------------------------------------


def test_previews_validation_and_saves_change_nothing(sd1: Path, ground: Path, tmp_path: Path) -> None:
    """With everything on, the losses are those of the bare run; of the saves those stay that are to stay."""
    data = write_dataset(tmp_path / "data.toml", subset(make_pictures(ground / "ten", 10)), validation_split=0.2)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat, red --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    values: dict[str, Any] = {"family": "sd", "pretrained_model_name_or_path": sd1, "max_train_steps": 6}
    bare = finetune(data, tmp_path / "bare", **values)
    full = finetune(
        data, tmp_path / "full", **values, sample_prompts=prompts, sample_every_n_steps=2, validate_every_n_steps=3,
        save_every_n_steps=2, save_last_n_steps=1, save_state=True, ema_decay=0.9,
    )  # fmt: skip
    assert full.losses == bare.losses
    assert full.names("*.safetensors") == ["x-step00000004.safetensors", "x.safetensors"]
    assert full.names("*-state") == ["x-state", "x-step00000004-state"]
    assert len(list((tmp_path / "full").rglob("*.png"))) >= 3
    assert full.trainer.models.denoiser.training


def test_saved_weights_are_the_moving_average(sd1: Path, one_batch: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    def look(trainer: Recorded) -> None:
        seen.append({name: value.clone() for name, value in trainer.trainables.state().items()})

    run = finetune(
        one_batch, tmp_path, family="sd", pretrained_model_name_or_path=sd1, max_train_steps=3, ema_decay=0.8,
        before=look, each_step=look,
    )  # fmt: skip
    name = "conv_in.weight"  # has the same shape in the published file
    average = seen[0][f"denoiser.{name}"]
    for step, weights in enumerate(seen[1:]):
        decay = warm_decay(0.8, step)
        average = decay * average + (1 - decay) * weights[f"denoiser.{name}"]
    torch.testing.assert_close(run.weights["model.diffusion_model.input_blocks.0.0.weight"], average)
    assert torch.equal(run.trainer.trainables.state()[f"denoiser.{name}"], seen[-1][f"denoiser.{name}"])


@pytest.mark.parametrize(("asked", "kept"), [(None, 0), ("kahan", 2), ("plain", None)])
def test_bf16_weights_are_updated_as_asked(
    asked: str | None, kept: int | None, sd1: Path, one_batch: Path, tmp_path: Path
) -> None:
    """Stochastic rounding is the default; kept: bytes per weight beside it."""
    run = finetune(
        one_batch, tmp_path, family="sd", pretrained_model_name_or_path=sd1, max_train_steps=1, **HALF,
        bf16_update=asked,
    )  # fmt: skip
    optimizer = run.trainer.updates.optim.optimizer
    if kept is None:
        assert not isinstance(optimizer, Bf16Optimizer)
        return
    assert isinstance(optimizer, Bf16Optimizer)
    rests = [weight.rest for own in optimizer.weights for weight in own]
    assert [0 if r is None else r.element_size() for r in rests] == [kept] * len(rests)
    assert {value.dtype for value in run.weights.values()} >= {torch.bfloat16}


def test_stops_and_says_how_to_go_on(sd1: Path, one_batch: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"family": "sd", "pretrained_model_name_or_path": sd1}
    run = finetune(one_batch, tmp_path, interrupt_in=2, **values)
    assert run.code == EXIT_STOPPED
    assert run.names("x-step*") == ["x-step00000002-state", "x-step00000002.safetensors"]
    with pytest.raises(UserError, match="--full_bf16 was False, is True"):
        finetune(one_batch, tmp_path, resume=tmp_path / "x-step00000002-state", **values, **HALF)


# ---- options --------------------------------------------------------------------------------------------------------


GIVEN: dict[str, Any] = {"pretrained_model_name_or_path": "m", "dataset_config": "d.toml", "output_dir": "o"}


def read(family: str = "flux", **values: Any) -> Resolved:
    return resolve(FineTuneTrainerOptions, FAMILIES[family].option_groups, argv({**GIVEN, **values}), prog="test")


def test_bf16_update_goes_with_full_bf16() -> None:
    assert read().options.bf16_update == "plain"
    assert read(**HALF).options.bf16_update == "stochastic"
    assert read(**HALF, optimizer_type="adamw8bitkahan").options.bf16_update == "kahan"
    with pytest.raises(UserError, match="keeps what rounding cuts off: leave --bf16_update stochastic out"):
        read(**HALF, optimizer_type="AdamW8bitKahan", bf16_update="stochastic")
    for kind in ("kahan", "plain"):
        assert read(**HALF, bf16_update=kind).options.bf16_update == kind
    with pytest.raises(UserError, match="--bf16_update has no effect without --full_bf16"):
        read(bf16_update="kahan")
    with pytest.raises(UserError, match="--bf16_update 'kahn' is not one of stochastic, kahan, plain"):
        read(**HALF, bf16_update="kahn")


@pytest.mark.parametrize("family", ["flux", "sd3", "lumina"])
def test_the_one_format_answers_for_all(family: str, caplog: pytest.LogCaptureFixture) -> None:
    for kind in ("ckpt", "diffusers", "diffusers_safetensors", "safetensors", None):
        trainer = make_method("finetune", {**GIVEN, "save_model_as": kind}, family=family)
        assert (trainer.format, trainer.extension) == ("safetensors", ".safetensors")
        with caplog.at_level("INFO", "trainyard"):
            trainer.check_format()
        assert ("--save_model_as: this model is always saved as .safetensors" in caplog.text) == (kind is not None)
        caplog.clear()
    with pytest.raises(UserError, match="--save_model_as 'pt' is not one of"):
        read(family, save_model_as="pt")


@pytest.mark.parametrize(
    ("given", "after_file", "after_folder"),
    [
        ({}, "ckpt", "diffusers"),
        ({"use_safetensors": True}, "safetensors", "diffusers_safetensors"),
        ({"save_model_as": "ckpt"}, "ckpt", "ckpt"),
        ({"save_model_as": "ckpt", "use_safetensors": True}, "safetensors", "safetensors"),
        ({"save_model_as": "diffusers", "use_safetensors": True}, "diffusers_safetensors", "diffusers_safetensors"),
        ({"save_model_as": "safetensors"}, "safetensors", "safetensors"),
    ],
)
def test_the_format_follows_the_input(
    given: dict[str, Any], after_file: str, after_folder: str, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").touch()
    for name, expected in (("model.safetensors", after_file), ("", after_folder)):
        values = {**GIVEN, "pretrained_model_name_or_path": tmp_path / name, **given}
        assert make_method("finetune", values, family="sd").format == expected


def test_options_without_effect_are_answered() -> None:
    names = ("mem_eff_save", "skip_latents_validity_check")
    lines = read(fused_backward_pass=True, **dict.fromkeys(names, True)).answers
    assert not any("fused_backward_pass" in line for line in lines)
    for name in names:
        assert sum(line.startswith(f"--{name}: ") for line in lines) == 1, name


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"optimizer_type": "DAdaptAdam"}, "DAdaptAdam needs all of them at once"),
        ({"optimizer_type": "AdamWScheduleFree"}, "AdamWScheduleFree needs all of them at once"),
        ({"optimizer_type": "Muon"}, "Muon needs all of them at once"),
        ({"mixed_precision": "fp16"}, "does not work with --mixed_precision fp16"),
        ({"deepspeed": True}, "does not work with --deepspeed"),
    ],
)
def test_steps_during_the_backward_pass_are_refused_where_they_cannot_be(values: dict[str, Any], line: str) -> None:
    """Before anything is read."""
    for option in ({"fused_backward_pass": True}, {"blockwise_fused_optimizers": True}, {"fused_optimizer_groups": 2}):
        (name,) = option
        with pytest.raises(UserError, match=f"--{name} .*{line}"):
            make_method("finetune", {**GIVEN, **option, **values}, family="sd").check_in_backward()
        make_method("finetune", {**GIVEN, **option, "mixed_precision": "bf16"}, family="sd").check_in_backward()


def test_steps_during_the_backward_pass_need_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_method("finetune", {**GIVEN, "fused_backward_pass": True}, family="sd")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--fused_backward_pass works in one process only"):
        trainer.check_in_backward()
