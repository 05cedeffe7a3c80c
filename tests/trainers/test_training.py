# SPDX-License-Identifier: Apache-2.0
"""What the options of a training run do to losses and weights; and that watching a run does not change it.

The golden losses are written anew, after a change that is meant to change numbers, by
    python -m tests.trainers.test_training
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.trainers.options import LoggingOptions
from library.trainers.tracking import tracker_settings
from tests.tiny import make_tiny_sd
from tests.trainers.helpers import (
    Run,
    assert_same_run,
    differing,
    half_masks,
    make_pictures,
    micro_generator,
    randomized,
    subset,
    train,
    train_with_stops,
    with_lora,
    write_dataset,
    write_datasets,
)  # fmt: skip

GOLDEN = Path(__file__).parents[1] / "data_files" / "trainers" / "golden_losses.json"
SD2 = {"v2": True, "v_parameterization": True}
# One step whose loss shows everything: the adapters begin far from zero.
ONE = {"max_train_steps": 1}


@pytest.fixture(scope="module")
def lora(sd1: Path, dataset: Path, ground: Path) -> Path:
    """A LoRA file of sd1 with matrices far from zero."""
    run = train(sd1, dataset, ground / "lora", **ONE)
    save_file(randomized(run.weights), ground / "lora.safetensors")
    return ground / "lora.safetensors"


# ---- golden losses --------------------------------------------------------------------------------------------------

GOLDEN_RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "sd1 eps": (1, {}),
    "sd2 v": (2, SD2),
    "sd1 noise and loss options": (
        1,
        {
            "noise_offset": 0.1, "noise_offset_random_strength": True, "adaptive_noise_scale": 0.1,
            "multires_noise_iterations": 4, "multires_noise_discount": 0.4, "ip_noise_gamma": 0.1,
            "min_snr_gamma": 5, "loss_type": "huber", "huber_schedule": "exponential", "huber_c": 0.2,
            "min_timestep": 100, "max_timestep": 900, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5,
            "lr_scheduler": "cosine", "lr_warmup_steps": 2, "clip_skip": 2,
            "network_args": ["conv_dim=2", "rank_dropout=0.2"],
        },
    ),
}  # fmt: skip


def golden_losses(name: str, folder: Path) -> list[float]:
    """Eight steps of a run that starts from nothing but its seed."""
    version, values = GOLDEN_RUNS[name]
    model = make_tiny_sd(folder / "model", version=version, v_prediction=version == 2)
    changing = subset(make_pictures(folder / "pictures", 5), shuffle_caption=True, flip_aug=True)
    data = write_dataset(folder / "dataset.toml", changing)
    return train(model, data, folder / "out", max_train_steps=8, **values).losses


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_golden_losses(name: str, tmp_path: Path) -> None:
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    assert golden_losses(name, tmp_path) == pytest.approx(expected, rel=1e-5)


def test_seed_decides_everything(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = train(sd1, dataset, tmp_path / "first")
    torch.manual_seed(2)
    assert_same_run(train(sd1, dataset, tmp_path / "again"), first, state=False)
    other = train(sd1, dataset, tmp_path / "other", seed=8)
    assert not set(other.losses) & set(first.losses)


# ---- weights of the loss --------------------------------------------------------------------------------------------


def test_regularisation_pictures_count_with_the_prior_weight(sd1: Path, tmp_path: Path) -> None:
    own = subset(make_pictures(tmp_path / "own", 2))
    reg = subset(make_pictures(tmp_path / "reg", 2, first=2), is_reg=True)
    data = write_dataset(tmp_path / "d.toml", own, reg, batch_size=4)
    loss = {w: train(sd1, data, tmp_path / str(w), prior_loss_weight=w, **ONE).losses[0] for w in (0, 0.25, 1)}
    assert loss[0.25] == pytest.approx(0.75 * loss[0] + 0.25 * loss[1], rel=1e-5)
    assert 0.3 * loss[1] < loss[0] < 0.7 * loss[1]


def test_masked_loss_counts_where_the_mask_is_white(sd1: Path, tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", 2)
    names = sorted(path.name for path in pictures.glob("*.png"))
    loss: dict[str, float] = {}
    for white in ("left", "right", "all"):
        masks = half_masks(tmp_path / white, names, white=white)
        data = write_dataset(tmp_path / f"{white}.toml", subset(pictures, conditioning_data_dir=str(masks)))
        loss[white] = train(sd1, data, tmp_path / f"{white} out", masked_loss=True, **ONE).losses[0]
    plain = train(sd1, write_dataset(tmp_path / "plain.toml", subset(pictures)), tmp_path / "plain", **ONE).losses[0]
    assert loss["all"] == pytest.approx(plain, rel=1e-6)
    assert loss["left"] + loss["right"] == pytest.approx(plain, rel=1e-5)

    with_alpha = make_pictures(tmp_path / "alpha", 2)
    for name in names:
        picture = Image.open(with_alpha / name)
        picture.putalpha(Image.open(tmp_path / "left" / name).convert("L"))
        picture.save(with_alpha / name)
    data = write_dataset(tmp_path / "alpha.toml", subset(with_alpha, alpha_mask=True))
    for name, cached in {"alpha out": None, "alpha cached": True}.items():
        run = train(sd1, data, tmp_path / name, cache_latents=cached, **ONE)
        assert run.losses[0] == pytest.approx(loss["left"], rel=1e-5)


def test_preserved_pictures_learn_the_base_model(sd1: Path, lora: Path, tmp_path: Path) -> None:
    keep = {"custom_attributes": {"diff_output_preservation": True}}
    pictures = make_pictures(tmp_path / "pictures", 2)
    data = write_dataset(tmp_path / "d.toml", subset(pictures, **keep))
    assert train(sd1, data, tmp_path / "fresh", max_train_steps=2).losses == [0.0, 0.0]

    run = train(sd1, data, tmp_path / "far", network_weights=lora, **ONE)
    trainer = run.trainer
    trainer.network.load(load_file(lora))
    with torch.no_grad():
        batch = trainer.data.load(trainer.data.plan_epoch(1)[0], step=0)
        generator = micro_generator(run, 0)
        t = trainer.objective.sample_t(2, (8, 8), generator, "cpu")
        noised = trainer.objective.noise(trainer.forward.latents(batch), t, generator)
        ours = trainer.forward.predict(batch)(noised)
        trainer.network.detach()
        base = trainer.forward.predict(batch)(noised)
    assert run.losses[0] == pytest.approx(float(((ours - base) ** 2).mean()), rel=1e-5)


def test_network_multiplier_of_a_dataset(sd1: Path, lora: Path, pictures: Path, tmp_path: Path) -> None:
    def loss(multiplier: float, **values: Any) -> float:
        data = write_dataset(tmp_path / f"{multiplier}.toml", subset(pictures), network_multiplier=multiplier)
        return train(sd1, data, tmp_path / f"{multiplier} {len(values)}", **ONE, **values).losses[0]

    halved = {k: v * 0.5 if "lora_up" in k else v for k, v in load_file(lora).items()}
    save_file(halved, tmp_path / "half.safetensors")
    assert loss(0.0, network_weights=lora) == pytest.approx(loss(1.0), rel=1e-6)
    half = loss(0.5, network_weights=lora)
    assert half == pytest.approx(loss(1.0, network_weights=tmp_path / "half.safetensors"), rel=1e-5)
    assert half != pytest.approx(loss(1.0, network_weights=lora), rel=1e-3)


# ---- what learns ----------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "text encoder only": ({"network_train_text_encoder_only": True}, {"lora_te"}),
    "unet_lr 0": ({"unet_lr": 0}, {"lora_te"}),
    "unet only": ({"network_train_unet_only": True}, {"lora_unet"}),
    "text_encoder_lr 0": ({"text_encoder_lr": 0}, {"lora_unet"}),
    "both": ({"unet_lr": 1e-3, "text_encoder_lr": [2e-3]}, {"lora_te", "lora_unet"}),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_learns_is_what_is_saved(name: str, sd1: Path, dataset: Path, tmp_path: Path) -> None:
    values, expected = PARTS[name]
    run = train(sd1, dataset, tmp_path, max_train_steps=2, **values)
    assert {key[: key.index("_", 5)] for key in run.weights} == expected
    ups = [value for key, value in run.weights.items() if "lora_up" in key]
    assert all(float(value.abs().max()) > 0 for value in ups)
    if name == "both":
        rates = {k: v for k, v in run.trainer.reports[0].others.items() if k.startswith("lr/")}
        assert rates == {"lr/textencoder": pytest.approx(2e-3), "lr/unet": pytest.approx(1e-3)}


def test_frozen_models_stay_as_they_were(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    run = train(sd1, dataset, tmp_path)
    before = load_file(sd1 / "unet" / "diffusion_pytorch_model.safetensors")
    assert differing(dict(run.trainer.models.denoiser.state_dict()), before) == []


def test_nothing_learns(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing learns"):
        train(sd1, dataset, tmp_path, learning_rate=0)


def test_part_of_network_weights_that_does_not_learn_is_left_out(
    sd1: Path, lora: Path, dataset: Path, tmp_path: Path
) -> None:
    """Cached texts or not: the same run."""
    values = {"network_weights": lora, "network_train_unet_only": True, **ONE}
    plain = train(sd1, dataset, tmp_path / "plain", **values)
    cached = train(sd1, dataset, tmp_path / "cached", cache_text_encoder_outputs=True, **values)
    taken = train(sd1, dataset, tmp_path / "taken", dim_from_weights=True, network_dim=None, **values)
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    assert taken.losses == pytest.approx(plain.losses, rel=1e-6)
    assert plain.weights.keys() == cached.weights.keys() == taken.weights.keys()


def merged_model(model: Path, lora: dict[str, Tensor], folder: Path) -> Path:
    """The model with a LoRA in its weights, by the formula."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    shutil.copytree(model, folder)
    for part, cls, prefix in (
        ("unet", UNet2DConditionModel, "lora_unet_"),
        ("text_encoder", CLIPTextModel, "lora_te_"),
    ):
        module = cls.from_pretrained(folder / part)
        flat = part == "text_encoder" and "text_model" not in dict(module.named_children())
        inner = "text_model." if flat else ""
        weights = with_lora(module, lora, lambda path, p=prefix, i=inner: (p + i + path).replace(".", "_"))
        module.load_state_dict(weights)
        module.save_pretrained(folder / part)
    return folder


