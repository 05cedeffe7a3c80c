# SPDX-License-Identifier: Apache-2.0
"""Weights that are read from files meet models that are on a card, or that wait in main memory until blocks run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.families.adapters import load_network_module
from tests.adapters.known_formats import dora_norms
from tests.adapters.models import randomize, tiny_clip, tiny_unet
from tests.trainers.helpers import Run, train

pytestmark = pytest.mark.gpu

KINDS: dict[str, dict[str, str]] = {
    "networks.lora": {"dora_wd": "True", "conv_dim": "2"},
    "networks.lora_fa": {},
    "networks.loha": {"dora_wd": "True"},
    "networks.lokr": {"factor": "2"},
    "networks.oft": {},
    "networks.dylora": {"unit": "2"},
    "lycoris.kohya": {"algo": "lora", "preset": "attn-mlp"},
}
PLACES = {"all on the card": ("cuda", "cuda"), "the denoiser waits": ("cuda", "cpu"), "all wait": ("cpu", "cpu")}


@pytest.mark.parametrize("name", KINDS)
def test_merging_gives_what_it_gives_on_the_cpu(name: str, tmp_path: Path) -> None:
    if name.startswith("lycoris"):
        pytest.importorskip("lycoris.kohya")
        pytest.importorskip("triton")  # on a card, LyCORIS compiles its arithmetic
    file = adapters(name, tmp_path / "x.safetensors")
    expected = merged(name, file, ("cpu", "cpu"))
    plain = {**dict(tiny_clip().state_dict()), **dict(tiny_unet().state_dict())}
    assert sum(not torch.equal(value, plain[key]) for key, value in expected.items()) > 10
    for place, devices in PLACES.items():
        found = merged(name, file, devices)
        assert all(torch.allclose(found[key], value, atol=1e-5) for key, value in expected.items()), place


def adapters(name: str, file: Path) -> Path:
    """A file of adapters of this kind that change every layer."""
    torch.manual_seed(3)
    network = load_network_module(name).create_network(1.0, 2, 1.0, None, [tiny_clip()], tiny_unet(), **KINDS[name])
    network.attach(train_denoiser=True, train_text_encoder=True)
    randomize(network)
    network.save(file, dtype=None, metadata=None)
    return file


def merged(name: str, file: Path, devices: tuple[str, str]) -> dict[str, Tensor]:
    """The weights of text encoder and U-Net on these devices, with the file merged at half strength."""
    models: list[nn.Module] = [tiny_clip().to(devices[0]), tiny_unet().to(devices[1])]
    network, weights = load_network_module(name).create_network_from_weights(
        0.5, file, None, [models[0]], models[1], for_inference=True
    )
    network.load(weights)
    network.merge_into()
    values = {}
    for model, device in zip(models, devices, strict=True):
        assert {parameter.device.type for parameter in model.parameters()} == {device}
        values.update({key: value.cpu() for key, value in model.state_dict().items()})
    return values


def test_norms_of_dora_from_a_model_on_the_card() -> None:
    """--lora_format comfy reads the model's weights at each save."""
    unet = tiny_unet()
    torch.manual_seed(3)
    network = load_network_module("networks.lora").create_network(1.0, 2, 1.0, None, [], unet, dora_wd="True")
    randomize(network)
    tensors, targets = network.state(None), network.targets()
    expected = dora_norms(tensors, lambda name: targets[name].weight)
    unet.to("cuda")
    found = dora_norms(tensors, lambda name: targets[name].weight)
    assert found and found.keys() == expected.keys()
    for name, norms in expected.items():
        for ours, theirs in zip(found[name], norms, strict=True):
            assert ours.device.type == "cpu" and torch.allclose(ours, theirs, rtol=1e-5)


# what is read from files in a run, and the way in which the denoiser is kept
RUNS: dict[str, dict[str, Any]] = {
    "in full": {},
    "swapped": {"blocks_to_swap": 2},
    "in fewer bits": {"base_quant": "int8"},
}


@pytest.fixture(scope="module")
def first(sd1: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose file and state others begin with."""
    folder = tmp_path_factory.mktemp("first")
    return train(sd1, dataset, folder, max_train_steps=1, save_state=True, ema_decay=0.9, optimizer_type="AdamW")


@pytest.mark.parametrize("name", RUNS)
def test_runs_begin_with_files(name: str, sd1: Path, dataset: Path, first: Run, tmp_path: Path) -> None:
    """As a part of the model and as adapters: the same model, and so the same loss. Then a state with averages."""
    own = {"max_train_steps": 1, "lora_format": "comfy", **RUNS[name]}
    merged = train(sd1, dataset, tmp_path, **own, base_weights=first.file)
    given = train(sd1, dataset, tmp_path, **own, network_weights=first.file, dim_from_weights=True, network_dim=None)
    assert merged.trainer.device == torch.device("cuda:0") == given.trainer.device
    assert merged.losses == pytest.approx(given.losses, rel=1e-2 if name == "in fewer bits" else 1e-4)
    resumed = train(
        sd1, dataset, tmp_path, max_train_steps=2, ema_decay=0.9, save_state=True, optimizer_type="AdamW",
        resume=first.folder / "x-state", **RUNS[name],
    )  # fmt: skip
    assert [report.step for report in resumed.trainer.reports] == [2]
