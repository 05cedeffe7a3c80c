# SPDX-License-Identifier: Apache-2.0
"""networks.lora_fa: the down matrices stay as they were drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.adapters.layers.lora_fa import LoRAFALayer
from library.adapters.target_spec import TargetModule, TargetSpec
from library.errors import UserError
from library.families.adapters import load_network_module
from networks import lora, lora_fa
from tests.adapters.families import TINY
from tests.adapters.models import distance, randomize, read_json, run_unet, tiny_clip, tiny_unet
from tests.adapters.test_golden import meta_models


def network_of(**arguments: str) -> Any:
    torch.manual_seed(1)
    unet = tiny_unet()
    network: Any = lora_fa.create_network(1.0, 4, 2.0, None, tiny_clip(), unet, **arguments)
    network.attach(train_denoiser=True, train_text_encoder=True)
    return network, unet


def test_only_up_matrices_learn() -> None:
    network, unet = network_of(conv_dim="2")
    groups = network.param_groups(learning_rate=0.1)
    layers = network.named_layers().values()
    ups = {id(layer.lora_up) for layer in layers}
    assert {id(parameter) for group in groups for parameter in group["params"]} == ups
    assert {id(parameter) for own in network.module_parameters().values() for parameter in own} == ups
    before = {name: value.clone() for name, value in network.state(None).items()}
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    for _ in range(2):
        run_unet(unet).square().mean().backward()
        optimizer.step()
    after = network.state(None)
    unet_keys = [key for key in after if key.startswith("lora_unet_")]
    moved = {key.partition(".")[2] for key in unet_keys if not torch.equal(before[key], after[key])}
    assert moved == {"lora_up.weight"}


@pytest.mark.parametrize("module", [nn.Linear(300, 200), nn.Conv2d(60, 100, 3)], ids=["linear", "conv"])
def test_start_values(module: nn.Module) -> None:
    """Normal with variance 2 / (columns + rank); no change at the start."""
    torch.manual_seed(0)
    target = TargetSpec("lora_unet_x", (TargetModule("x", module),), "denoiser")
    layer = LoRAFALayer(target, rank=16, alpha=1.0)
    columns = layer.lora_down[0].numel()
    assert layer.lora_down.std().item() == pytest.approx(math.sqrt(2 / (columns + 16)), rel=0.05)
    assert not layer.lora_up.any()
    normed = (layer.lora_down / layer.lora_down.std()).flatten()
    assert (normed.abs() > 2).float().mean().item() == pytest.approx(0.0455, abs=0.01)  # not uniform


def test_a_limited_norm_leaves_the_down_matrix_alone() -> None:
    network, _ = network_of()
    randomize(network)
    downs = {name: layer.lora_down.clone() for name, layer in network.named_layers().items()}
    report = network.scale_norms(0.1)
    assert float(report.maximum) == pytest.approx(0.1, rel=1e-4)
    for name, layer in network.named_layers().items():
        assert torch.equal(layer.lora_down, downs[name])
        assert layer.delta_weight().norm().item() * layer.scale <= 0.1001


def test_a_resumed_run_has_the_same_down_matrices() -> None:
    network, unet = network_of()
    randomize(network)
    expected = run_unet(unet)
    state = network.exact_state()
    network.detach()
    torch.manual_seed(9)
    other: Any = lora_fa.create_network(1.0, 4, 2.0, None, tiny_clip(), unet)
    other.attach(train_denoiser=True, train_text_encoder=True)
    other.load_exact_state(state)
    assert torch.equal(run_unet(unet), expected)


def test_a_file_is_a_plain_lora(tmp_path: Path) -> None:
    network, unet = network_of(conv_dim="2")
    randomize(network)
    expected = run_unet(unet)
    network.save(tmp_path / "fa.safetensors", dtype=None, metadata=None)
    network.detach()
    for module in (lora, lora_fa):
        read, weights = module.create_network_from_weights(1.0, tmp_path / "fa.safetensors", None, tiny_clip(), unet)
        read.attach(train_denoiser=True, train_text_encoder=True)
        assert distance(run_unet(unet), expected) < 1e-6
        assert all(torch.equal(value, weights[key]) for key, value in read.state(None).items())
        read.detach()


@pytest.mark.parametrize(
    ("variant", "arguments"), [("sd15", {}), ("sd15_conv2", {"conv_dim": "2"})], ids=["plain", "conv2"]
)
def test_saved_keys_and_shapes(variant: str, arguments: dict[str, str]) -> None:
    models = meta_models("sd15")
    network = load_network_module("networks.lora_fa").create_network(1.0, 4, 1.0, None, *models, **arguments)
    expected = [
        (f"{name}.{suffix}", shape)
        for name, down, up in read_json("lora_keys.json")[variant]
        for suffix, shape in (("alpha", []), ("lora_down.weight", down), ("lora_up.weight", up))
    ]
    assert [(key, list(value.shape)) for key, value in network.state(None).items()] == expected


def test_fused_layers_and_dropouts() -> None:
    tiny = TINY["sd35"]
    model = tiny.make()
    arguments = {"rank_dropout": "0.3", "module_dropout": "0.2"}
    network: Any = lora_fa.create_network(1.0, 4, 2.0, None, [], model, neuron_dropout=0.1, **arguments)
    randomize(network)
    network.attach(train_denoiser=True, train_text_encoder=False)
    torch.manual_seed(0)
    dropped = tiny.run(model)
    network.eval()
    applied = tiny.run(model)
    assert distance(dropped, applied) > 1e-3
    network.merge_into()
    assert distance(tiny.run(model), applied) < 1e-5


def test_mistakes() -> None:
    module = load_network_module("networks.lora_fa")
    with pytest.raises(UserError, match="unknown key 'loraplus_lr_ratio'"):  # as sd-scripts: down matrices have no rate
        module.check_arguments({"loraplus_lr_ratio": "4"})
    with pytest.raises(UserError, match=r"dropout=0.2 is --network_dropout, which is 0.1"):
        lora_fa.create_network(1.0, 4, 1.0, None, None, tiny_unet(), 0.1, dropout="0.2")
