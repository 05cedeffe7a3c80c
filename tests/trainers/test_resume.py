# SPDX-License-Identifier: Apache-2.0
"""A run that was stopped and resumed ends with the same bits as one that was never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from library.errors import EXIT_STOPPED, UserError
from library.io.state import load_state, newest_state, read_facts
from tests.io.test_state import edited_facts, signed
from tests.trainers.helpers import (
    Recorded,
    assert_same_run,
    differing,
    make_pictures,
    subset,
    train,
    train_with_stops,
    write_dataset,
)

# Everything that draws, remembers or counts at once. Captions: shuffle, drop, warm up; pictures: flip, random crop.
EVERYTHING: dict[str, Any] = {
    "network_args": ["rank_dropout=0.2", "module_dropout=0.1", "conv_dim=2", "conv_alpha=1"],
    "network_dropout": 0.1,
    "noise_offset": 0.1,
    "noise_offset_random_strength": True,
    "adaptive_noise_scale": 0.05,
    "multires_noise_iterations": 3,
    "ip_noise_gamma": 0.1,
    "ip_noise_gamma_random_strength": True,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "ema_decay": 0.9,
    "max_train_steps": 7,
    "save_state": True,
}
CAPTIONS = {
    "shuffle_caption": True,
    "keep_tokens": 1,
    "caption_dropout_rate": 0.2,
    "caption_tag_dropout_rate": 0.2,
    "token_warmup_min": 1,
    "token_warmup_step": 5,
}


@pytest.fixture(scope="module")
def lively(ground: Path) -> Path:
    """Five pictures of another shape than the bucket, three batches an epoch: nothing is the same twice."""
    pictures = make_pictures(ground / "wide pictures", 5, size=(112, 72))
    return write_dataset(ground / "lively.toml", subset(pictures, flip_aug=True, random_crop=True, **CAPTIONS))


# Where to stop, and what to change. With 3 batches an epoch and accumulation 2 the second group holds 1 batch.
STOPS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "inside an epoch": ([2], {}),
    "at an epoch's end, then inside": ([3, 5], {}),
    "accumulation 2": ([1, 4], {"gradient_accumulation_steps": 2}),
    "accumulation 3, more than an epoch has": ([2], {"gradient_accumulation_steps": 4, "max_train_steps": 4}),
    "2 workers, accumulation 2": ([2, 3], {"max_data_loader_n_workers": 2, "gradient_accumulation_steps": 2}),
    "bf16": ([2, 4], {"mixed_precision": "bf16"}),
    "full bf16": ([3], {"mixed_precision": "bf16", "full_bf16": True}),
    "gradient checkpointing": ([2], {"gradient_checkpointing": True}),
    "a schedule that follows the loss": ([3], {"lr_scheduler": "reduce_lr_on_plateau", "lr_warmup_steps": 0,
                                               "lr_scheduler_args": ["patience=0", "factor=0.5"]}),
    "saves folded forms": ([3], {"network_args": ["use_scalar=True", "rs_lora=True", "dora_wd=True", "train_norm=True"],
                                 "network_dim": 6, "network_alpha": 0.7}),
}  # fmt: skip


@pytest.mark.parametrize("case", STOPS)
def test_stopped_run_ends_as_the_whole_one(case: str, sd1: Path, lively: Path, tmp_path: Path) -> None:
    stops, changes = STOPS[case]
    values = {**EVERYTHING, **changes}
    whole = train(sd1, lively, tmp_path / "whole", **values)
    assert_same_run(train_with_stops(sd1, lively, tmp_path / "stopped", stops, **values), whole)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    # states in 8 bits only from this size on, which is 4096 by default: more than these layers have
    "AdamW8bit": {"optimizer_args": ["min_8bit_size=64"]},
    "Lion": {"learning_rate": 1e-3},
    "Prodigy": {"learning_rate": 1.0},
    "AdamWScheduleFree": {},
    "DAdaptAdam": {"learning_rate": 1.0},
    "Adafactor": {},
    "SGDNesterov": {},
    "Muon": {},
    "ProdigyPlusScheduleFree": {"learning_rate": 1.0},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_resumes(name: str, sd1: Path, lively: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"optimizer_type": name, "max_train_steps": 4, "save_state": True, **OPTIMIZERS[name]}
    whole = train(sd1, lively, tmp_path / "whole", **values)
    assert_same_run(train_with_stops(sd1, lively, tmp_path / "stopped", [2], **values), whole)
    kinds = {value.dtype for part in whole.state.optimizer["state"].values() for value in tensors_of(part)}
    assert (torch.uint8 in kinds) == ("8bit" in name)


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_of(item)]
    return [value] if isinstance(value, torch.Tensor) else []


@pytest.mark.parametrize("on_disk", [False, True])
def test_caches(on_disk: bool, sd1: Path, pictures: Path, ground: Path, tmp_path: Path) -> None:
    """Cached latents of both orientations and cached texts of several variants."""
    captions = {k: v for k, v in CAPTIONS.items() if not k.startswith("token_warmup")}
    data = write_dataset(tmp_path / "cached.toml", subset(pictures, flip_aug=True, **captions))
    suffix = "_to_disk" if on_disk else ""
    values = {
        **EVERYTHING, f"cache_latents{suffix}": True, f"cache_text_encoder_outputs{suffix}": True,
        "network_train_unet_only": True, "cache_dir": tmp_path / "cache" if on_disk else None, "caption_variants": 3,
    }  # fmt: skip
    whole = train(sd1, data, tmp_path / "whole", **values)
    assert_same_run(train_with_stops(sd1, data, tmp_path / "stopped", [2, 3], **values), whole)


def test_saves_on_the_way_change_nothing(sd1: Path, lively: Path, tmp_path: Path) -> None:
    """For an optimizer that trains other weights than it saves, too."""
    for name in ("AdamW", "AdamWScheduleFree"):
        values = {
            **EVERYTHING,
            "optimizer_type": name,
            "max_train_steps": 4,
            "lr_scheduler": None,
            "lr_warmup_steps": None,
        }
        if name == "AdamWScheduleFree":
            values["ema_decay"] = None
        plain = train(sd1, lively, tmp_path / name, **values)
        busy = train(sd1, lively, tmp_path / f"{name} busy", save_every_n_steps=1, **values)
        assert_same_run(busy, plain)
        assert len(busy.names("*-state")) == 4


def test_resumed_run_goes_on_in_file_names_and_average(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    values = {"max_train_steps": 5, "save_state": True, "save_every_n_steps": 2}
    run = train_with_stops(sd1, dataset, tmp_path, [3], **values)
    assert [report.step for report in run.trainer.reports] == [4, 5]
    assert run.names("*.safetensors") == [
        *(f"x-step{step:08d}.safetensors" for step in (2, 3, 4)), "x.safetensors"
    ]  # fmt: skip
    assert (run.state.step, run.state.epoch, run.state.batch) == (5, 1, 2)
    assert len(run.state.losses) == 3  # of the last epoch's length, two of them from before or after the stop


# Of the dataset of these tests, as version 1 of the states has always had it
NOTED_BEFORE = {"folder": "pictures", "pictures": "5", "captions": "69f0008d", "settings": "ae1c8217"}


def test_state_of_another_run_is_refused(
    sd1: Path, dataset: Path, pictures: Path, lively: Path, tmp_path: Path
) -> None:
    train(sd1, dataset, tmp_path / "first", max_train_steps=2, save_state=True)
    state = tmp_path / "first" / "x-state"
    with pytest.raises(UserError) as told:
        train(sd1, lively, tmp_path / "second", resume=state, network_dim=8, optimizer_type="Lion", max_train_steps=4)
    text = str(told.value)
    assert "--network_dim was 4, is 8" in text and "--optimizer_type was AdamW, is Lion" in text and "dataset" in text
    assert not (tmp_path / "second" / "x.safetensors").exists()
    noted = read_facts(state)["fingerprint"]["dataset"]["subset 1"]
    assert {**noted, "pictures": ""} == {**NOTED_BEFORE, "pictures": ""}, "no older state resumes"
    held_out = write_dataset(tmp_path / "held.toml", subset(pictures), validation_split=0.2, validation_seed=3)
    with pytest.raises(UserError, match=r"x-state is .* subset 1 held out was not noted, is 0\.2 by seed 3"):
        train(sd1, held_out, tmp_path / "second", resume=state, max_train_steps=4)
    bundle = torch.load(state / "optimizer.pt", weights_only=True)  # exchanged, and signed anew
    edited_facts(lambda facts: facts.pop("parts"))(state)
    for name, value in {"exp_avg": torch.zeros(3), "step": "4", "exp_avg_sq": "x"}.items():
        first = bundle["optimizer"]["state"][0]
        changed = {**bundle["optimizer"], "state": {**bundle["optimizer"]["state"], 0: {**first, name: value}}}
        torch.save({**bundle, "optimizer": changed}, state / "optimizer.pt")
        with pytest.raises(UserError, match="--resume: the state's optimizer "):
            train(sd1, dataset, tmp_path / "second", resume=signed(state), max_train_steps=4)


def test_state_of_another_size_is_refused(sd1: Path, pictures: Path, tmp_path: Path) -> None:
    """As many batches, the same pictures and captions, but other pixels."""
    small, large = (write_dataset(tmp_path / f"{n}.toml", subset(pictures), resolution=n) for n in (64, 128))
    train(sd1, small, tmp_path / "first", max_train_steps=1, save_state=True)
    with pytest.raises(UserError, match=r"another run: dataset subset 1 settings was \w+, is \w+\. "):
        train(sd1, large, tmp_path / "second", resume=tmp_path / "first" / "x-state")


def test_nothing_left_to_do(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    """--resume auto starts, goes on and ends, each time with the same command; the others say what is wrong."""
    with pytest.raises(UserError, match=r"^--resume latest: .* holds no state of x; --resume auto starts then$"):
        train(sd1, dataset, tmp_path, max_train_steps=2, resume="latest")
    assert train(sd1, dataset, tmp_path, max_train_steps=2, resume="auto", interrupt_in=1).code == EXIT_STOPPED
    run = train(sd1, dataset, tmp_path, max_train_steps=2, resume="auto")
    assert [report.step for report in run.trainer.reports] == [2] and run.state.step == 2
    written = run.file.stat().st_mtime_ns
    again = train(sd1, dataset, tmp_path, max_train_steps=2, resume="auto")
    assert (again.code, again.trainer.reports, run.file.stat().st_mtime_ns) == (0, [], written)
    for state in ("latest", tmp_path / "x-state"):
        with pytest.raises(UserError, match="the run starts at step 2 and ends at step 2"):
            train(sd1, dataset, tmp_path, max_train_steps=2, resume=state)


def test_longer_run_has_the_schedule_of_its_length(
    sd1: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From the first resumed step on, and one line says so; not where the rates are the same."""
    differs = "schedule is another one: steps was 2, is 4, --lr_scheduler_power was 1.0, is 2.0"
    for name, line in (("linear", differs), ("constant", "")):
        values = {"lr_scheduler": name, "save_state": True}
        train(sd1, dataset, tmp_path / name, max_train_steps=2, interrupt_in=1, **values)
        caplog.clear()
        longer = {**values, "max_train_steps": 4, "lr_scheduler_power": 2}
        run = train(sd1, dataset, tmp_path / name, resume="latest", **longer)
        rates = [report.others["lr/unet"] for report in run.trainer.reports]
        assert rates == pytest.approx([7.5e-3, 5e-3, 2.5e-3] if line else [1e-2] * 3)
        told = [text for text in caplog.messages if "schedule is another one" in text]
        assert len(told) == bool(line) and all(text.endswith(line) for text in told)


