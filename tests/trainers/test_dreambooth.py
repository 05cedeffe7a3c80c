# SPDX-License-Identifier: Apache-2.0
"""Full training of Stable Diffusion as its scripts have it: a text encoder that stops, no padding, formats, data."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from library.cli import EXIT_STOPPED, METHODS, load_attribute
from library.errors import UserError
from library.families.registry import FAMILIES
from library.families.sd.model import StableDiffusion
from library.families.sd.options import SDOptions
from library.io.state import load_state, newest_state
from library.options import resolve
from tests.families import sdxl
from tests.script_runner import run_script
from tests.tiny import make_tiny_sd
from tests.trainers.finetune_runs import Recorded, finetune
from tests.trainers.helpers import Run, argv, differing, make_pictures, micro_generator, subset, write_dataset

Weights = list[dict[str, Tensor]]


def dreambooth(dataset: Path, folder: Path, model: Path, **values: Any) -> Run:
    return finetune(dataset, folder, family="sd", method="dreambooth", pretrained_model_name_or_path=model, **values)


def encoder_weights(trainer: Recorded) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.models.encoders["clip"].state_dict().items()}


def watched(dataset: Path, folder: Path, model: Path, **values: Any) -> tuple[Run, Weights]:
    """A run, and the text encoder before it and after each of its steps."""
    seen: Weights = []
    look = lambda trainer: seen.append(encoder_weights(trainer))
    return dreambooth(dataset, folder, model, before=look, each_step=look, **values), seen


def changed(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


# ---- the text encoder -----------------------------------------------------------------------------------------------


def test_text_encoder_learns_to_the_end_at_its_rate(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    run, seen = watched(dataset, tmp_path, sd1, learning_rate_te=2e-4, max_train_steps=3)
    assert all(changed(one, other) for one, other in pairwise(seen))
    rates = {group["name"]: group["lr"] for group in run.trainer.updates.optim.optimizer.param_groups}
    assert rates == {"denoiser": 1e-3, "clip": 2e-4}
    name = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(run.weights[name], seen[-1]["encoder.layers.0.mlp.fc1.weight"])
    trainer_path, options = METHODS["dreambooth"]
    assert load_attribute(trainer_path).project == "dreambooth" and options.__name__ == "DreamBoothTrainerOptions"


@pytest.mark.parametrize("values", [{"stop_text_encoder_training": -1}, {"stop_text_encoder_training": 0},
                                    {"train_text_encoder": "false"}, {"learning_rate_te": 0}])  # fmt: skip
def test_text_encoder_that_never_learns(values: dict[str, Any], sd1: Path, dataset: Path, tmp_path: Path) -> None:
    run, seen = watched(dataset, tmp_path, sd1, **values, max_train_steps=2, save_state=True)
    assert not changed(seen[0], seen[-1])
    assert all(name.startswith("denoiser.") for name in run.state.weights)
    cached = dreambooth(dataset, tmp_path / "c", sd1, **values, max_train_steps=2, cache_text_encoder_outputs=True)
    assert cached.losses == pytest.approx(run.losses, rel=1e-5)


@pytest.mark.parametrize(
    "more", [{"optimizer_args": ["weight_decay=0.5"], "gradient_checkpointing": True},
             {"mixed_precision": "bf16", "full_bf16": True, "ema_decay": 0.9}]
)  # fmt: skip
def test_text_encoder_stops_at_a_step(more: dict[str, Any], sd1: Path, dataset: Path, tmp_path: Path) -> None:
    """Until then as in a run that never stops, to the bit; from then on nothing moves it: no decay, no momentum."""
    whole, every = watched(dataset, tmp_path / "whole", sd1, **more, max_train_steps=5)
    run, seen = watched(
        dataset, tmp_path / "run", sd1, **more, max_train_steps=5, stop_text_encoder_training=2, save_state=True
    )
    assert [changed(one, other) for one, other in pairwise(seen)] == [True, True, False, False, False]
    assert all(differing(seen[step], every[step]) == [] for step in (1, 2))
    assert run.losses[:3] == whole.losses[:3] and run.losses[3] != whole.losses[3]

    for stop in (1, 3):
        folder = tmp_path / f"stopped{stop}"
        values = {**more, "max_train_steps": 5, "stop_text_encoder_training": 2, "save_state": True}
        assert dreambooth(dataset, folder, sd1, interrupt_in=stop, **values).code == EXIT_STOPPED
        again = dreambooth(dataset, folder, sd1, resume=newest_state(folder, "x"), **values)
        assert differing(again.weights, run.weights) == []
        one, other = again.state, run.state
        assert differing(one.weights, other.weights) == [] and differing(one.optimizer, other.optimizer) == []
        assert differing(one.ema, other.ema) == []


def test_another_stop_is_another_run(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    dreambooth(dataset, tmp_path, sd1, max_train_steps=2, save_state=True, stop_text_encoder_training=1)
    with pytest.raises(UserError, match="--stop_text_encoder_training was 1, is 3"):
        dreambooth(dataset, tmp_path, sd1, max_train_steps=4, resume=tmp_path / "x-state", stop_text_encoder_training=3)


def test_counting_from_a_later_step_stops_at_once(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    _, seen = watched(dataset, tmp_path, sd1, initial_step=3, max_train_steps=5, stop_text_encoder_training=2)
    assert len(seen) == 3 and not changed(seen[0], seen[-1])


# ---- captions without padding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_no_token_padding_is_the_encoder_without_padding(
    version: int, sd1: Path, sd2: Path, dataset: Path, tmp_path: Path
) -> None:
    """The loss of a batch, written down with ids that are only as long as its longest caption."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    model, options = (sd1, {}) if version == 1 else (sd2, {"v2": True, "v_parameterization": True})
    values: dict[str, Any] = {**options, "no_token_padding": True, "max_train_steps": 1}
    run = dreambooth(dataset, tmp_path / "run", model, **values)
    batch = run.trainer.data.load(run.trainer.data.plan_epoch(1)[0], step=0)
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder")
    unet, vae = (c.from_pretrained(model / f) for c, f in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")))
    scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
    ids = tokenizer(batch.captions, padding=True, truncation=True, return_tensors="pt").input_ids
    assert ids.shape[1] < 20
    with torch.no_grad():
        posterior = vae.encode(batch.pixels).latent_dist
        shape = posterior.mean.shape[1:]
        draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in batch.latent_seeds]
        latents = (posterior.mean + posterior.std * torch.stack(draws)) * vae.config.scaling_factor
        generator = micro_generator(run, 0)
        t = torch.randint(0, 1000, (len(latents),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        pred = unet(scheduler.add_noise(latents, noise, t), t, encoder(ids).last_hidden_state).sample
        target = noise if version == 1 else scheduler.get_velocity(latents, noise, t)
    assert run.losses[0] == pytest.approx(F.mse_loss(pred, target).item(), rel=1e-5)
    assert run.losses[0] != dreambooth(dataset, tmp_path / "padded", model, **options, max_train_steps=1).losses[0]

    values |= {"stop_text_encoder_training": -1, "max_token_length": 150}
    plain = dreambooth(dataset, tmp_path / "plain", model, **values)
    cached = dreambooth(dataset, tmp_path / "cached", model, **values, cache_text_encoder_outputs=True)
    assert plain.losses[0] == pytest.approx(run.losses[0], rel=1e-5)
    assert cached.losses == pytest.approx(plain.losses, rel=1e-6)


def test_previews_keep_the_padding(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    """They show what the saved model does elsewhere."""
    (tmp_path / "prompts.txt").write_text("cat, red --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    values: dict[str, Any] = {"sample_prompts": tmp_path / "prompts.txt", "sample_at_first": True, "max_train_steps": 1}
    pictures = []
    for name, more in (("plain", {}), ("unpadded", {"no_token_padding": True})):
        dreambooth(dataset, tmp_path / name, sd1, **values, **more)
        (picture,) = (tmp_path / name / "sample").glob("*.png")
        pictures.append(picture.read_bytes())
    assert len(pictures[0]) > 100 and pictures[0] == pictures[1]


# ---- formats in a run -----------------------------------------------------------------------------------------------


def test_folders_are_saved_kept_and_resumed_like_files(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    values: dict[str, Any] = {
        "save_model_as": "diffusers_safetensors", "max_train_steps": 5, "save_every_n_steps": 1,
        "save_last_n_steps": 1, "save_state": True, "ema_decay": 0.9,
    }  # fmt: skip
    run = dreambooth(dataset, tmp_path / "run", sd1, **values)
    expected = ["x", "x-state", "x-step00000003", "x-step00000003-state", "x-step00000004", "x-step00000004-state"]
    assert run.names("x*") == sorted([*expected, "x.config.toml"]) and run.names(".*") == []
    file = dreambooth(dataset, tmp_path / "file", sd1, **{**values, "save_model_as": "safetensors"})
    pair = [StableDiffusion(SDOptions(pretrained_model_name_or_path=str(p))) for p in (tmp_path / "run/x", file.file)]
    (tmp_path / "file" / "tokenizer").symlink_to(sd1 / "tokenizer")
    one, other = (family.load_denoiser(None, "cpu").state_dict() for family in pair)
    assert differing(dict(one), dict(other)) == []
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "x-step00000004", local_files_only=True)
    assert changed(dict(pipeline.unet.state_dict()), dict(one))

    folder = tmp_path / "stopped"
    assert dreambooth(dataset, folder, sd1, interrupt_in=3, **values).code == EXIT_STOPPED
    assert (folder / "x-step00000003" / "model_index.json").is_file()
    again = dreambooth(dataset, folder, sd1, resume=folder / "x-step00000003-state", **values)
    assert differing(again.state.weights, run.state.weights) == []
    assert again.names("x*") == run.names("x*")


def test_folder_of_other_things_is_not_replaced(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "letter.txt").write_text("precious")
    with pytest.raises(UserError, match=r"--output_name: .*x is a folder of other things"):
        dreambooth(dataset, tmp_path, sd1, save_model_as="diffusers")
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "letter.txt"]


def test_source_is_not_overwritten(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    """Its text encoder, VAE and what nobody reads are read from it at each save."""
    first = dreambooth(dataset, tmp_path, sd1, max_train_steps=1)
    (tmp_path / "tokenizer").symlink_to(sd1 / "tokenizer")
    before = first.file.read_bytes()
    with pytest.raises(UserError, match=r"--output_name: the run would overwrite .*x\.safetensors"):
        dreambooth(dataset, tmp_path, first.file, max_train_steps=1)
    assert first.file.read_bytes() == before
    dreambooth(dataset, tmp_path, first.file, max_train_steps=1, output_name="y")


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd1": ("sd", {}),
    "sd2": ("sd", {"v2": True, "v_parameterization": True}),
    "sdxl": ("sdxl", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_training_of_nothing_gives_back_the_file(name: str, dataset: Path, tmp_path: Path) -> None:
    """Single file, steps too small for any bit, saved file: the same weights, with VAE and text encoders."""
    family, options = MODELS[name]
    if family == "sdxl":
        source = Path(sdxl.make(tmp_path / "model", layout="single")["pretrained_model_name_or_path"])
    else:
        source = make_tiny_sd(tmp_path / "model", version=2 if options else 1, layout="single", dtype=torch.float16)
    values: dict[str, Any] = {"pretrained_model_name_or_path": source, **options, "train_text_encoder": True}
    run = finetune(
        dataset, tmp_path / "out", family=family, **values, learning_rate=1e-30, max_train_steps=2,
        save_precision=None if family == "sdxl" else "fp16",
    )  # fmt: skip
    assert differing(run.weights, load_file(source)) == []
    assert len(run.trainer.learning) == (3 if family == "sdxl" else 2)


# ---- the scripts ----------------------------------------------------------------------------------------------------


def test_dreambooth_folders_with_prior_preservation(sd1: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "own" / "2_sks dog", 2)
    make_pictures(tmp_path / "reg" / "1_dog", 4, first=2)
    model = make_tiny_sd(tmp_path / "model", layout="single")
    values = {
        "pretrained_model_name_or_path": model, "train_data_dir": tmp_path / "own", "reg_data_dir": tmp_path / "reg",
        "resolution": 64, "output_dir": tmp_path / "out", "output_name": "x", "max_train_steps": 4, "seed": 3,
        "prior_loss_weight": 0.5, "train_batch_size": 2, "stop_text_encoder_training": 2, "save_state": True,
        "learning_rate_te": 1e-6, "max_data_loader_n_workers": 0,
    }  # fmt: skip
    ended = run_script(*argv(values), script="train_db.py")
    assert ended.code == 0, ended.text
    assert "4 regularisation pictures used 4 times" in ended.text and "stays as it is from step 2 on" in ended.text
    found = torch.load(tmp_path / "out" / "x.ckpt", weights_only=True)
    assert found["global_step"] == 4 and found["state_dict"].keys() == load_file(model).keys()
    assert load_state(tmp_path / "out" / "x-state").step == 4


def test_metadata_json_with_repeats(sd1: Path, tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", 3)
    facts = {path.stem: {"caption": f"a cat {path.stem}", "tags": "red, sks"} for path in pictures.glob("*.png")}
    (tmp_path / "meta.json").write_text(json.dumps(facts), encoding="utf-8")
    values = {
        "pretrained_model_name_or_path": sd1, "train_data_dir": pictures, "in_json": tmp_path / "meta.json",
        "dataset_repeats": 2, "resolution": 64, "output_dir": tmp_path / "out", "max_train_epochs": 1,
        "train_text_encoder": True, "learning_rate_te": 1e-6, "diffusers_xformers": True, "train_batch_size": 2,
        "use_safetensors": True, "max_data_loader_n_workers": 0,
    }  # fmt: skip
    ended = run_script(*argv(values), script="fine_tune.py")
    assert ended.code == 0, ended.text
    assert "3 pictures, 6 with repeats" in ended.text and "3 steps" in ended.text
    assert "--diffusers_xformers: torch's own attention" in ended.text
    assert (tmp_path / "out" / "last" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_idle_rate_is_a_warning(sd1: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Graphical programs write it whether or not the encoder learns."""
    with caplog.at_level("WARNING", "trainyard"):
        finetune(
            dataset, tmp_path, family="sd", pretrained_model_name_or_path=sd1, learning_rate_te=1e-5, max_train_steps=1
        )
    assert "--learning_rate_te: no effect without --train_text_encoder" in caplog.text


def test_options_have_their_range() -> None:
    def read(**values: Any) -> Any:
        given = {"pretrained_model_name_or_path": "m", "dataset_config": "d.toml", "output_dir": "o", **values}
        return resolve(METHODS["dreambooth"][1], FAMILIES["sd"].option_groups, argv(given), prog="test").options

    assert read().finetune.stop_text_encoder_training is None and read().finetune.encoders_until is None
    assert read(stop_text_encoder_training=7).finetune.encoders_until == 7
    with pytest.raises(UserError, match="--stop_text_encoder_training must be at least -1, got -2"):
        read(stop_text_encoder_training=-2)


def test_each_block_of_sdxl_has_its_rate(tmp_path: Path) -> None:
    """23 rates in the log; what has the rate 0 is no group, and stays."""
    data = write_dataset(tmp_path / "d.toml", subset(make_pictures(tmp_path / "p", 2)))
    rates = [1e-4 * index for index in range(23)]
    model = {"family": "sdxl", **sdxl.make(tmp_path / "model")}
    run = finetune(
        data, tmp_path / "run", **model, block_lr=",".join(map(str, rates)), max_train_steps=1, save_state=True
    )
    logged = {name: value for name, value in run.trainer.reports[0].others.items() if name.startswith("lr/")}
    assert logged == {f"lr/unet_block{index}": pytest.approx(rates[index]) for index in range(1, 23)}
    learned = run.state.weights  # read from the disk
    frozen = [name for name in run.trainer.models.denoiser.state_dict() if f"denoiser.{name}" not in learned]
    assert frozen and {name.split(".")[0] for name in frozen} == {"time_embedding", "add_embedding"}
    with pytest.raises(UserError, match="nothing learns"):
        finetune(data, tmp_path / "none", **model, block_lr=",".join(["0"] * 23), max_train_steps=1)
