# SPDX-License-Identifier: Apache-2.0
"""ControlNet-LLLite trained both ways: by its own script, and as a network of the LoRA scripts."""

from __future__ import annotations

import logging
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.cli import EXIT_STOPPED
from library.errors import UserError
from library.io.state import newest_state
from library.types import Batch
from tests.families import sdxl
from tests.trainers import child
from tests.trainers.helpers import (
    Adapters,
    Run,
    assert_same_run,
    differing,
    make_pictures,
    make_trainer,
    micro_generator,
    settle,
    subset,
    train,
    write_dataset,
)

DEFAULTS: dict[str, Any] = {
    "output_name": "x", "network_dim": 8, "cond_emb_dim": 8, "learning_rate": 1e-2, "seed": 7, "max_train_steps": 4,
    "max_data_loader_n_workers": 0,
}  # fmt: skip
AS_NETWORK: dict[str, Any] = {
    "network_module": "networks.control_net_lllite", "network_dim": 8, "network_alpha": None,
    "network_args": ["cond_emb_dim=8"],
}  # fmt: skip
BLOCKS = {  # published block -> our path and the strides of its image
    "input_blocks_1_1": ("down_blocks.0.attentions.0", (4, 2)),
    "middle_block_1": ("mid_block.attentions.0", (4, 4)),
}
PATHS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q")


# ---- runs of the script -------------------------------------------------------------------------------------------


def control_train(
    model: Path, dataset: Path | None, folder: Path, *, interrupt_in: int | None = None, family: str = "sd",
    **values: Any,
) -> Run:  # fmt: skip
    """One run of the script; errors come as the exceptions that it turns into lines."""
    own = {"pretrained_model_name_or_path": model, "dataset_config": dataset, "output_dir": folder}
    trainer = make_trainer({**DEFAULTS, **own, **values}, family=family, method="lllite")
    trainer.keep_gradients = True
    trainer.interrupt_in = interrupt_in
    code = trainer.run()
    settle()
    return Run(trainer, code, folder)


