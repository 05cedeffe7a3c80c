# SPDX-License-Identifier: Apache-2.0
"""A new architecture is a room and one row of the registry: the example is trained, saved, resumed and previewed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import networks
from library.errors import UserError
from library.families.adapters import adapter_tables, every_family
from library.families.detect import foreign_file
from library.families.registry import FAMILIES, misfit, scripts
from library.key_tables import publish
from tests.families.example_family import SHEET
from tests.families.example_family.model import rules
from tests.families.example_family.transformer import ExampleTransformer
from tests.tiny import tiny_modules
from tests.tiny_text import make_clip_l
from tests.trainers.helpers import Run, make_pictures, subset, train, write_dataset

FLOW = {"timestep_sampling": "shift", "model_prediction_type": "raw"}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The row of the registry, and the folder of the network module."""
    monkeypatch.setitem(FAMILIES, SHEET.name, SHEET)
    own = Path(__file__).parent / "example_family" / "networks"
    monkeypatch.setattr(networks, "__path__", [*networks.__path__, str(own)])
    for cached in (adapter_tables, every_family):
        cached.cache_clear()
    yield
    for cached in (adapter_tables, every_family):
        cached.cache_clear()


def make(folder: Path) -> Path:
    """A tiny model as a pipeline's folder has it. Equal weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = ExampleTransformer(channels=4, width=32, text_width=32, blocks=3)
    (folder / "transformer").mkdir(parents=True)
    published = publish(denoiser.state_dict(), rules(denoiser))
    save_file(published, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    tiny_modules()[1].save_pretrained(folder / "vae")
    make_clip_l(folder, layout="folder", name="text_encoder")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("example") / "model")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_dataset(folder / "data.toml", subset(make_pictures(folder / "pictures", 2)))


def run(model: Path, dataset: Path, folder: Path, **values: Any) -> Run:
    given = {"network_module": None, "learning_rate": 1e-2, "seed": 3, **FLOW, **values}
    return train(model, dataset, folder, family="example", **given)


def test_a_lora_is_trained_saved_loaded_and_previewed(model: Path, dataset: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a cat --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    previews = {"sample_prompts": prompts, "sample_every_n_steps": 4}
    first = run(model, dataset, tmp_path / "first", max_train_steps=4, gradient_checkpointing=True, **previews)
    assert first.code == 0 and [*(tmp_path / "first" / "sample").glob("*.png")]
    assert "lora_unet_blocks_0_qkv.lora_down.weight" in first.weights
    assert any(name.startswith("lora_te1_") for name in first.weights)
    assert first.metadata["ss_base_model_version"] == "example1"
    assert first.metadata["modelspec.architecture"] == "example-1/lora"
    later = run(model, dataset, tmp_path / "later", max_train_steps=1, network_weights=first.file, learning_rate=1e-12)
    assert later.weights.keys() == first.weights.keys()
    for name, tensor in first.weights.items():
        torch.testing.assert_close(later.weights[name], tensor, rtol=0, atol=1e-9)


def test_the_loss_falls(model: Path, dataset: Path, tmp_path: Path) -> None:
    losses = run(model, dataset, tmp_path, max_train_steps=24, cache_latents=True, network_dim=8).losses
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def test_its_files_and_modules_are_told_apart(model: Path, dataset: Path, tmp_path: Path) -> None:
    file = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in file.items()}
    assert foreign_file(shapes, "example") is None
    assert foreign_file(shapes, "sdxl") == "an Example checkpoint: use example_train_network.py"
    assert misfit("example", "networks.lora_example") is None
    assert misfit("sdxl", "networks.lora_example") == (
        "--network_module networks.lora_example is for Example 1; for Stable Diffusion XL give networks.lora"
    )
    with pytest.raises(UserError, match="for Example 1 give networks"):
        run(model, dataset, tmp_path, max_train_steps=1, network_module="networks.lora_flux")
    assert scripts()["example_train.py"] == ("finetune", "example")