@pytest.mark.parametrize("what", ["picture gone", "picture damaged", "output folder gone"])
def test_what_goes_away_in_mid_training_costs_nothing(what: str, sd1: Path, tmp_path: Path) -> None:
    """The state is saved before the line; a folder is made again. What the state is resumed to is exact."""
    pictures = make_pictures(tmp_path / "pictures", 3)
    data, folder = write_dataset(tmp_path / "d.toml", subset(pictures), batch_size=1), tmp_path / "out"
    raw = (pictures / "p01.png").read_bytes()

    def break_it(trainer: Recorded) -> None:
        if trainer.position.step == 1 and what == "output folder gone":
            shutil.rmtree(folder)
        elif trainer.position.step == 1:
            (pictures / "p01.png").unlink() if what == "picture gone" else (pictures / "p01.png").write_bytes(b"x")

    values = {"max_train_steps": 6, "save_every_n_steps": 1}
    if what == "output folder gone":
        run = train(sd1, data, folder, each_step=break_it, **values)
        assert "x-step00000002.safetensors" in run.names()  # and the run ended well
        return
    with pytest.raises(UserError, match=r"p01\.png"):
        train(sd1, data, folder, each_step=break_it, **values)
    state = newest_state(folder, "x")
    assert state is not None and load_state(state).step >= 2 and not (folder / "x.safetensors").exists()
    (pictures / "p01.png").write_bytes(raw)
    resumed = train(sd1, data, folder, resume=state, **values)
    assert differing(resumed.weights, train(sd1, data, tmp_path / "whole", **values).weights) == []
