# SPDX-License-Identifier: Apache-2.0
"""LoRA, DoRA, Tucker, rsLoRA and norms against their formulas, and targets of several modules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.adapters.layers.lora import LoRALayer, LoraSettings, SplitLoRALayer
from library.adapters.target_spec import TargetModule, TargetSpec
from networks.lora import create_network, create_network_from_weights
from tests.adapters.models import distance, randomize, run_unet, tiny_clip, tiny_unet


def on(module: nn.Module, **settings: object) -> LoRALayer:
    torch.manual_seed(1)
    module.requires_grad_(False)
    target = TargetSpec("lora_unet_x", (TargetModule("x", module),), "denoiser")
    layer = LoRALayer(target, rank=4, alpha=2.0, settings=LoraSettings(**settings))  # type: ignore[arg-type]
    randomize(layer)
    return layer


def test_start_values() -> None:
    layer = LoRALayer(TargetSpec("x", (TargetModule("x", nn.Linear(50, 20)),), "denoiser"), rank=16, alpha=8)
    bound = 1 / math.sqrt(50)  # Kaiming with a = sqrt(5): gain 1/sqrt(3), so bound = sqrt(3) * gain / sqrt(inputs)
    assert layer.lora_down.abs().max() <= bound
    assert float(layer.lora_down.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert layer.lora_up.abs().max() == 0
    assert (layer.scale, layer.alpha) == (0.5, 8.0)
    with_factor = LoRALayer(layer.target, rank=16, alpha=8, settings=LoraSettings(scalar=True))
    assert with_factor.scalar == 0 and with_factor.lora_up.abs().max() > 0


def test_rs_lora_scale_and_saved_alpha() -> None:
    layer = on(nn.Linear(6, 5), rs_lora=True)
    assert layer.scale == pytest.approx(2.0 / math.sqrt(4))
    assert float(layer.tensors()["alpha"]) == pytest.approx(2.0 * math.sqrt(4))  # readers divide by 4


def test_tucker_weight() -> None:
    conv = nn.Conv2d(5, 7, 3, padding=1)
    layer = on(conv, tucker=True)
    saved = layer.tensors()
    assert {k: tuple(v.shape) for k, v in saved.items()} == {
        "alpha": (), "lora_down.weight": (4, 5, 1, 1), "lora_up.weight": (7, 4, 1, 1), "lora_mid.weight": (4, 4, 3, 3)
    }  # fmt: skip
    up, mid, down = (saved[f"lora_{name}.weight"] for name in ("up", "mid", "down"))
    delta = torch.einsum("or,rshw,si->oihw", up.flatten(1), mid, down.flatten(1))
    assert distance(layer.merged_weight(), conv.weight + 0.5 * delta) < 1e-6


def dora_weight(weight: Tensor, tensors: dict[str, Tensor], scale: float, dims: tuple[int, ...]) -> Tensor:
    up, down = tensors["lora_up.weight"], tensors["lora_down.weight"]
    changed = weight + scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return tensors["dora_scale"] * changed / torch.linalg.vector_norm(changed, dim=dims, keepdim=True)


@pytest.mark.parametrize("module", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize("axis", ["output", "input"])
def test_dora_weight(module: nn.Module, axis: str) -> None:
    layer = on(module, dora=axis)
    weight = module.weight
    assert isinstance(weight, Tensor)
    other = tuple(range(2, weight.dim()))
    dims = (1, *other) if axis == "output" else (0, *other)
    saved = layer.tensors()
    ones = [1] * (weight.dim() - 2)
    assert tuple(saved["dora_scale"].shape) == ((5, 1, *ones) if axis == "output" else (1, 6, *ones))
    assert distance(layer.merged_weight(), dora_weight(weight, saved, 0.5, dims)) < 1e-6


def test_dora_gradient_of_the_magnitude_and_the_direction() -> None:
    """‖V‖ is a constant in the backward pass (DoRA, section 4.3): gradients equal those of the written-out formula."""
    linear = nn.Linear(6, 5)
    layer = on(linear, dora="output")
    layer.attach()
    x = torch.randn(3, 6)
    found = torch.autograd.grad(linear(x).square().sum(), [*layer.parameters()])
    changed = linear.weight + 0.5 * layer.lora_up @ layer.lora_down
    scale = layer.dora_scale / torch.linalg.vector_norm(changed, dim=1, keepdim=True).detach()
    expected = torch.autograd.grad(F.linear(x, scale * changed, linear.bias).square().sum(), [*layer.parameters()])
    layer.detach()
    assert all(distance(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


def test_dora_needs_no_weight_sized_buffer() -> None:
    layer = on(nn.Linear(6, 5), dora="output")
    assert distance(layer.weight_norms(0), torch.linalg.vector_norm(layer.target.modules[0].module.weight
                    + 0.5 * layer.delta_weight(), dim=1)) < 1e-6  # fmt: skip


def test_factor_is_inside_the_saved_up_matrix() -> None:
    layer = on(nn.Linear(6, 5), scalar=True)
    saved = layer.tensors()
    assert "scalar" not in saved
    assert torch.equal(saved["lora_up.weight"], layer.lora_up.detach() * layer.scalar.detach())
    layer.load_tensors(saved)
    assert layer.scalar == 1 and torch.equal(layer.lora_up, saved["lora_up.weight"])


@pytest.mark.parametrize(("conv", "shape"), [(False, (2, 5, 6)), (True, (2, 6, 4, 4))])
def test_rank_dropout_keeps_whole_ranks_of_a_sample(conv: bool, shape: tuple[int, ...]) -> None:
    layer = on(nn.Conv2d(6, 5, 1) if conv else nn.Linear(6, 5), rank_dropout=0.5)
    inner = torch.ones(2, 4, 3, 3) if conv else torch.ones(2, 7, 4)
    torch.manual_seed(0)
    dropped = layer._drop(inner)
    rows = dropped.flatten(2) if conv else dropped.transpose(1, 2)
    assert set(rows.unique().tolist()) == {0.0, 2.0}  # kept ranks grow by 1 / (1 - rate)
    assert torch.equal(rows, rows[..., :1].expand_as(rows))


def test_neuron_dropout_grows_what_is_kept() -> None:
    layer = on(nn.Linear(6, 5), neuron_dropout=0.25)
    torch.manual_seed(0)
    assert layer._drop(torch.ones(3, 40, 4)).unique().tolist() == [0.0, pytest.approx(1 / 0.75)]


# ---- several modules under one published name ----------------------------------------------------------------------


class Attention(nn.Module):
    """q, k and v apart; published as one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


