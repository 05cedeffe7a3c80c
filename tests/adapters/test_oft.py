# SPDX-License-Identifier: Apache-2.0
"""networks.oft and networks.oft_flux: the formula of sd-scripts 0.10.1, its names and shapes, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.adapters.layers.oft import OFTLayer, OftSettings
from library.adapters.target_spec import TargetModule, TargetSpec
from library.errors import UserError
from library.families.adapters import load_network_module
from networks import oft, oft_flux
from tests.adapters.families import TINY, full_models
from tests.adapters.models import distance, randomize, read_json, run_unet, tiny_clip, tiny_unet
from tests.adapters.test_family_golden import unpacked
from tests.adapters.test_golden import meta_models

KEYS = {name: value for name, value in read_json("oft_keys.json").items() if name != "_about"}
ROOT = Path(__file__).parents[2]
MODULES = {
    "linear": (lambda: nn.Linear(12, 10), (2, 5, 12)),
    "conv1x1": (lambda: nn.Conv2d(6, 10, 1, bias=False), (2, 6, 7, 5)),
    "conv3x3": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 7, 5)),
}


def rotation(blocks: Tensor, alpha: float, multiplier: float = 1.0) -> Tensor:
    """R of all blocks by the published formula, in float64."""
    blocks = blocks.detach().double()
    skew = blocks - blocks.transpose(1, 2)
    norm = skew.norm()
    limit = alpha * blocks.shape[0] * blocks.shape[1]  # alpha times the rows
    skew = skew * ((norm.clamp(max=limit) + 1e-8) / (norm + 1e-8))
    unit = torch.eye(blocks.shape[1], dtype=torch.float64)
    turned = (unit + skew) @ (unit - skew).inverse()
    return multiplier * (turned - unit) + unit


def rotated(weight: Tensor, turned: Tensor) -> Tensor:
    """W' with w'_km = Σ_n R_knm w_kn: block k of the rows."""
    parts = weight.double().reshape(*turned.shape[:2], -1)
    return torch.einsum("knm,knp->kmp", turned, parts).reshape(weight.shape)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("alpha", [1.0, 0.05])
@pytest.mark.parametrize("multiplier", [1.0, 0.6])
def test_the_formula(kind: str, alpha: float, multiplier: float) -> None:
    torch.manual_seed(0)
    make, shape = MODULES[kind]
    module = make().requires_grad_(False)
    x = torch.randn(shape)
    layer = OFTLayer(TargetSpec("oft_unet_x", (TargetModule("x", module),), "denoiser"), count=2, alpha=alpha)
    randomize(layer)
    layer.set_multiplier(multiplier)
    weight = rotated(module.weight, rotation(layer.oft_blocks[0], layer.alpha, multiplier)).float()  # type: ignore[arg-type]
    if isinstance(module, nn.Conv2d):
        expected = F.conv2d(x, weight, module.bias, module.stride, module.padding)
    else:
        expected = F.linear(x, weight, module.bias)  # type: ignore[arg-type]
    plain = module(x)
    layer.attach()
    assert distance(expected, plain) > 0.02
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.merged_weight(), weight, rtol=1e-5, atol=1e-6)
    layer.detach()
    torch.testing.assert_close(plain + multiplier * layer.delta(x), expected, rtol=1e-5, atol=1e-5)


def test_rotations_are_orthogonal_and_bounded() -> None:
    """Lengths and angles of the weight's columns within a block stay; alpha bounds ‖Q‖, so the turn."""
    torch.manual_seed(0)
    module = nn.Linear(12, 40)
    target = TargetSpec("oft_unet_x", (TargetModule("x", module),), "denoiser")
    turns = []
    for alpha in (1e-3, 1e-1):
        layer = OFTLayer(target, count=4, alpha=alpha)
        randomize(layer, size=5.0)
        turn = layer.turn(0).detach() + torch.eye(10)
        torch.testing.assert_close(turn @ turn.transpose(1, 2), torch.eye(10).expand(4, 10, 10), rtol=0, atol=1e-5)
        turns.append(float((turn - torch.eye(10)).norm()))
        skew = (turn - torch.eye(10)).double() @ (turn.double() + torch.eye(10)).inverse()  # Q from R
        assert float(skew.norm()) == pytest.approx(alpha * 40, rel=1e-3)
    assert turns[0] < turns[1]


