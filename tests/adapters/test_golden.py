# SPDX-License-Identifier: Apache-2.0
"""Names, ranks, learning-rate groups, merging and norm limits equal what kohya-ss/sd-scripts 0.10.1 computed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.adapters.layers.lora import SplitLoRALayer
from library.adapters.target_spec import TargetModule, TargetSpec
from networks.lora import create_network, create_network_from_weights
from tests.adapters.models import DATA, read_json

KEYS: dict[str, list[Any]] = read_json("lora_keys.json")
CASES: dict[str, Any] = read_json("network_args.json")["cases"]
CONV_NAMES = [row[0] for row in KEYS["sd15_conv2"]]


def meta_models(version: str) -> tuple[nn.Module, nn.Module]:
    """Text encoder and U-Net at full size, without weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    v2 = version == "sd2"
    width, heads, layers = (1024, 16, 23) if v2 else (768, 12, 12)
    config = {"attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True} if v2 else {}
    clip = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads
    )
    with torch.device("meta"):
        return CLIPTextModel(clip), UNet2DConditionModel(cross_attention_dim=width, **config)


@pytest.fixture(scope="module")
def sd15() -> tuple[nn.Module, nn.Module]:
    return meta_models("sd15")


@pytest.mark.parametrize("case", CASES)
def test_modules_ranks_alphas_and_lr_groups(case: str, sd15: tuple[nn.Module, nn.Module]) -> None:
    golden = CASES[case]
    network = create_network(1.0, 4, 1.0, None, *sd15, **golden["network_args"])
    layers = network.named_layers()
    assert [[CONV_NAMES.index(name), layer.rank, layer.alpha] for name, layer in layers.items()] == golden["modules"]
    for rates in golden["lr_groups"].values():
        groups = network.param_groups(
            learning_rate=rates["learning_rate"], unet_lr=rates["unet_lr"], text_encoder_lr=rates["text_encoder_lr"]
        )
        found = [
            {"lr": g["lr"], "n_tensors": len(g["params"]), "n_params": sum(p.numel() for p in g["params"])}
            for g in groups
        ]
        assert found == rates["groups"]
        assert [group["name"] for group in groups] == rates["descriptions"]


@pytest.mark.parametrize(
    ("variant", "arguments"), [("sd15", {}), ("sd15_conv2", {"conv_dim": "2"}), ("sd2_linear_proj", {})]
)
def test_saved_keys_and_shapes(variant: str, arguments: dict[str, str], sd15: tuple[nn.Module, nn.Module]) -> None:
    models = meta_models("sd2") if variant.startswith("sd2") else sd15
    state = create_network(1.0, 4, 1.0, None, *models, **arguments).state(None)
    expected = [
        (f"{name}.{suffix}", shape)
        for name, down, up in KEYS[variant]
        for suffix, shape in (("alpha", []), ("lora_down.weight", down), ("lora_up.weight", up))
    ]
    assert [(key, list(value.shape)) for key, value in state.items()] == expected
    assert {value.dtype for value in state.values()} == {torch.float32}


# ---- the toy model of the golden files --------------------------------------------------------------------------


def container(class_name: str, **children: nn.Module) -> nn.Module:
    """A module of a class with that name: targets are found by class names."""
    module = type(class_name, (nn.Module,), {})()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def toy_models(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    encoder = container(
        "Toy", text_model=container("Toy", self_attn=container("CLIPAttention", q_proj=nn.Linear(9, 9)))
    )
    attention = container(
        "Transformer2DModel",
        proj_in=nn.Conv2d(6, 8, 1), to_q=nn.Linear(8, 8, bias=False), to_out=nn.ModuleList([nn.Linear(8, 10)]),
    )  # fmt: skip
    resnet = container("ResnetBlock2D", conv1=nn.Conv2d(6, 5, 3, padding=1), time_emb_proj=nn.Linear(7, 5))
    block = container("Toy", attentions=nn.ModuleList([attention]), resnets=nn.ModuleList([resnet]))
    unet = container("Toy", down_blocks=nn.ModuleList([block]))
    weights = load_file(DATA / "merge_base_weights.safetensors")
    for model, prefix in ((encoder, "te."), (unet, "unet.")):
        model.load_state_dict({k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)})
        model.to(dtype)
    return encoder, unet


