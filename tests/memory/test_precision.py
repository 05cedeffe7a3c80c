# SPDX-License-Identifier: Apache-2.0
"""Half-precision storage of frozen matrices changes no bit of a float32 computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from library.families.sd.model import StableDiffusion
from library.families.sd.options import SDOptions
from library.memory.precision import HALF, cast_when_used, castable_weights, never_in_float16
from tests.tiny import make_tiny_sd


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradient_are_bit_identical(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    stored = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    stored.weight.data = stored.weight.data.to(dtype)
    plain = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    plain.weight.data = stored.weight.data.float()
    if bias:
        plain.bias.data = stored.bias.data.clone()
    assert cast_when_used(nn.Sequential(stored)) == 1
    inputs = [torch.randn(3, 7, 24).requires_grad_() for _ in range(1)] * 2
    outputs, gradients = [], []
    for module, x in zip((stored, plain), inputs):
        y = module(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        outputs.append(y)
        gradients.append(gradient)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(gradients[0], gradients[1])
    assert stored.weight.dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"padding": 1, "groups": 2, "bias": False}])
def test_convolutions_are_bit_identical(dtype: torch.dtype, settings: dict) -> None:
    torch.manual_seed(0)
    stored = nn.Conv2d(4, 6, 3, **settings).requires_grad_(False)
    stored.weight.data = stored.weight.data.to(dtype)
    plain = nn.Conv2d(4, 6, 3, **settings).requires_grad_(False)
    plain.weight.data = stored.weight.data.float()
    if plain.bias is not None:
        plain.bias.data = stored.bias.data.clone()
    assert cast_when_used(nn.Sequential(stored)) == 1
    x = torch.randn(2, 4, 9, 8).requires_grad_()
    left, right = stored(x), plain(x)
    assert torch.equal(left, right)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (left, right)]
    assert torch.equal(gradients[0], gradients[1])


def test_only_matrices_and_kernels_stay() -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(4, 4), "norm": nn.LayerNorm(4), "conv": nn.Conv2d(4, 4, 3)})
    module["inner"] = nn.Sequential(nn.Linear(4, 4))
    assert castable_weights(module) == {"conv.weight", "inner.0.weight"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_give_the_same_bits_too(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 40).requires_grad_(False), torch.randn(3, 24)
    linear.weight.data = linear.weight.data.to(dtype)
    expected = torch.nn.functional.linear(x, linear.weight.float(), linear.bias)
    assert cast_when_used(linear) == 1 and torch.equal(linear(x), expected)


def large(weight_dtype: torch.dtype) -> nn.Linear:
    """Every output is 64 * 60 * 60 = 230400, beyond float16."""
    linear = nn.Linear(64, 8, bias=False).requires_grad_(False)
    linear.weight.data = torch.full((8, 64), 60.0, dtype=weight_dtype)
    never_in_float16(linear)
    return linear


@pytest.mark.parametrize("learns", [False, True])
def test_a_layer_that_is_never_in_float16(learns: bool) -> None:
    half = large(torch.float16).requires_grad_(learns)
    x = torch.full((2, 64), 60.0, dtype=torch.float16, requires_grad=True)
    y = half(x)
    assert y.dtype == torch.float32 and torch.equal(y, torch.full((2, 8), 230400.0))
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((2, 64), 480.0, dtype=torch.float16))
    assert (half.weight.grad is not None) == learns


def test_autocast_does_not_bring_float16_back() -> None:
    for weight_dtype in (torch.float16, torch.float32):
        layer = large(weight_dtype)
        with torch.autocast("cpu", dtype=torch.float16):
            assert torch.nn.functional.linear(torch.full((2, 64), 60.0), layer.weight).isinf().all()
            assert torch.equal(layer(torch.full((2, 64), 60.0)), torch.full((2, 8), 230400.0))


def test_other_computations_are_left_alone() -> None:
    layer = large(torch.bfloat16)
    assert layer(torch.ones(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert large(torch.float32)(torch.ones(2, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize(("version", "layout"), [(1, "single"), (1, "diffusers"), (2, "single"), (2, "diffusers")])
def test_models_give_the_same_bits_at_half_the_size(tmp_path: Path, version: int, layout: str) -> None:
    path = make_tiny_sd(tmp_path / "model", version=version, layout=layout, dtype=torch.float16)
    family = StableDiffusion(SDOptions(pretrained_model_name_or_path=str(path), v2=version == 2))
    results = []
    for storage in ("plain", "half"):
        encoder = family.load_text_encoder("clip", torch.float32, "cpu", storage=storage)
        unet = family.load_denoiser(torch.float32, "cpu", storage=storage)
        halves = [m for module in (encoder, unet) for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        assert any(m.weight.dtype == torch.float16 for m in halves) == (storage == "half")
        others = [p for module in (encoder, unet) for p in module.parameters() if p.ndim not in (2, 4)]
        assert all(p.dtype == torch.float32 for p in others)
        cond = family.encode_text(family.tokenize(["a cat"]), {"clip": encoder})
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = family.predict(unet, x, torch.tensor([500]), cond, None)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y.detach(), gradient))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