def test_gradient_at_the_start() -> None:
    module = nn.Linear(12, 10).requires_grad_(False)
    layer = OFTLayer(TargetSpec("oft_unet_x", (TargetModule("x", module),), "denoiser"), count=2, alpha=1e-3)
    layer.attach()
    module(torch.randn(3, 12)).square().sum().backward()
    gradient = layer.oft_blocks[0].grad
    assert gradient is not None and gradient.isfinite().all() and gradient.abs().max() > 0


# ---- names and files -----------------------------------------------------------------------------------------------


def models_of(variant: str) -> nn.Module:
    """The denoiser at full size, without weights."""
    if variant.startswith("sd15"):
        return meta_models("sd15")[1]
    if variant.startswith("flux"):
        return full_models("flux_dev")[1]
    from diffusers import UNet2DConditionModel

    config = json.loads((ROOT / "configs" / "models" / "sdxl.json").read_text())["unet"]
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@pytest.mark.parametrize("variant", KEYS)
def test_saved_keys_and_shapes(variant: str) -> None:
    golden = KEYS[variant]
    module = load_network_module("networks.oft_flux" if variant.startswith("flux") else "networks.oft")
    denoiser = models_of(variant)
    with torch.device("meta"):
        network: Any = module.create_network(1.0, 4, 1e-3, None, [tiny_clip()], denoiser, **golden["network_args"])
    expected: list[tuple[str, list[int]]] = []
    for name, sizes in unpacked(golden["modules"]):
        if variant.startswith("flux"):
            own = [("alpha", []), *((f"oft_blocks.{i}", [4, size, size]) for i, size in enumerate(sizes))]
        else:
            own = [("oft_blocks", [4, sizes[0], sizes[0]]), ("alpha", [])]
        expected += [(f"oft_unet_{name}.{suffix}", shape) for suffix, shape in own]
    found = [
        (f"{name}.{suffix}", list(value.shape))
        for name, layer in network.named_layers().items()
        for suffix, value in layer.tensors().items()
    ]
    assert found == expected


@pytest.mark.parametrize("arguments", [{}, {"enable_all_linear": "True"}, {"enable_conv": "True"}])
def test_file_round_trip(arguments: dict[str, str], tmp_path: Path) -> None:
    unet = tiny_unet()
    network: Any = oft.create_network(1.0, 2, 0.01, None, tiny_clip(), unet, **arguments)
    names = [*network.named_layers()]
    assert all(name.startswith("oft_unet_") for name in names)
    assert any("ff_net" in name for name in names) == ("enable_all_linear" in arguments)
    assert any("resnets" in name for name in names) == ("enable_conv" in arguments)
    randomize(network)
    network.attach(train_denoiser=True, train_text_encoder=True)
    expected = run_unet(unet)
    network.save(tmp_path / "oft.safetensors", dtype=None, metadata=None)
    network.detach()
    read, weights = oft.create_network_from_weights(1.0, tmp_path / "oft.safetensors", None, tiny_clip(), unet)
    read.attach(train_denoiser=True, train_text_encoder=True)
    assert distance(run_unet(unet), expected) < 1e-6
    assert all(torch.equal(value, weights[key]) for key, value in read.state(None).items())
    assert read.state(None).keys() == weights.keys()


@pytest.mark.parametrize("arguments", [{}, {"enable_all_linear": "True"}])
def test_flux(arguments: dict[str, str]) -> None:
    """Each part of a fused layer has rotations of its own; merged is applied; the file comes back."""
    tiny = TINY["flux"]
    model = tiny.make()
    network: Any = oft_flux.create_network(1.0, 2, 0.01, None, [], model, **arguments)
    randomize(network)
    plain = tiny.run(model)
    network.attach(train_denoiser=True, train_text_encoder=False)
    applied = tiny.run(model)
    state = network.state(None)
    layer = network.named_layers()["oft_unet_double_blocks_0_img_attn_qkv"]
    for index, blocks in enumerate(layer.oft_blocks):
        base = layer.base_weight(index)
        expected = rotated(base, rotation(blocks, layer.alpha)).float()
        torch.testing.assert_close(layer.merged_weight(index), expected, rtol=1e-5, atol=1e-6)
    read, _ = oft_flux.create_network_from_weights(1.0, None, None, [], model, weights_sd=state)
    assert all(torch.equal(value, state[key]) for key, value in read.state(None).items())
    network.merge_into()
    assert distance(applied, plain) > 1e-3 and distance(tiny.run(model), applied) < 1e-5


