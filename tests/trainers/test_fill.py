# SPDX-License-Identifier: Apache-2.0
"""FLUX.1 Fill: the step, full training with resume, previews, files, bad input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.errors import UserError
from tests.families import flux
from tests.trainers.finetune_runs import finetune, finetune_with_stop
from tests.trainers.helpers import (
    Run,
    assert_same_run,
    make_pictures,
    micro_generator,
    randomized,
    subset,
    train,
    write_dataset,
)


@dataclass(frozen=True)
class Ground:
    """A tiny Fill model, two pictures with a mask each, and a prompt that names a picture and a mask."""

    options: dict[str, Any]
    data: Path
    pictures: Path
    masks: Path

    def train(self, folder: Path, **values: Any) -> Run:
        given = {"family": "flux", "network_module": None, **self.options, "dataset_config": self.data, **values}
        return train(None, given.pop("dataset_config"), folder, **given)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    room = tmp_path_factory.mktemp("fill")
    options = {**flux.make(room / "model", variant="fill"), **flux.USUAL, "guidance_scale": 30.0, "masked_loss": True}
    pictures, masks = make_pictures(room / "pictures", 2), room / "masks"
    masks.mkdir()
    for number in range(2):  # neither edge lies on a border of latent pixels or tokens
        mask = np.zeros((64, 64), np.uint8)
        mask[5 : 37 + number, 11 + number : 50] = 255
        Image.fromarray(mask).save(masks / f"p{number:02d}.png")
    data = write_dataset(room / "data.toml", subset(pictures, conditioning_data_dir=str(masks)))
    return Ground(options, data, pictures, masks)


def prompts_of(ground: Ground, path: Path, *references: Path) -> Path:
    shown = " ".join(f"--ref {reference}" for reference in references)
    path.write_text(f"a red cat --w 64 --h 64 --s 2 --d 1 {shown}\n", encoding="utf-8")
    return path


def test_one_step_equals_the_literal_reference(ground: Ground, tmp_path: Path) -> None:
    """Loss and gradients, with the loss inside the masks; img_in learns too."""
    everything = {"network_args": ["in_dims=[4,0,0,0,0]"]}
    lora = ground.train(tmp_path / "lora", max_train_steps=1, **everything)
    assert lora.metadata["modelspec.architecture"] == "flux-1-fill-dev/lora"
    assert lora.weights["lora_unet_img_in.lora_down.weight"].shape[1] == 384
    save_file(randomized(lora.weights), tmp_path / "lora.safetensors")
    run = ground.train(
        tmp_path / "x", network_weights=tmp_path / "lora.safetensors", keep_gradients=True, max_train_steps=1,
        learning_rate=1e-30, **everything,
    )  # fmt: skip
    adapters = {key: value.requires_grad_() for key, value in load_file(tmp_path / "lora.safetensors").items()}
    batch = run.trainer.data.load(run.trainer.data.plan_epoch(1)[0], step=0)
    assert 0 < float(batch.masks.mean()) < 1
    loss = flux.loss(ground.options, batch, adapters, micro_generator(run, 0))
    loss.backward()
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    expected = {key: value.grad for key, value in adapters.items() if value.grad is not None and "alpha" not in key}
    largest = max(float(grad.abs().max()) for grad in expected.values())
    found = run.trainer.gradients[0]
    assert max(float((found[key] - grad).abs().max()) for key, grad in expected.items()) < 1e-5 * largest
    batch.masks = 1 - batch.masks  # the masks matter
    with torch.no_grad():
        other = flux.loss(ground.options, batch, adapters, micro_generator(run, 0))
    assert float(other) != pytest.approx(run.losses[0], rel=1e-4)


def test_full_training_resumed_and_previews(ground: Ground, tmp_path: Path) -> None:
    """Stopped and resumed to the bit; a preview fills the picture that its prompt names, and the mask decides where."""
    values = {**ground.options, "family": "flux", "max_train_steps": 3, "save_state": True}
    whole = finetune(ground.data, tmp_path / "whole", **values)
    assert_same_run(whole, finetune_with_stop(ground.data, tmp_path / "parts", 2, **values))
    Image.new("L", (64, 64), 255).save(tmp_path / "all.png")
    pictures = []
    for name, mask in (("own", ground.masks / "p00.png"), ("all", tmp_path / "all.png")):
        prompts = prompts_of(ground, tmp_path / f"{name}.txt", ground.pictures / "p00.png", mask)
        more = {"sample_prompts": prompts, "sample_every_n_steps": 1, "max_train_steps": 1, "save_state": False}
        finetune(ground.data, tmp_path / name, **{**values, **more, "gradient_checkpointing": True})
        (picture,) = (tmp_path / name / "sample").glob("*.png")
        pictures.append(np.asarray(Image.open(picture)))
    assert pictures[0].shape == (64, 64, 3) and (pictures[0] != pictures[1]).any()


def test_what_does_not_fit_is_refused_before_loading(ground: Ground, tmp_path: Path) -> None:
    def refused(line: str, **values: Any) -> None:
        with pytest.raises(UserError, match=line):
            ground.train(tmp_path / "refused", max_train_steps=1, **values)

    refused("--cache_latents: masks are kept at the size of latents", cache_latents=True)
    plain = write_dataset(tmp_path / "plain.toml", subset(ground.pictures))
    refused("this model fills what masks cover: give --masked_loss", dataset_config=plain, masked_loss=False)
    refused("--task edit: FLUX.1 Fill fills what masks cover", task="edit")
    refused(r"is a FLUX.1 Fill model \(384 numbers per token, not 64\): add --model_type fill", model_type="flux")
    dev = flux.make(tmp_path / "dev")
    refused(r"is not a FLUX.1 Fill model \(64 numbers per token, not 384\)", **dev)
    lora = {"lora_unet_img_in.lora_down.weight": torch.zeros(4, 64), "lora_unet_img_in.alpha": torch.tensor(4.0)}
    lora["lora_unet_img_in.lora_up.weight"] = torch.zeros(flux.WIDTH, 4)
    save_file(lora, tmp_path / "dev_lora.safetensors")
    refused(
        r"dev_lora\.safetensors is for FLUX.1 dev: its layer img_in reads 64 numbers .*, that of FLUX.1 Fill 384",
        network_weights=tmp_path / "dev_lora.safetensors", network_args=["in_dims=[4,0,0,0,0]"],
    )  # fmt: skip
    alone = prompts_of(ground, tmp_path / "alone.txt", ground.pictures / "p00.png")
    refused("this model needs --ref PICTURE --ref MASK", sample_prompts=alone, sample_every_n_steps=1)
