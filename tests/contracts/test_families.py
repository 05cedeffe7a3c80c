# SPDX-License-Identifier: Apache-2.0
"""What training must do with every architecture. A new one is a row in CASES: tiny model, options, reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

from library.types import Batch
from tests.tiny import make_tiny_sd
from tests.trainers.helpers import (
    Adapters,
    Run,
    assert_same_run,
    make_pictures,
    micro_generator,
    randomized,
    subset,
    train,
    train_with_stops,
    with_lora,
    write_dataset,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One architecture in one configuration."""

    family: str  # of library.models.registry
    make: Callable[[Path], Path]  # a tiny model below a folder -> --pretrained_model_name_or_path
    loss: Callable[[Path, Batch, Adapters, torch.Generator], Tensor]  # of one batch, from libraries and formulas only
    options: dict[str, Any] = field(default_factory=dict)


# ---- Stable Diffusion 1.x and 2.x -----------------------------------------------------------------------------------


def sd_loss(folder: Path, batch: Batch, adapters: Adapters, generator: torch.Generator) -> Tensor:
    """diffusers and transformers as their users call them. Draws: timesteps, then noise."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")

    ids = tokenizer(batch.captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    inner = "" if "text_model" in dict(encoder.named_children()) else "text_model."
    weights = with_lora(encoder, adapters, lambda path: f"lora_te_{inner}{path}".replace(".", "_"))
    states = functional_call(encoder, weights, (ids,)).last_hidden_state
    with torch.no_grad():
        posterior = vae.encode(batch.pixels).latent_dist
    shape = posterior.mean.shape[1:]
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in batch.latent_seeds]
    latents = (posterior.mean + posterior.std * torch.stack(draws)) * vae.config.scaling_factor

    t = torch.randint(0, 1000, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = scheduler.add_noise(latents, noise, t)
    weights = with_lora(unet, adapters, lambda path: f"lora_unet_{path}".replace(".", "_"))
    pred = functional_call(unet, weights, (noisy, t, states)).sample
    is_v = scheduler.config.prediction_type == "v_prediction"
    return F.mse_loss(pred, scheduler.get_velocity(latents, noise, t) if is_v else noise)


CASES: dict[str, Case] = {
    "sd1": Case("sd", lambda folder: make_tiny_sd(folder, version=1), sd_loss),
    "sd2 v": Case(
        "sd", lambda folder: make_tiny_sd(folder, version=2, v_prediction=True), sd_loss,
        {"v2": True, "v_parameterization": True},
    ),
}  # fmt: skip


# ---- the contract ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A case with its model made, and a dataset of one batch."""

    case: Case
    model: Path
    dataset: Path
    ground: Path

    def train(self, folder: Path, dataset: Path | None = None, **values: Any) -> Run:
        own = {**self.case.options, **values}
        return train(self.model, dataset or self.dataset, folder, family=self.case.family, **own)


@pytest.fixture(scope="module", params=CASES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    ground = tmp_path_factory.mktemp("family")
    data = write_dataset(ground / "one_batch.toml", subset(make_pictures(ground / "pictures", 2)))
    case = CASES[request.param]
    return Subject(case, case.make(ground / "model"), data, ground)


@pytest.fixture(scope="module")
def trained(subject: Subject) -> Path:
    """A LoRA file whose matrices are all far from zero."""
    run = subject.train(subject.ground / "first", max_train_steps=1)
    save_file(randomized(run.weights), subject.ground / "trained.safetensors")
    return subject.ground / "trained.safetensors"


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor's difference, relative to the largest gradient of all."""
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    wrong = {k: float((ours[k] - theirs[k]).abs().max()) / largest for k in ours}
    assert max(wrong.values()) < tolerance, max(wrong.items(), key=lambda item: item[1])


def test_one_step_equals_the_literal_reference(subject: Subject, trained: Path, tmp_path: Path) -> None:
    run = subject.train(tmp_path, network_weights=trained, max_train_steps=1, keep_gradients=True)
    adapters = {key: value.requires_grad_() for key, value in load_file(trained).items()}
    batch = run.trainer.data.load(run.trainer.data.plan_epoch(1)[0], step=0)
    loss = subject.case.loss(subject.model, batch, adapters, micro_generator(run, 0))
    loss.backward()
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    grads = {key: value.grad for key, value in adapters.items() if not key.endswith("alpha")}
    assert_close(run.trainer.gradients[0], grads, 1e-5)


def test_overfits_one_batch(subject: Subject, tmp_path: Path) -> None:
    """At one noise level, so that losses can be compared."""
    losses = subject.train(
        tmp_path, network_dim=16, network_alpha=16, network_args=["conv_dim=16", "conv_alpha=16"],
        min_timestep=700, max_timestep=700, learning_rate=2e-2, max_train_steps=30,
    ).losses  # fmt: skip
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_cached_latents_and_texts_train_the_same(subject: Subject, tmp_path: Path) -> None:
    values = {"network_train_unet_only": True, "max_train_steps": 3}
    plain = subject.train(tmp_path / "plain", **values)
    latents = subject.train(tmp_path / "latents", cache_latents=True, **values)
    both = subject.train(tmp_path / "both", cache_latents=True, cache_text_encoder_outputs=True, **values)
    assert latents.losses == pytest.approx(plain.losses, rel=1e-5)
    assert both.losses == pytest.approx(plain.losses, rel=1e-5)
    assert both.trainer.models.vae is None and both.trainer.models.encoders == []


def test_gradient_checkpointing_changes_nothing(subject: Subject, trained: Path, tmp_path: Path) -> None:
    values = {
        "network_weights": trained,
        "max_train_steps": 1,
        "keep_gradients": True,
        "network_args": ["rank_dropout=0.3"],
    }
    plain = subject.train(tmp_path / "plain", **values)
    for name, options in {"recomputed": {}, "offloaded": {"cpu_offload_checkpointing": True}}.items():
        run = subject.train(tmp_path / name, gradient_checkpointing=True, **options, **values)
        assert run.losses == pytest.approx(plain.losses, rel=1e-6)
        assert_close(run.trainer.gradients[0], plain.trainer.gradients[0], 1e-6)


def test_saved_file_loads_as_it_was(subject: Subject, tmp_path: Path) -> None:
    first = subject.train(tmp_path / "first", max_train_steps=2)
    for name, options in {"same": {}, "taken": {"dim_from_weights": True, "network_dim": None}}.items():
        begun: list[dict[str, Tensor]] = []
        subject.train(
            tmp_path / name, network_weights=first.file, max_train_steps=1, learning_rate=1e-30, **options,
            each_step=lambda trainer, seen=begun: seen.append(trainer.network.state(None)),
        )  # fmt: skip
        assert begun[0].keys() == first.weights.keys()
        assert all(torch.equal(begun[0][key], value) for key, value in first.weights.items())


def test_resume_is_exact(subject: Subject, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "three.toml", subset(make_pictures(tmp_path / "pictures", 5), shuffle_caption=True))
    values = {**subject.case.options, "family": subject.case.family, "max_train_steps": 4, "save_state": True}
    whole = train(subject.model, data, tmp_path / "whole", **values)
    assert_same_run(train_with_stops(subject.model, data, tmp_path / "stopped", [2], **values), whole)