def test_scale_weight_norms_finds_nothing() -> None:
    network = oft.create_network(1.0, 2, 0.01, None, None, tiny_unet())
    randomize(network)
    before = network.state(None)
    report = network.scale_norms(0.01)
    assert (float(report.scaled), float(report.mean), float(report.maximum)) == (0.0, 0.0, 0.0)
    assert all(torch.equal(value, before[key]) for key, value in network.state(None).items())


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_mistakes() -> None:
    unet, flux = tiny_unet(), TINY["flux"].make()
    with pytest.raises(UserError, match=r"^--network_dim 3: oft_unet_\S+ has 8 rows, which make no 3 equal blocks$"):
        oft.create_network(1.0, 3, 0.01, None, None, unet)
    with pytest.raises(UserError, match=r"networks\.oft is for UNet2DConditionModel; this model is a Flux"):
        oft.create_network(1.0, 2, 0.01, None, None, flux)
    with pytest.raises(UserError, match=r"networks\.oft_flux is for .*; this model is a UNet2DConditionModel"):
        oft_flux.create_network(1.0, 2, 0.01, None, None, unet)
    with pytest.raises(UserError, match="--network_alpha 0: nothing can rotate"):
        oft.create_network(1.0, 2, 0.0, None, None, unet)
    with pytest.raises(UserError, match=r"unknown key .enable_convs.\. Did you mean 'enable_conv'"):
        oft.create_network(1.0, 2, 0.01, None, None, unet, enable_convs="1")
    with pytest.raises(UserError, match="unknown key 'enable_conv'"):
        oft_flux.create_network(1.0, 2, 0.01, None, None, flux, enable_conv="1")
    small = oft.create_network(1.0, 2, 0.01, None, None, unet)
    with pytest.raises(UserError, match=r"has 2 blocks, this network has 4 \(set --network_dim"):
        oft.create_network(1.0, 4, 0.01, None, None, unet).load(small.state(None))
    numbered = {key.replace("oft_blocks", "oft_blocks.0"): value for key, value in small.state(None).items()}
    with pytest.raises(UserError, match=r"has no oft_blocks .*networks\.oft_flux"):
        small.load(numbered)


def test_false_is_false() -> None:
    """sd-scripts takes any text for true."""
    plain = oft.create_network(1.0, 2, 0.01, None, None, tiny_unet())
    same = oft.create_network(1.0, 2, 0.01, None, None, tiny_unet(), enable_all_linear="False", enable_conv="False")
    assert same.state(None).keys() == plain.state(None).keys()


def test_an_alpha_that_bounds_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        network: Any = oft.create_network(1.0, 2, None, None, None, tiny_unet())
        assert not caplog.text
        oft.create_network(1.0, 2, 1.0, None, None, tiny_unet())
    assert next(iter(network.named_layers().values())).alpha == pytest.approx(1e-3)
    assert "--network_alpha 1: for OFT alpha is how far a layer may rotate" in caplog.text


def test_settings_of_a_file_stand_above() -> None:
    module = nn.Linear(12, 10)
    target = TargetSpec("oft_unet_x", (TargetModule("x", module),), "denoiser")
    layer = OFTLayer(target, count=5, alpha=0.25, settings=OftSettings(numbered=True))
    read = OFTLayer.from_tensors(target, layer.tensors(), OftSettings(module_dropout=0.5))
    assert read.tensors().keys() == layer.tensors().keys() == {"alpha", "oft_blocks.0"}
    assert (read.alpha, read.rank, read.module_dropout) == (0.25, 5, 0.5)  # type: ignore[attr-defined]


def test_another_module_says_which_one_reads_rotations() -> None:
    made = load_network_module("networks.oft").create_network(1.0, 2, 0.1, None, tiny_clip(), tiny_unet(), None)
    other = load_network_module("networks.lora")
    with pytest.raises(UserError, match=r"networks\.oft or oft_flux"):
        other.create_network_from_weights(
            1.0, "x", None, tiny_clip(), tiny_unet(), made.state(None), for_inference=True
        )