def test_base_weights_equal_a_merged_model(sd1: Path, lora: Path, dataset: Path, tmp_path: Path) -> None:
    weights = load_file(lora)
    second = randomized(weights, seed=1)
    save_file(second, tmp_path / "second.safetensors")
    once = merged_model(sd1, {k: v * 0.5 if k.endswith("alpha") else v for k, v in weights.items()}, tmp_path / "once")
    twice = merged_model(once, second, tmp_path / "twice")
    files = [lora, tmp_path / "second.safetensors"]
    ours = train(sd1, dataset, tmp_path / "ours", base_weights=files, base_weights_multiplier=[0.5], max_train_steps=2)
    theirs = train(twice, dataset, tmp_path / "theirs", max_train_steps=2)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert ours.losses != pytest.approx(train(sd1, dataset, tmp_path / "base", max_train_steps=2).losses, rel=1e-3)


def test_base_weights_for_the_text_encoder_do_not_go_with_cached_texts(
    sd1: Path, lora: Path, dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="changes the text encoder, whose outputs are cached"):
        train(sd1, dataset, tmp_path, base_weights=lora, cache_text_encoder_outputs=True, network_train_unet_only=True)


def test_scale_weight_norms(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    def norms(run: Run) -> list[float]:
        """Of alpha / rank * up @ down, with alpha 2 and rank 4."""
        names = [key.removesuffix(".alpha") for key in run.weights if key.endswith(".alpha")]
        pairs = [
            (run.weights[f"{n}.lora_up.weight"].flatten(1), run.weights[f"{n}.lora_down.weight"].flatten(1))
            for n in names
        ]
        return [float((up @ down).norm()) * 0.5 for up, down in pairs]

    free = norms(train(sd1, dataset, tmp_path / "free"))
    limit = sorted(free)[len(free) // 2]
    run = train(sd1, dataset, tmp_path / "held", scale_weight_norms=limit)
    held = norms(run)
    assert max(free) > 1.05 * limit and max(held) == pytest.approx(limit, rel=1e-5)
    told = run.trainer.reports[-1].others
    assert told["max_norm/max_key_norm"] == pytest.approx(limit, rel=1e-5)
    assert told["max_norm/average_key_norm"] == pytest.approx(sum(held) / len(held), rel=1e-5)
    assert 0 < told["max_norm/keys_scaled"] <= len(held)


def test_network_dropout_is_for_training_only(sd1: Path, lora: Path, dataset: Path, tmp_path: Path) -> None:
    plain = train(sd1, dataset, tmp_path / "plain", network_weights=lora, **ONE)
    dropped = train(sd1, dataset, tmp_path / "dropped", network_weights=lora, network_dropout=0.5, **ONE)
    assert dropped.losses[0] != pytest.approx(plain.losses[0], rel=1e-4)
    plan = dropped.trainer.data.plan_epoch(1)[0]
    for run in (plain, dropped):
        run.trainer.network.load(load_file(lora))
    values = []
    for run in (plain, dropped):
        with torch.no_grad(), run.trainer.updates.shown():
            batch = run.trainer.data.load(plan, step=0)
            values.append(float(run.trainer.forward.mean_loss(batch, micro_generator(run, 0))))
    assert values[0] == values[1] == pytest.approx(plain.losses[0], rel=1e-6)


def test_gradient_clipping_and_accumulation(sd1: Path, tmp_path: Path) -> None:
    """Two batches of one picture make the step of one batch of two; the reported norm is the one before clipping."""
    pictures = make_pictures(tmp_path / "pictures", 2)
    data = write_dataset(tmp_path / "one.toml", subset(pictures), batch_size=1)
    values = {"keep_gradients": True, "network_train_unet_only": True}
    run = train(sd1, data, tmp_path / "both", gradient_accumulation_steps=2, **ONE, **values)
    single = train(sd1, data, tmp_path / "single", learning_rate=1e-30, max_train_steps=2, **values)
    halves = single.trainer.gradients
    mean = {key: (halves[0][key] + halves[1][key]) / 2 for key in halves[0]}
    assert run.losses[0] == pytest.approx(sum(single.losses) / 2, rel=1e-6)
    for key, value in run.trainer.gradients[0].items():
        torch.testing.assert_close(value, mean[key], rtol=1e-4, atol=1e-8)
    norm = float(torch.stack([value.norm() for value in mean.values()]).norm())
    assert run.trainer.reports[0].grad_norm == pytest.approx(norm, rel=1e-4)

    # plain SGD, so that the clipped gradient is the step
    limit = norm / 4
    stepped: list[dict[str, Tensor]] = []
    sgd = {"optimizer_type": "SGD", "learning_rate": 1.0, "gradient_accumulation_steps": 2, "max_grad_norm": limit}
    clipped = train(
        sd1,
        data,
        tmp_path / "clipped",
        each_step=lambda t: stepped.append(t.network.state(None)),
        **ONE,
        **sgd,
        **values,
    )
    change = torch.stack([value.norm() for key, value in clipped.weights.items() if "lora_up" in key]).norm()
    ups = torch.stack([value.norm() for key, value in mean.items() if "lora_up" in key]).norm()
    assert float(change) == pytest.approx(float(ups) / 4, rel=1e-3)


# ---- datasets -------------------------------------------------------------------------------------------------------


def test_several_datasets_at_several_sizes(sd1: Path, tmp_path: Path) -> None:
    square, wide = make_pictures(tmp_path / "square", 3), make_pictures(tmp_path / "wide", 3, size=(128, 64), first=3)
    data = write_datasets(
        tmp_path / "d.toml",
        {"resolution": 64, "batch_size": 2, "subsets": [subset(square)]},
        {"resolution": [128, 64], "batch_size": 1, "subsets": [subset(wide, num_repeats=2)]},
    )
    run = train(sd1, data, tmp_path / "out", max_train_epochs=1)
    plans = list(run.trainer.data.plan_epoch(1))
    assert (
        sorted((plan.bucket, len(plan.samples)) for plan in plans)
        == [((64, 64), 1), ((64, 64), 2)] + [((128, 64), 1)] * 6
    )
    assert len(run.losses) == 8 and run.metadata["ss_num_train_images"] == "9"
    assert len({run.trainer.forward.latents(run.trainer.data.load(p, step=0)).shape[-2:] for p in plans}) == 2


def test_folder_form(sd1: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "train" / "3_sks cat", 2)
    make_pictures(tmp_path / "reg" / "1_cat", 2, first=2)
    values = {"train_data_dir": tmp_path / "train", "reg_data_dir": tmp_path / "reg", "resolution": 64}
    run = train(sd1, None, tmp_path / "out", train_batch_size=4, caption_extension=".txt", max_train_epochs=2, **values)
    assert len(run.losses) == 6  # 2 pictures 3 times and as many uses of the others, in batches of 4
    assert run.metadata["ss_num_reg_images"] == "6"
    tags = json.loads(run.metadata["ss_tag_frequency"])
    assert list(tags) == ["3_sks cat"] or "sks cat" in str(tags)


def test_starting_in_the_middle_without_a_state(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    """Counting from step 3 or epoch 2: the batches, draws and rates of those steps, with fresh weights."""
    values = {"lr_scheduler": "cosine", "max_train_steps": 6, "network_train_unet_only": True}
    seen: list[tuple[int, int, list[float]]] = []

    def look(trainer: Any) -> None:
        position = trainer.position
        seen.append((position.epoch, position.batch, trainer.updates.scheduler.get_last_lr()))

    train(sd1, dataset, tmp_path / "whole", each_step=look, **values)
    whole, seen[:] = list(seen), []
    for given in ({"initial_step": 3}, {"initial_epoch": 2}):
        run = train(sd1, dataset, tmp_path / str(given), each_step=look, **given, **values)
        assert [report.step for report in run.trainer.reports] == [4, 5, 6]
        assert seen == whole[3:]
        seen.clear()


# ---- watching a run does not change it ------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Curve name -> step -> value of the TensorBoard files below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_validation_previews_and_logs_disturb_nothing(sd1: Path, tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", 6)
    changing = subset(pictures, shuffle_caption=True, flip_aug=True, random_crop=True)
    data = write_dataset(tmp_path / "d.toml", changing, validation_split=0.3)
    (tmp_path / "prompts.txt").write_text(
        "cat --w 64 --h 64 --s 2 --d 1\nred dog --n blue --s 2 --l 3\n", encoding="utf-8"
    )
    values = {"network_dropout": 0.2, "ema_decay": 0.9, "network_args": ["module_dropout=0.2"], "save_state": True}
    quiet = train(sd1, data, tmp_path / "quiet", validate_every_n_steps=1000, **values)
    watched = train(
        sd1, data, tmp_path / "watched", validate_every_n_steps=1, logging_dir=tmp_path / "logs", log_config=True,
        sample_prompts=tmp_path / "prompts.txt", sample_every_n_steps=1, sample_at_first=True, **values,
    )  # fmt: skip
    assert_same_run(watched, quiet)

    curves = scalars(tmp_path / "logs")
    assert list(curves["loss/current"].values()) == pytest.approx(watched.losses)
    assert list(curves["lr/unet"].values()) == pytest.approx([1e-2] * 4)
    assert curves.keys() >= {"loss/average", "grad_norm", "lr/textencoder", "loss/validation"}
    trainer = watched.trainer
    with trainer.updates.shown():
        again = [trainer.validation.loss(), trainer.validation.loss()]
    assert again[0] == again[1] == pytest.approx(curves["loss/validation"][4])
    assert len(set(curves["loss/validation"].values())) == 4

    assert len(watched.names("sample/x_*.png")) == 10 + 1
    with Image.open(watched.folder / "sample" / "x_before_after.png") as sheet:
        assert sheet.width > 2 * 64 and sheet.height > 2 * 64


def test_validation_loss_is_the_mean_over_fixed_timesteps(sd1: Path, tmp_path: Path) -> None:
    data = write_dataset(
        tmp_path / "d.toml", subset(make_pictures(tmp_path / "p", 6)), validation_split=0.5, batch_size=1
    )
    run = train(sd1, data, tmp_path / "out", max_validation_steps=2, **ONE)
    trainer, losses = run.trainer, []
    with torch.no_grad(), trainer.updates.shown():
        for index, plan in enumerate(list(trainer.data.validation_plans())[:2]):
            batch = trainer.data.load(plan, step=0)
            for t in (200, 400, 600, 800):
                generator = torch.Generator().manual_seed(seed_of(run, index))
                noise = torch.randn(1, 4, 8, 8, generator=generator)
                noised = trainer.objective.noised(trainer.forward.latents(batch), torch.tensor([t]), noise, seen=noise)
                losses.append(float(((trainer.forward.predict(batch)(noised) - noise) ** 2).mean()))
        assert trainer.validation.loss() == pytest.approx(sum(losses) / 8, rel=1e-5)


def seed_of(run: Run, index: int) -> int:
    from library.rng import derive_seed

    return derive_seed(run.trainer.plan.seed, "validation", index)


# ---- precision, speed, other people's networks ----------------------------------------------------------------------


def test_half_precision_file_trains_as_its_float32_copy(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    """Frozen weights that a file holds in half precision may stay so in memory; the numbers are those of float32."""
    for dtype, name in ((torch.float16, "half"), (torch.float32, "full")):
        shutil.copytree(sd1, tmp_path / name)
        for file in (tmp_path / name).rglob("*.safetensors"):
            save_file({k: v.half().to(dtype) for k, v in load_file(file).items()}, file, {"format": "pt"})
    for options in ({}, {"network_args": ["dora_wd=True", "conv_dim=2", "train_norm=True"]}):
        half, full = (train(tmp_path / n, dataset, tmp_path / f"{n} out", **options) for n in ("half", "full"))
        assert half.losses == pytest.approx(full.losses, rel=1e-5)


def test_bf16_is_near_float32(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    plain = train(sd1, dataset, tmp_path / "plain")
    mixed = train(sd1, dataset, tmp_path / "mixed", mixed_precision="bf16", save_precision="bf16")
    full = train(sd1, dataset, tmp_path / "full", mixed_precision="bf16", full_bf16=True)
    assert mixed.losses == pytest.approx(plain.losses, rel=2e-2) and mixed.losses != plain.losses
    assert full.losses == pytest.approx(plain.losses, rel=2e-2)
    assert {p.dtype for p in mixed.trainer.network.parameters()} == {torch.float32}
    assert {p.dtype for p in full.trainer.network.parameters()} == {torch.bfloat16}
    assert {v.dtype for v in full.weights.values() if v.dim()} == {torch.bfloat16}


def test_moving_average_is_what_is_saved(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    """average = d * average + (1 - d) * weight with d = min(decay, (1 + n) / (10 + n)), n from 0."""
    seen: list[dict[str, Tensor]] = []
    run = train(sd1, dataset, tmp_path, ema_decay=0.15, each_step=lambda t: seen.append(t.network.state(None)))
    first = train(sd1, dataset, tmp_path / "first", learning_rate=1e-30, **ONE).weights
    for key, average in first.items():
        for n, weights in enumerate(seen):
            d = min(0.15, (1 + n) / (10 + n))
            average = d * average + (1 - d) * weights[key]
        torch.testing.assert_close(run.weights[key], average, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def shallow(sd1: Path, ground: Path) -> Path:
    """A model of three blocks, attention in the middle one only: each takes seconds to compile."""
    from diffusers import UNet2DConditionModel

    folder = shutil.copytree(sd1, ground / "shallow")
    config = UNet2DConditionModel.load_config(folder / "unet")
    config |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    torch.manual_seed(0)
    UNet2DConditionModel.from_config({**config, "block_out_channels": [32]}).save_pretrained(folder / "unet")
    return folder


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_blocks_train_the_same(backend: str, shallow: Path, pictures: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "d.toml", subset(pictures), batch_size=5)
    plain = train(shallow, data, tmp_path / "plain", max_train_steps=2)
    run = train(shallow, data, tmp_path / "compiled", torch_compile=True, dynamo_backend=backend, max_train_steps=2)
    assert run.losses == pytest.approx(plain.losses, rel=1e-5)
    compiled = run.trainer.memory.compiled
    assert compiled is not None and compiled.kinds and not any(kind.broken for kind in compiled.kinds)


def test_lycoris_trains_and_resumes(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    values = {"network_module": "lycoris.kohya", "network_args": ["algo=loha", "preset=attn-mlp"], "save_state": True}
    whole = train(sd1, dataset, tmp_path / "whole", **values)
    assert any("hada_w1_a" in key for key in whole.weights)
    moved = [key for key, value in whole.weights.items() if key.endswith("hada_w2_a") and value.abs().max() > 0]
    assert {key[:7] for key in moved} == {"lora_te", "lora_un"}
    assert_same_run(train_with_stops(sd1, dataset, tmp_path / "stopped", [2], **values), whole)
    losses = train(sd1, dataset, tmp_path / "on", network_weights=whole.file, **ONE, **values).losses
    assert losses != pytest.approx(train(sd1, dataset, tmp_path / "new", **ONE, **values).losses, rel=1e-5)


# ---- what the length of the run decides -----------------------------------------------------------------------------


def test_schedule_is_checked_against_the_epochs(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    """--max_train_epochs wins: 3 batches x 2 epochs are 6 steps, whatever --max_train_steps says."""
    values = {"max_train_epochs": 2, "max_train_steps": 1, "lr_scheduler": "warmup_stable_decay"}
    run = train(sd1, dataset, tmp_path / "fits", lr_decay_steps=4, **values)
    rates = [report.others["lr/unet"] for report in run.trainer.reports]
    expected = [1, 1, 1, *(0.5 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3))]
    assert rates == pytest.approx([1e-2 * factor for factor in expected])
    with pytest.raises(UserError, match="--lr_decay_steps 7 are longer than the run of 6 steps"):
        train(sd1, dataset, tmp_path / "long", lr_decay_steps=7, **{**values, "max_train_steps": 1000})
    accelerator = run.trainer.accelerator
    with run.trainer.updates.backward(is_last=False):
        assert not accelerator.sync_gradients
    with run.trainer.updates.backward(is_last=True):
        assert accelerator.sync_gradients


# ---- what may fail, and what is said of options that do nothing ------------------------------------------------------


def test_pictures_that_cannot_be_written_end_no_run(
    sd1: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "prompts.txt").write_text("cat --w 64 --h 64 --s 1", encoding="utf-8")
    (tmp_path / "out" / "sample" / "x_before_after.png" / "in the way").mkdir(parents=True)
    run = train(
        sd1, dataset, tmp_path / "out", sample_prompts=tmp_path / "prompts.txt", sample_every_n_steps=1,
        sample_at_first=True, cache_latents=True, **ONE,
    )  # fmt: skip
    assert run.code == 0 and len(run.names("sample/x_0*.png")) == 2
    (line,) = [text for text in caplog.messages if "before and after" in text]
    assert line.startswith("sheet of before and after failed, the training goes on: ")


def test_options_that_do_nothing_are_named(
    sd1: Path, lora: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "prompts.txt").write_text("cat", encoding="utf-8")
    train(
        sd1, dataset, tmp_path / "out", validate_every_n_steps=2, validation_seed=3, log_config=True, log_prefix="a",
        bucket_no_upscale=True, max_bucket_reso=2048, caption_variants=3,
        sample_prompts=tmp_path / "prompts.txt", dim_from_weights=True, network_weights=lora, **ONE,
    )  # fmt: skip
    assert [text for text in caplog.messages if "no effect" in text or "no previews" in text] == [
        "--network_dim and --network_alpha: no effect with --dim_from_weights, the file has its own",
        "--log_prefix, --log_config: no effect without --logging_dir or --log_with wandb",
        "--validation_seed, --validate_every_n_steps: no effect, no picture is held out (see --validation_split)",
        "max_bucket_reso, bucket_no_upscale: no effect without enable_bucket",
        "--caption_variants: no effect without --cache_text_encoder_outputs",
        "--sample_prompts: no previews are made without --sample_every_n_epochs, --sample_every_n_steps or "
        "--sample_at_first",
    ]


def test_previews_by_steps_and_by_epochs(
    sd1: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "prompts.txt").write_text("cat", encoding="utf-8")
    values = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 1, "sample_every_n_epochs": 1}
    run = train(sd1, dataset, tmp_path / "out", **values, **ONE)
    assert "--sample_every_n_steps: no effect, --sample_every_n_epochs wins" in caplog.messages
    assert run.names("sample/*") == []


def test_weights_are_averaged_once(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    with pytest.raises(UserError, match="--ema_decay: AdamWScheduleFree averages the weights by itself"):
        train(sd1, dataset, tmp_path, optimizer_type="AdamWScheduleFree", ema_decay=0.9)


def test_accumulation_given_to_the_launcher_changes_nothing(
    sd1: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch --gradient_accumulation_steps 4` sets this variable; accelerate would divide every loss."""
    plain = train(sd1, dataset, tmp_path / "plain", **ONE)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    run = train(sd1, dataset, tmp_path / "launched", **ONE)
    assert run.trainer.reports[0].grad_norm == plain.trainer.reports[0].grad_norm > 0


def refused_settings(config: Path) -> list[str]:
    with pytest.raises(UserError) as told:
        tracker_settings(LoggingOptions(log_tracker_config=str(config)))
    return [line.removeprefix(f"--log_tracker_config: {config}: [tensorboard] ") for line in told.value.problems]


def test_settings_of_the_log_program(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    config = tmp_path / "tracker.toml"
    config.write_text('[tensorboard]\nfilename_suffix = ".mine"\n', encoding="utf-8")
    values = {"logging_dir": tmp_path / "logs", "log_tracker_config": config, **ONE}
    train(sd1, dataset, tmp_path / "out", **values)
    (file,) = (tmp_path / "logs").rglob("events.*")
    assert file.name.endswith(".mine")
    config.write_text("[tensorboard]\nmax_queu = 1\nflush_secs = 'x'\npurge_step = -1\n", encoding="utf-8")
    assert refused_settings(config) == [
        "arguments: unknown key 'max_queu'. Did you mean 'max_queue'?",
        "purge_step must be between 0 and 1000000000",
        "flush_secs expects a whole number, got 'x'",
    ]
    config.write_text("wandb = 3\n[tensorbord]\na = 1\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        train(sd1, dataset, tmp_path / "out", **values)
    assert caught.value.problems == [
        f"--log_tracker_config: {config}: unknown table 'tensorbord'. Did you mean 'tensorboard'?",
        f"--log_tracker_config: {config}: wandb expects a table: [wandb]",
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        found = {name: golden_losses(name, Path(scratch) / str(i)) for i, name in enumerate(GOLDEN_RUNS)}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