@pytest.mark.parametrize("multiplier", [1, 0.7, -1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merge(multiplier: float, dtype: str) -> None:
    kind = getattr(torch, dtype)
    encoder, unet = toy_models(kind)
    network, _ = create_network_from_weights(
        multiplier, DATA / "merge_lora.safetensors", None, encoder, unet, for_inference=True
    )
    network.merge_into(dtype=kind)
    merged = load_file(DATA / "merge_merged.safetensors")
    prefix = f"mult{multiplier}.{dtype}."
    expected = {key[len(prefix) :]: value for key, value in merged.items() if key.startswith(prefix)}
    found = {
        **{f"te.{k}": v for k, v in encoder.state_dict().items()},
        **{f"unet.{k}": v for k, v in unet.state_dict().items()},
    }
    assert len(expected) == 6
    for key, value in expected.items():
        assert found[key].dtype == kind
        if kind is torch.float32:
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6)
        else:  # the same rounding, but for values between two steps
            assert (found[key] != value).float().mean() < 0.02
            torch.testing.assert_close(found[key], value, rtol=2 * torch.finfo(kind).eps, atol=1e-4)


@pytest.mark.parametrize("limit", ["0.5", "1", "2", "100"])
def test_scale_norms(limit: str) -> None:
    network, _ = create_network_from_weights(1.0, DATA / "scale_norms_lora_before.safetensors", None, *toy_models())
    report = network.scale_norms(float(limit))
    golden = read_json("scale_norms.json")[limit]
    assert int(report.scaled) == golden["keys_scaled"]
    assert float(report.mean) == pytest.approx(golden["mean_norm"], rel=1e-5)
    assert float(report.maximum) == pytest.approx(golden["max_norm"], rel=1e-5)
    after = load_file(DATA / f"scale_norms_lora_after_max{limit}.safetensors")
    state = network.state(None)
    assert state.keys() == after.keys()
    for key, value in after.items():
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)


def test_split_qkv() -> None:
    """Four adapters on row ranges of one Linear: forward as the golden run, one fused adapter in the file."""
    golden = load_file(DATA / "merge_split_qkv.safetensors")
    linear = nn.Linear(6, 26)
    linear.load_state_dict({"weight": golden["base.linear1.weight"], "bias": golden["base.linear1.bias"]})
    bounds = [0, 6, 12, 18, 26]
    parts = tuple(TargetModule("linear1", linear, slice(a, b)) for a, b in pairwise(bounds))
    name = "lora_unet_single_blocks_0_linear1"
    layer = SplitLoRALayer(TargetSpec(name, parts, "denoiser", split=True), rank=2, alpha=1.0)
    for index, part in enumerate(layer.parts):
        part.load_tensors({
            "alpha": golden[f"inner.{name}.alpha"],
            "lora_down.weight": golden[f"inner.{name}.lora_down.{index}.weight"],
            "lora_up.weight": golden[f"inner.{name}.lora_up.{index}.weight"],
        })  # fmt: skip
    layer.attach()
    torch.testing.assert_close(linear(golden["x"]), golden["y.linear1"], rtol=1e-6, atol=1e-6)

    saved = layer.tensors()
    assert torch.equal(saved["lora_down.weight"], golden[f"saved.{name}.lora_down.weight"])
    assert torch.equal(saved["lora_up.weight"], golden[f"saved.{name}.lora_up.weight"])
    # any reader computes alpha / rank · up · down from the file
    delta = saved["alpha"] / 8 * saved["lora_up.weight"] @ saved["lora_down.weight"]
    layer.detach()
    torch.testing.assert_close(linear(golden["x"]) + golden["x"] @ delta.T, golden["y.linear1"], rtol=1e-6, atol=1e-6)

    again = SplitLoRALayer(layer.target, rank=2, alpha=1.0)
    assert again.problem(saved) is None
    again.load_tensors(saved)
    assert all(torch.equal(value, saved[key]) for key, value in again.tensors().items())
