# SPDX-License-Identifier: Apache-2.0
"""networks.dylora: which ranks learn, how the output is scaled, names and groups as in sd-scripts 0.10.1."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.adapters.layers.dylora import DyLoRALayer, DyloraSettings
from library.adapters.target_spec import TargetModule, TargetSpec
from library.errors import UserError
from library.families.adapters import load_network_module
from networks import dylora, lora
from tests.adapters.families import TINY
from tests.adapters.models import distance, randomize, read_json, run_unet, tiny_clip, tiny_unet
from tests.adapters.test_golden import meta_models

MODULES = {
    "linear": (lambda: nn.Linear(12, 10), (2, 5, 12)),
    "conv1x1": (lambda: nn.Conv2d(6, 10, 1), (2, 6, 7, 5)),
    "conv3x3": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 7, 5)),
}


class Subject:
    """A layer of rank 6 with blocks of 2 on one module; attached, in training."""

    def __init__(self, kind: str):
        torch.manual_seed(0)
        make, shape = MODULES[kind]
        self.module = make().requires_grad_(False)
        self.x = torch.randn(shape)
        target = TargetSpec("lora_unet_x", (TargetModule("x", self.module),), "denoiser")
        self.layer = DyLoRALayer(target, rank=6, alpha=3.0, settings=DyloraSettings(unit=2))
        randomize(self.layer)
        self.plain = self.module(self.x)
        self.layer.attach()

    def truncated(self, used: int) -> Tensor:
        """By the formula: the first `used` ranks, scaled by alpha / rank * sqrt(rank / used)."""
        tensors = self.layer.tensors()
        down, up = tensors["lora_down.weight"][:used], tensors["lora_up.weight"][:, :used]
        change = (up.flatten(1) @ down.flatten(1)).reshape(self.module.weight.shape)  # type: ignore[arg-type]
        self.layer.detach()
        before = self.module.weight.clone()  # type: ignore[operator]
        self.module.weight.copy_(before + 3 / 6 * math.sqrt(6 / used) * change)  # type: ignore[operator]
        result = self.module(self.x)
        self.module.weight.copy_(before)  # type: ignore[operator]
        self.layer.attach()
        return result


@pytest.fixture(params=MODULES)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


def seed_for(blocks: int, drawn: int) -> int:
    """A seed with which torch draws this block first."""
    for seed in range(100):
        torch.manual_seed(seed)
        if int(torch.randint(blocks, ())) == drawn:
            return seed
    raise AssertionError("no seed draws it")


@pytest.mark.parametrize("block", [0, 1, 2])
def test_one_block_learns(subject: Subject, block: int) -> None:
    """Blocks below take part without gradient; blocks above are left out; the scale makes up for it."""
    torch.manual_seed(seed_for(3, block))
    output = subject.module(subject.x)
    torch.testing.assert_close(output, subject.truncated(2 * (block + 1)), rtol=1e-5, atol=1e-5)
    output.square().mean().backward()
    for blocks in (subject.layer.lora_down, subject.layer.lora_up):
        assert [parameter.grad is not None for parameter in blocks] == [index == block for index in range(3)]


def test_all_ranks_at_inference(subject: Subject) -> None:
    subject.layer.eval()
    torch.testing.assert_close(subject.module(subject.x), subject.truncated(6), rtol=1e-5, atol=1e-5)


def test_every_block_is_drawn() -> None:
    subject = Subject("linear")
    torch.manual_seed(0)
    drawn = [subject.layer.used_ranks() for _ in range(300)]
    assert all(80 <= drawn.count(used) <= 120 for used in (2, 4, 6)) and set(drawn) == {2, 4, 6}


def test_frozen_ranks_stay_under_momentum_and_decay() -> None:
    """What has no gradient is not moved by what the optimizer remembers."""
    subject = Subject("linear")
    optimizer = torch.optim.AdamW(subject.layer.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(12):
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(step)
        block = subject.layer.used_ranks() // 2 - 1
        before = [[value.clone() for value in blocks] for blocks in (subject.layer.lora_down, subject.layer.lora_up)]
        torch.manual_seed(step)
        subject.module(subject.x).square().mean().backward()
        optimizer.step()
        for blocks, old in zip((subject.layer.lora_down, subject.layer.lora_up), before, strict=True):
            assert [not torch.equal(a, b) for a, b in zip(blocks, old)] == [index == block for index in range(3)]


def test_fused_modules_draw_once() -> None:
    """q, k and v of a fused layer use the same ranks in one pass."""
    tiny = TINY["flux"]
    model = tiny.make()
    network: Any = dylora.create_network(1.0, 4, 2.0, None, [], model, unit="1")
    randomize(network)
    network.attach(train_denoiser=True, train_text_encoder=False)
    tiny.run(model).square().mean().backward()
    learned = [[p.grad is not None for p in layer.lora_up] for layer in network.named_layers().values()]
    assert all(sum(flags) == 1 for flags in learned) and len({tuple(flags) for flags in learned}) == 4
    network.eval()
    applied = tiny.run(model)
    network.merge_into()
    assert distance(tiny.run(model), applied) < 1e-5


def test_draws_come_from_the_seed_and_survive_recomputation() -> None:
    def gradients(recompute: bool) -> list[Tensor | None]:
        unet = tiny_unet().train()
        torch.manual_seed(5)
        network: Any = dylora.create_network(1.0, 4, 2.0, None, None, unet, dyloRA="2", conv_dim="4")
        randomize(network)
        network.attach(train_denoiser=True, train_text_encoder=False)
        if recompute:
            unet.enable_gradient_checkpointing()  # type: ignore[operator]
        torch.manual_seed(1)
        run_unet(unet).square().mean().backward()
        return [parameter.grad for parameter in network.parameters()]

    first, again, recomputed = gradients(False), gradients(False), gradients(True)
    assert any(value is None for value in first) and any(value is not None for value in first)
    for a, b, c in zip(first, again, recomputed, strict=True):
        assert (a is None) == (b is None) == (c is None)
        if a is not None and b is not None and c is not None:
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-7)


# ---- names, groups, files ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd15() -> tuple[nn.Module, nn.Module]:
    return meta_models("sd15")


@pytest.mark.parametrize(
    ("variant", "arguments"),
    [("sd15", {}), ("sd15_conv2", {"conv_dim": "4", "unit": "2"})],
    ids=["plain", "conv4_unit2"],
)
def test_saved_keys_and_shapes(variant: str, arguments: dict[str, str], sd15: tuple[nn.Module, nn.Module]) -> None:
    """Those of a LoRA of the full rank; convolutions have the rank of the rest."""
    network = load_network_module("networks.dylora").create_network(1.0, 4, 1.0, None, *sd15, **arguments)
    expected = [
        (f"{name}.{suffix}", shape)
        for name, down, up in read_json("lora_keys.json")[variant]
        for suffix, shape in (
            ("alpha", []), ("lora_down.weight", [4, *down[1:]]), ("lora_up.weight", [up[0], 4, *up[2:]]),
        )
    ]  # fmt: skip
    assert [(key, list(value.shape)) for key, value in network.state(None).items()] == expected


@pytest.mark.parametrize("case", read_json("dylora_groups.json")["cases"])
def test_optimizer_groups(case: dict[str, Any], sd15: tuple[nn.Module, nn.Module]) -> None:
    network = dylora.create_network(1.0, 4, 1.0, None, *sd15, loraplus_lr_ratio="4")
    groups = network.param_groups(
        learning_rate=case["learning_rate"], unet_lr=case["unet_lr"], text_encoder_lr=case["text_encoder_lr"]
    )
    found = [[g["lr"], len(g["params"]), sum(p.numel() for p in g["params"])] for g in groups]
    assert found == case["groups"]


def test_a_file_is_a_plain_lora(tmp_path: Path) -> None:
    unet, encoder = tiny_unet(), tiny_clip()
    network: Any = dylora.create_network(1.0, 4, 2.0, None, encoder, unet, unit="2", conv_dim="4")
    assert network.is_sparse()
    randomize(network)
    network.attach(train_denoiser=True, train_text_encoder=True)
    network.eval()
    expected = run_unet(unet)
    network.save(tmp_path / "dylora.safetensors", dtype=None, metadata=None)
    network.detach()
    for module in (lora, dylora):
        read, weights = module.create_network_from_weights(1.0, tmp_path / "dylora.safetensors", None, encoder, unet)
        read.attach(train_denoiser=True, train_text_encoder=True)
        read.eval()
        assert distance(run_unet(unet), expected) < 1e-6
        assert all(torch.equal(value, weights[key]) for key, value in read.state(None).items())
        read.detach()
    with pytest.raises(UserError, match=r"has rank 4, this network has 8 \(set --network_dim"):
        dylora.create_network(1.0, 8, 2.0, None, encoder, unet, conv_dim="8").load(weights)
    with pytest.raises(UserError, match="unit=3 does not divide the rank 4"):
        dylora.create_network_from_weights(1.0, None, None, encoder, unet, weights_sd=weights, unit="3")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"unit": "3"}, "unit=3 does not divide the rank 4 of lora_"),
        ({"unit": "2", "dyloRA": "4"}, "unit=2 and dyloRA=4 are two names of one thing"),
        ({"conv_dim": "2"}, "conv_dim must equal --network_dim, which is 4; got 2"),
        ({"dylora": "2"}, "unknown key 'dylora'. Did you mean 'dyloRA'?"),
        ({"unit": "0"}, "unit must be at least 1, got 0"),
        ({"block_dims": "1"}, "unknown key 'block_dims'"),
    ],
)
def test_mistakes(arguments: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        dylora.create_network(1.0, 4, 1.0, None, tiny_clip(), tiny_unet(), **arguments)
    [line] = error.value.problems
    assert line.startswith("--network_args: ") and expected in line


def test_no_effect_is_said(caplog: pytest.LogCaptureFixture) -> None:
    module = load_network_module("networks.dylora")
    with caplog.at_level(logging.WARNING):
        module.create_network(1.0, 4, 1.0, None, None, tiny_unet(), neuron_dropout=0.1, conv_dim="4", conv_alpha="3")
    assert "--network_dropout: no effect, networks.dylora" in caplog.text
    assert "conv_alpha: no effect" in caplog.text