@pytest.fixture(scope="module")
def controls(ground: Path, pictures: Path) -> Path:
    """Control images of `pictures`: other pictures with the same names."""
    other = make_pictures(ground / "others", 5, first=20)
    folder = ground / "controls"
    folder.mkdir()
    for number in range(5):
        shutil.copy(other / f"p{20 + number}.png", folder / f"p{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def controlled(ground: Path, pictures: Path, controls: Path) -> Path:
    """Three batches an epoch; the last holds one picture."""
    return write_dataset(ground / "controlled.toml", subset(pictures, conditioning_data_dir=str(controls)))


@pytest.fixture(scope="module")
def one_batch(ground: Path, controls: Path) -> Path:
    folder = make_pictures(ground / "two", 2)
    own = ground / "two_controls"
    own.mkdir()
    for number in range(2):
        shutil.copy(controls / f"p{number:02d}.png", own)
    return write_dataset(ground / "one_batch.toml", subset(folder, conditioning_data_dir=str(own)))


@pytest.fixture(scope="module")
def start(ground: Path, sd1: Path, one_batch: Path) -> Path:
    """A file whose weights are all far from zero."""
    weights = control_train(sd1, one_batch, ground / "start", max_train_steps=1).weights
    generator = torch.Generator().manual_seed(0)
    save_file(
        {k: 0.2 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}, ground / "start.safetensors"
    )
    return ground / "start.safetensors"


# ---- a step, written down a second time ---------------------------------------------------------------------------


class Controlled(nn.Module):
    """A Linear layer whose input is changed: the formula of networks/control_net_lllite.py, forward only."""

    def __init__(self, layer: nn.Module, w: Adapters, image: Tensor, strides: tuple[int, int]):
        super().__init__()
        self.layer, self.w, self.image, self.strides = layer, w, image, strides

    def forward(self, x: Tensor) -> Tensor:
        w = self.w
        e = F.conv2d(self.image, w["conditioning1.0.weight"], w["conditioning1.0.bias"], self.strides[0])
        e = F.conv2d(F.relu(e), w["conditioning1.2.weight"], w["conditioning1.2.bias"], self.strides[1])
        tokens = e.permute(0, 2, 3, 1).flatten(1, 2)
        inner = F.relu(F.linear(x, w["down.0.weight"], w["down.0.bias"]))
        inner = F.relu(F.linear(torch.cat([tokens, inner], 2), w["mid.0.weight"], w["mid.0.bias"]))
        return self.layer(x + F.linear(inner, w["up.0.weight"], w["up.0.bias"]))


def literal_loss(folder: Path, batch: Batch, weights: Adapters, generator: torch.Generator) -> Tensor:
    """diffusers and transformers as their users call them. Draws: timesteps, then noise."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert batch.control is not None and batch.pixels is not None

    for published, (path, strides) in BLOCKS.items():
        for name in PATHS:
            prefix = f"lllite_unet_{published}_transformer_blocks_0_{name.replace('.', '_')}."
            own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            parent = unet.get_submodule(f"{path}.transformer_blocks.0.{name.split('.')[0]}")
            layer = name.split(".")[1]
            setattr(parent, layer, Controlled(getattr(parent, layer), own, batch.control, strides))

    ids = tokenizer(batch.captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        states, posterior = encoder(ids).last_hidden_state, vae.encode(batch.pixels).latent_dist
    shape = posterior.mean.shape[1:]
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in batch.latent_seeds]
    latents = (posterior.mean + posterior.std * torch.stack(draws)) * vae.config.scaling_factor
    t = torch.randint(0, 1000, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    return F.mse_loss(unet(scheduler.add_noise(latents, noise, t), t, states).sample, noise)


def test_one_step_equals_the_literal_reference(sd1: Path, one_batch: Path, start: Path, tmp_path: Path) -> None:
    run = control_train(
        sd1, one_batch, tmp_path, network_weights=start, network_dim=None, cond_emb_dim=None, max_train_steps=1
    )
    weights = {key: value.requires_grad_() for key, value in load_file(start).items()}
    batch = run.trainer.data.load(run.trainer.data.plan_epoch(1)[0], step=0)
    loss = literal_loss(sd1, batch, weights, micro_generator(run, 0))  # type: ignore[arg-type]
    loss.backward()
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    found = run.trainer.gradients[0]
    assert found.keys() == weights.keys()
    largest = max(float(value.grad.abs().max()) for value in weights.values() if value.grad is not None)
    for key, value in weights.items():
        assert value.grad is not None and float((found[key] - value.grad).abs().max()) < 1e-5 * largest, key


def test_both_ways_are_the_same_training(sd1: Path, controlled: Path, start: Path, tmp_path: Path) -> None:
    ours = control_train(sd1, controlled, tmp_path / "script", network_weights=start)
    values: dict[str, Any] = {**AS_NETWORK, "network_weights": start}
    theirs = train(sd1, controlled, tmp_path / "network", **values)
    assert ours.losses == theirs.losses
    assert differing(ours.weights, theirs.weights) == []
    assert len(ours.weights) == 8 * 10 and all(key.startswith("lllite_unet_") for key in ours.weights)
    architecture = "stable-diffusion-v1/control-net-lllite"
    assert ours.metadata["modelspec.architecture"] == theirs.metadata["modelspec.architecture"] == architecture
    assert all(key.startswith(("modelspec.", "sshs_")) for key in ours.metadata)
    assert theirs.metadata["ss_network_module"] == "networks.control_net_lllite"
    assert theirs.trainer.learning == {"denoiser"}  # the text encoder is nothing that it changes


def test_without_training_the_loss_is_the_models(sd1: Path, controlled: Path, dataset: Path, tmp_path: Path) -> None:
    ours = control_train(sd1, controlled, tmp_path / "ours", max_train_steps=1)
    plain = train(sd1, dataset, tmp_path / "plain", max_train_steps=1)  # a LoRA starts at zero as well
    assert ours.losses == plain.losses


# ---- precision, memory, caches, strength --------------------------------------------------------------------------


def test_caches_and_checkpointing_change_nothing(sd1: Path, controlled: Path, start: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"network_weights": start, "max_train_steps": 3, "network_dropout": 0.2}
    plain = control_train(sd1, controlled, tmp_path / "plain", **values)
    kinds: dict[str, dict[str, Any]] = {
        "caches": {"cache_latents": True, "cache_text_encoder_outputs": True},
        "checkpointing": {"gradient_checkpointing": True},
    }
    for name, more in kinds.items():
        run = control_train(sd1, controlled, tmp_path / name, **values, **more)
        assert run.losses == pytest.approx(plain.losses, rel=1e-5), name
        if name == "caches":
            assert run.trainer.models.vae is None and run.trainer.models.encoders == {}


def test_bf16(sd1: Path, controlled: Path, start: Path, tmp_path: Path) -> None:
    plain = control_train(sd1, controlled, tmp_path / "plain", network_weights=start)
    kinds: dict[str, dict[str, Any]] = {"mixed": {}, "full": {"full_bf16": True, "save_precision": "bf16"}}
    for name, more in kinds.items():
        run = control_train(
            sd1, controlled, tmp_path / name, network_weights=start, mixed_precision="bf16", **more
        )  # fmt: skip
        assert run.losses == pytest.approx(plain.losses, rel=0.05), name
        assert {v.dtype for v in run.weights.values()} == {torch.bfloat16 if name == "full" else torch.float32}


def test_multiplier_of_a_dataset(sd1: Path, pictures: Path, controls: Path, start: Path, tmp_path: Path) -> None:
    """At strength 0 it is the model alone, which learns nothing."""
    data = write_dataset(
        tmp_path / "zero.toml", subset(pictures, conditioning_data_dir=str(controls)), network_multiplier=0.0
    )
    run = control_train(sd1, data, tmp_path / "zero", network_weights=start, max_train_steps=1)
    assert all(not gradient.any() for gradient in run.trainer.gradients[0].values())


def test_validation_sees_control_images(sd1: Path, pictures: Path, controls: Path, start: Path, tmp_path: Path) -> None:
    data = write_dataset(
        tmp_path / "v.toml", subset(pictures, conditioning_data_dir=str(controls)), validation_split=0.4
    )
    run = control_train(sd1, data, tmp_path / "run", network_weights=start, max_train_steps=1, learning_rate=1e-30)
    trainer = run.trainer
    found = trainer.validation.loss()
    with trainer.network.disabled():
        base = trainer.validation.loss()
    assert found != pytest.approx(base, rel=1e-3)


# ---- resuming, killing, bad input ---------------------------------------------------------------------------------

LIVELY: dict[str, Any] = {
    "network_dropout": 0.2, "lr_scheduler": "cosine", "ema_decay": 0.9, "save_state": True, "max_train_steps": 7,
    "gradient_accumulation_steps": 2,
}  # fmt: skip


def test_resume_is_exact(sd1: Path, controlled: Path, tmp_path: Path) -> None:
    whole = control_train(sd1, controlled, tmp_path / "whole", **LIVELY)
    folder = tmp_path / "stopped"
    assert control_train(sd1, controlled, folder, interrupt_in=3, **LIVELY).code == EXIT_STOPPED
    run = control_train(sd1, controlled, folder, resume=newest_state(folder, "x"), **LIVELY)
    assert_same_run(run, whole)  # type: ignore[arg-type]


def test_resume_as_a_network(sd1: Path, controlled: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {**LIVELY, **AS_NETWORK}
    whole = train(sd1, controlled, tmp_path / "whole", **values)
    folder = tmp_path / "stopped"
    assert train(sd1, controlled, folder, interrupt_in=4, **values).code == EXIT_STOPPED
    assert_same_run(train(sd1, controlled, folder, resume=newest_state(folder, "x"), **values), whole)


def test_killed_it_goes_on_as_if_nothing_was(sd1: Path, controlled: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {**LIVELY, "max_train_steps": 16, "save_every_n_steps": 2}
    whole = control_train(sd1, controlled, tmp_path / "whole", **values)
    folder, output = tmp_path / "killed", tmp_path / "output.txt"
    own = {"pretrained_model_name_or_path": sd1, "dataset_config": controlled, "output_dir": folder}
    process = child.start(child.script, {**DEFAULTS, **own, **values}, output, "lllite")
    try:
        deadline = time.monotonic() + 120
        while newest_state(folder, "x") is None and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL, output.read_text()
    for path in folder.glob("[!.]*.safetensors"):
        load_file(path)
    run = control_train(sd1, controlled, folder, resume="latest", **values)
    assert_same_run(run, whole)  # type: ignore[arg-type]


def problems(run: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        run()
    return caught.value.problems


def test_data_without_control_images(sd1: Path, dataset: Path, controlled: Path, tmp_path: Path) -> None:
    """Everything at once, before anything is written."""
    lines = problems(lambda: control_train(sd1, dataset, tmp_path / "run", network_weights=tmp_path / "no.safetensors"))
    assert len(lines) == 2 and lines[0].endswith("no.safetensors: no such adapter file")
    assert lines[1].startswith("conditioning_data_dir, the folder of the control images, is missing for")
    (line,) = problems(lambda: train(sd1, controlled, tmp_path / "run"))  # a LoRA does not look at them
    assert line.endswith("conditioning_data_dir has no effect without --task edit or --masked_loss")
    assert not list((tmp_path / "run").glob("*"))


def test_files_to_start_from(sd1: Path, controlled: Path, start: Path, tmp_path: Path) -> None:
    lines = problems(lambda: control_train(sd1, controlled, tmp_path, network_weights=tmp_path / "no.safetensors"))
    assert lines == [f"--network_weights: {tmp_path}/no.safetensors: no such adapter file"]
    lines = problems(lambda: control_train(sd1, controlled, tmp_path, network_weights=start, network_dim=4))
    assert lines == [f"--network_dim 4: {start} of --network_weights has 8; leave it out"]
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    lines = problems(lambda: control_train(sd1, controlled, tmp_path, network_weights=tmp_path / "lora.safetensors"))
    assert lines == [f"--network_weights: {tmp_path}/lora.safetensors is no ControlNet-LLLite"]


def test_options_of_networks_that_change_weights(sd1: Path, controlled: Path, start: Path, tmp_path: Path) -> None:
    values = {**AS_NETWORK, "base_weights": [start], "scale_weight_norms": 1.0, "lora_format": "peft"}
    assert problems(lambda: train(sd1, controlled, tmp_path, **values)) == [
        f"--{name} has no meaning with --network_module networks.control_net_lllite"
        for name in ("base_weights", "scale_weight_norms", "lora_format")
    ]


def test_a_missing_module_is_one_line(sd1: Path, controlled: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {**AS_NETWORK, "network_module": "networks.control_net_lllit"}
    lines = problems(lambda: train(sd1, controlled, tmp_path, **values))
    assert [line for line in lines if "cannot be imported" in line] == lines[:1]


# ---- previews -----------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path, controls: Path) -> Iterator[Path]:
    path = tmp_path / "prompts.txt"
    cat = "red cat --w 64 --h 64 --s 3 --d 1"
    path.write_text(f"{cat} --cn {controls}/p00.png\n{cat} --cn {controls}/p01.png\n{cat}\n")
    yield path


def pictures_of(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((folder / "sample").glob("x_0*.png"))]


def test_previews_follow_their_control_images(
    sd1: Path, controlled: Path, start: Path, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values: dict[str, Any] = {"sample_prompts": prompts, "sample_at_first": True, "max_train_steps": 1}
    with caplog.at_level(logging.WARNING):
        run = control_train(sd1, controlled, tmp_path / "run", network_weights=start, **values)
    assert "1 prompts have no control image (--cn)" in caplog.text and "has no effect with" not in caplog.text
    one, two, without = pictures_of(run.folder)
    assert not np.array_equal(one, two) and not np.array_equal(one, without)
    plain = control_train(sd1, controlled, tmp_path / "plain", network_weights=start, max_train_steps=1)
    assert differing(run.weights, plain.weights) == []  # a preview leaves no trace
    untrained = control_train(sd1, controlled, tmp_path / "untrained", **values)
    for picture in pictures_of(untrained.folder):
        assert np.array_equal(picture, without)


def test_other_networks_say_that_control_images_have_no_effect(
    sd1: Path, dataset: Path, prompts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        train(sd1, dataset, tmp_path / "run", sample_prompts=prompts, sample_at_first=True, max_train_steps=1)
    assert "--sample_prompts: --cn has no effect with sd models" in caplog.text


def test_control_images_of_prompts_are_read_before_training(sd1: Path, controlled: Path, tmp_path: Path) -> None:
    prompts, broken = tmp_path / "prompts.txt", tmp_path / "broken.png"
    values: dict[str, Any] = {"sample_prompts": prompts, "sample_every_n_steps": 1}
    prompts.write_text(f"red cat --cn {tmp_path}/no.png\n")
    (line,) = problems(lambda: control_train(sd1, controlled, tmp_path / "run", **values))
    assert line == f"{prompts}, line 1: controlnet_image {tmp_path}/no.png does not exist"
    broken.write_bytes(b"x")
    prompts.write_text(f"red cat --cn {broken}\n")
    (line,) = problems(lambda: control_train(sd1, controlled, tmp_path / "run", **values))
    assert line.startswith(f"{broken}: cannot be read as a picture")


# ---- Stable Diffusion XL ------------------------------------------------------------------------------------------


def test_sdxl_both_ways(controlled: Path, tmp_path: Path) -> None:
    """Names, sizes and metadata of the files that are shared, and a training that follows the control images."""
    model = sdxl.make(tmp_path / "model")["pretrained_model_name_or_path"]
    cached: dict[str, Any] = {"cache_latents": True, "cache_text_encoder_outputs": True}
    first = control_train(model, controlled, tmp_path / "first", family="sdxl", **cached)
    assert first.trainer.models.vae is None and first.trainer.models.encoders == {}
    blocks = {name.partition("_transformer")[0].removeprefix("lllite_unet_") for name in first.weights}
    assert blocks == {"input_blocks_4_1", "input_blocks_5_1", "input_blocks_7_1", "input_blocks_8_1", "middle_block_1"}
    assert first.metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/control-net-lllite"
    assert all(p.abs().max() > 0 for key, p in first.weights.items() if ".up.0." in key)
    ours = control_train(model, controlled, tmp_path / "ours", family="sdxl", network_weights=first.file)
    values: dict[str, Any] = {**AS_NETWORK, "network_weights": first.file, "family": "sdxl"}
    theirs = train(model, controlled, tmp_path / "theirs", **values)
    assert differing(ours.weights, theirs.weights) == []