@pytest.mark.parametrize("dora", [None, "output"])
@pytest.mark.parametrize("split", [False, True])
def test_fused_target(split: bool, dora: str | None) -> None:
    """The file is that of an adapter on the fused matrix; with split, a block-diagonal one of three times the rank."""
    torch.manual_seed(0)
    attention = Attention().requires_grad_(False)
    modules = tuple(TargetModule(f"attn.{n}", getattr(attention, n)) for n in "qkv")
    target = TargetSpec("lora_unet_attn_qkv", modules, "denoiser", split=split)
    kind = SplitLoRALayer if split else LoRALayer
    layer = kind(target, rank=2, alpha=1.0, settings=LoraSettings(dora=dora))
    randomize(layer)
    layer.attach()
    x = torch.randn(3, 5, 8)
    applied = attention(x)
    saved = layer.tensors()
    rank = 6 if split else 2
    assert saved["lora_down.weight"].shape == (rank, 8) and saved["lora_up.weight"].shape == (12, rank)
    assert float(saved["alpha"]) / rank == 0.5

    layer.detach()
    fused = nn.Linear(8, 12).requires_grad_(False)
    with torch.no_grad():
        fused.weight.copy_(torch.cat([m.module.weight for m in modules]))  # type: ignore[arg-type]
        fused.bias.copy_(torch.cat([m.module.bias for m in modules]))  # type: ignore[arg-type]
    whole = TargetSpec(target.name, (TargetModule("attn.qkv", fused),), "denoiser")
    one = LoRALayer(whole, rank=rank, alpha=1.0, settings=LoraSettings(dora=dora))
    assert one.problem(saved) is None
    one.load_tensors(saved)
    one.attach()
    assert distance(fused(x), applied) < 1e-6

    layer.merge()
    assert distance(attention(x), applied) < 1e-6
    again = kind(target, rank=2, alpha=1.0, settings=LoraSettings(dora=dora))
    assert again.problem(saved) is None
    again.load_tensors(saved)
    assert all(torch.equal(value, saved[key]) for key, value in again.tensors().items())


def test_split_target_refuses_a_file_that_mixes_the_parts() -> None:
    modules = tuple(TargetModule(n, nn.Linear(8, 4)) for n in "qkv")
    layer = SplitLoRALayer(TargetSpec("lora_unet_qkv", modules, "denoiser", split=True), rank=2, alpha=1.0)
    tensors = layer.tensors()
    tensors["lora_up.weight"] = torch.ones(12, 6)
    assert layer.problem(tensors) == "was not trained with split_qkv"


def test_split_norm_limit() -> None:
    modules = tuple(TargetModule(n, nn.Linear(8, 4)) for n in "qkv")
    layer = SplitLoRALayer(TargetSpec("lora_unet_qkv", modules, "denoiser", split=True), rank=2, alpha=2.0)
    randomize(layer, size=2.0)
    norm, scaled = layer.limit_norm(0.5)
    assert bool(scaled) and float(norm) == pytest.approx(0.5)
    for part in layer.parts:
        assert float(part.delta_weight().detach().norm() * part.scale) == pytest.approx(0.5, rel=1e-5)


# ---- in a whole model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"conv_dim": "2", "use_tucker": "True", "train_norm": "True"},
        {"dora_wd": "True", "conv_dim": "3", "rs_lora": "True"},
        {"dora_wd": "True", "wd_on_output": "False"},
        {"use_scalar": "True"},
    ],
    ids=["tucker_norm", "dora_rs", "dora_input", "scalar"],
)
def test_file_alone_gives_the_trained_model(arguments: dict[str, str], tmp_path: object) -> None:
    """Applied, loaded from the file into a new network, and merged are one model."""
    encoder, unet = tiny_clip(), tiny_unet()
    network = create_network(1.0, 4, 1.0, None, encoder, unet, **arguments)
    randomize(network)
    network.attach(train_denoiser=True, train_text_encoder=True)
    applied = run_unet(unet)
    path = f"{tmp_path}/x.safetensors"
    network.save(path, dtype=None, metadata=None)
    fresh = tiny_unet()
    other, weights = create_network_from_weights(1.0, path, None, tiny_clip(), fresh, for_inference=True)
    assert all(not p.requires_grad for p in other.parameters())
    assert other.state(None).keys() == weights.keys() == network.state(None).keys()
    other.attach(train_denoiser=True, train_text_encoder=True)
    assert distance(run_unet(fresh), applied) < 1e-6
    other.merge_into()
    assert distance(run_unet(fresh), applied) < 1e-5


def test_norms_are_named_after_their_modules() -> None:
    state = create_network(1.0, 4, 1.0, None, tiny_clip(), tiny_unet(), train_norm="True").state(None)
    assert tuple(state["lora_unet_mid_block_attentions_0_norm.w_norm"].shape) == (16,)
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_norm1.b_norm" in state
    assert not any("resnets" in key for key in state)  # without conv_dim these blocks are left alone
