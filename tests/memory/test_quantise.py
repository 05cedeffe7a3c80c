# SPDX-License-Identifier: Apache-2.0
"""Linears in 8 and 4 bits against literal formulas: values, errors, gradients, dtypes, compiled, with adapters."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.layers.lokr import LoKrLayer, LokrSettings
from library.adapters.layers.lora import LoRALayer, LoraSettings
from library.adapters.target_spec import TargetModule, TargetSpec
from library.errors import UserError
from library.memory.precision import never_in_float16
from library.memory.quantise import QuantLinear, quantise, quantised, quantised_names, stored_bytes
from tests.families.flux import tiny_denoiser
from tests.families.sdxl import tiny_modules as sdxl_modules

KINDS = ("fp8", "int8", "nf4")
# NF4's values, appendix E of arXiv:2305.14314
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
# kind -> least and most relative error of a layer's output with normally distributed weights
ERRORS = {"fp8": (0.02, 0.04), "int8": (0.005, 0.015), "nf4": (0.07, 0.12)}


def literal(weight: Tensor, kind: str) -> Tensor:
    """What is left of a float32 matrix."""
    if kind == "nf4":
        blocks = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
        largest = blocks.abs().amax(1, keepdim=True)
        nearest = (blocks[..., None] / largest[..., None] - NF4).abs().argmin(-1)
        return (NF4[nearest] * largest).flatten()[: weight.numel()].view(weight.shape)
    scale = weight.abs().amax(1, keepdim=True) / (448 if kind == "fp8" else 127)
    if kind == "int8":
        return (weight / scale).round() * scale
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def pair(kind: str, *, rows: int = 40, columns: int = 24, bias: bool = True) -> tuple[QuantLinear, nn.Linear]:
    """A quantised Linear, and a plain one that has its weight."""
    torch.manual_seed(0)
    plain = nn.Linear(columns, rows, bias=bias).requires_grad_(False)
    layer = QuantLinear(plain, kind, quantised(plain.weight, kind), torch.float32)
    plain.weight.data = layer.weight
    return layer, plain


def stored_in(layer: QuantLinear) -> list[tuple[str, Tensor]]:
    """What stands for the weight, by its names."""
    return [(name, tensor) for name, tensor in zip(("stored", "scale", "code"), layer.tensors) if tensor is not None]


class Two(nn.Module):
    """Linears inside and outside of a list of blocks."""

    def __init__(self, columns: int = 24) -> None:
        super().__init__()
        self.first = nn.Linear(columns, columns)
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(columns, 2 * columns)}) for _ in range(2))


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_is_that_of_the_formula(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, columns in ((40, 24), (64, 128), (7, 10)):
        weight = torch.randn(rows, columns).to(dtype)
        weight[3] = 0
        plain = nn.Linear(columns, rows, dtype=dtype)
        layer = QuantLinear(plain, kind, quantised(weight, kind), dtype)
        assert isinstance(layer, nn.Linear) and layer.weight.dtype == dtype and layer.bias is plain.bias
        expected = literal(weight.float(), kind).nan_to_num()
        torch.testing.assert_close(layer.weight, expected.to(dtype), rtol=1e-6 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_many_rows_are_quantised_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    whole = quantised(weight, kind)
    monkeypatch.setattr("library.memory.quantise.AT_A_TIME", 48)
    assert all(torch.equal(a, b) for a, b in zip(quantised(weight, kind)[:2], whole[:2]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_of_a_layer(kind: str, dtype: torch.dtype) -> None:
    """fp8 2.7 %, int8 0.9 %, nf4 9 % of the output, on average over a normally distributed weight."""
    torch.manual_seed(0)
    plain, x = nn.Linear(512, 512, bias=False, dtype=dtype), torch.randn(64, 512, dtype=dtype)
    plain.weight.data.normal_(std=0.02)
    layer = QuantLinear(plain, kind, quantised(plain.weight, kind), dtype)
    wanted = x.float() @ plain.weight.float().T
    error = ((layer(x).float() - wanted).norm() / wanted.norm()).item()
    print(f"{kind} {dtype}: relative error of a layer's output {error:.4f}")
    assert ERRORS[kind][0] < error < ERRORS[kind][1]
    exact = x.float() @ literal(plain.weight.float(), kind).T
    assert (layer(x).float() - exact).norm() / exact.norm() < (1e-6 if dtype == torch.float32 else 0.005)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_are_those_of_the_dequantised_weight(kind: str, bias: bool) -> None:
    layer, plain = pair(kind, bias=bias)
    for shape in ((24,), (3, 24), (2, 5, 24)):
        x = torch.randn(shape, requires_grad=True)
        left, right = layer(x), plain(x)
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (left, right)]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_stored_is_kept_for_the_backward_pass(kind: str) -> None:
    layer, _ = pair(kind)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 24, requires_grad=True))
    own = {kept.data_ptr() for _, kept in stored_in(layer)}
    assert {tensor.data_ptr() for tensor in kept} == own


def test_float16_does_not_overflow() -> None:
    """Before the scale a row's output is up to 448 / its largest weight too large: 448 * 64 * 60 here."""
    for kind in KINDS:
        plain = nn.Linear(64, 8, bias=False, dtype=torch.float16).requires_grad_(False)
        plain.weight.data.fill_(0.5)
        layer = QuantLinear(plain, kind, quantised(plain.weight, kind), torch.float16)
        x = torch.full((2, 64), 60.0, dtype=torch.float16, requires_grad=True)
        y = layer(x)
        assert torch.equal(y, torch.full((2, 8), 64 * 60 * 0.5, dtype=torch.float16)), kind
        y.sum().backward()
        assert torch.equal(x.grad, torch.full((2, 64), 4.0, dtype=torch.float16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_a_layer_that_is_never_in_float16(kind: str, stored: torch.dtype) -> None:
    """Every output is 64 * 60 * 60 = 230400, beyond float16."""
    plain = nn.Linear(64, 8, bias=False, dtype=stored).requires_grad_(False)
    plain.weight.data.fill_(60.0)
    layer = QuantLinear(plain, kind, quantised(plain.weight, kind), stored)
    never_in_float16(layer)
    x = torch.full((2, 64), 60.0, dtype=stored)
    with torch.autocast("cpu", dtype=torch.float16, enabled=stored == torch.float32):
        y = layer(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, torch.full((2, 8), 230400.0))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=stored == torch.float32):
        assert layer(x.to(torch.bfloat16)).dtype == (torch.bfloat16 if stored == torch.float32 else torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    layer, plain = pair(kind)
    x = torch.randn(3, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        left, right = layer(x), plain(x)
    assert left.dtype == right.dtype == torch.bfloat16
    torch.testing.assert_close(left, right, rtol=0.02, atol=0.02)
    (gradient,) = torch.autograd.grad(left.float().sum(), x)
    assert gradient.dtype == torch.float32


# ---- the module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_moving_and_casting_leave_what_is_stored(kind: str) -> None:
    layer, _ = pair(kind)
    before = {name: kept.clone() for name, kept in stored_in(layer)}
    model = nn.Sequential(layer).to("cpu", torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    model.float()
    for name, kept in stored_in(layer):
        assert kept.dtype == before[name].dtype and torch.equal(kept, before[name])
    assert layer.weight.dtype == torch.float32 and not any(p.requires_grad for p in layer.parameters())
    assert layer.to("meta").stored.is_meta


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_place_for_what_is_stored_is_seen_in_the_backward_pass(kind: str) -> None:
    """Block swapping gives weights another place between the passes, by `.data`."""
    layer, plain = pair(kind)
    x = torch.randn(3, 24, requires_grad=True)
    y = layer(x)
    for _, kept in stored_in(layer):
        old = kept.data
        kept.data = old.clone()
        old.zero_()
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, plain(x))))


def test_linears_of_blocks_are_quantised_and_no_others() -> None:
    flux = tiny_denoiser("dev")
    names = quantised_names(flux)
    assert names == [
        name
        for name, module in flux.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(("transformer_blocks.", "single_transformer_blocks."))
    ]
    assert len(names) == 2 * 14 + 2 * 6
    chroma = tiny_denoiser("chroma")
    assert any(name.startswith("distilled_guidance_layer.layers.0.") for name, _ in chroma.named_modules())
    assert not any(name.startswith("distilled_guidance_layer.") for name in quantised_names(chroma))
    unet = sdxl_modules()["unet"]
    own = quantised_names(unet)
    assert all(name.startswith(("down_blocks.", "up_blocks.", "mid_block.")) for name in own)
    assert {"time_embedding.linear_1", "add_embedding.linear_1"}.isdisjoint(own)
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.to_q" in own


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_known_before(kind: str) -> None:
    for rows, columns in ((40, 24), (7, 10), (64, 128)):
        layer, plain = pair(kind, rows=rows, columns=columns)
        assert stored_bytes(plain, kind) == sum(kept.nbytes for _, kept in stored_in(layer))
        empty = QuantLinear.empty(plain, kind, torch.float32)
        described = [[(name, t.shape, t.dtype) for name, t in stored_in(module)] for module in (layer, empty)]
        assert described[0] == described[1] and all(kept.is_meta for _, kept in stored_in(empty))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_quantised_in_place(kind: str) -> None:
    torch.manual_seed(0)
    model = Two().eval().requires_grad_(False)
    wanted = literal(model.blocks[1]["a"].weight, kind)
    first = model.first
    assert quantise(model, kind) == 2 and quantise(model, kind) == 0
    assert model.first is first and type(first) is nn.Linear
    made = model.blocks[1]["a"]
    assert isinstance(made, QuantLinear) and made.kind == kind and not made.training
    torch.testing.assert_close(made.weight, wanted, rtol=1e-6, atol=0)
    with torch.device("meta"):
        empty = Two()
    assert quantise(empty, kind) == 2 and empty.blocks[0]["a"].stored.is_meta


def test_a_layer_with_a_way_of_its_own_stays() -> None:
    model = Two().requires_grad_(False)
    never_in_float16(model.blocks[0]["a"])
    assert quantised_names(model) == ["blocks.1.a"] and quantise(model, "int8") == 1


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="--base_quant nf4 needs bitsandbytes: pip install bitsandbytes"):
        quantise(Two(), "nf4")
    assert quantise(Two().requires_grad_(False), "fp8") == quantise(Two().requires_grad_(False), "int8") == 2


# ---- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_compiled_in_one_graph(kind: str, bias: bool) -> None:
    """No break, the same numbers, and no dequantised weight among what is kept for the backward pass."""
    layer, _ = pair(kind, rows=64, columns=48, bias=bias)
    kept: list[int] = []

    def forward_graph(graph: torch.fx.GraphModule, inputs: object) -> Any:
        (output,) = graph.graph.find_nodes(op="output")
        kept.extend(node.meta["val"].numel() * node.meta["val"].itemsize
                    for node in output.args[0] if node is not None and node.op != "placeholder")  # fmt: skip
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward_graph,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
    )
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(3, 48, requires_grad=True)
    left, right = compiled(x), layer(x)
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (left, right)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert max(kept) <= 3 * 64 * 4  # the output; the weight would have 64 * 48 numbers


# ---- adapters -------------------------------------------------------------------------------------------------------


def dora(target: TargetSpec) -> AdapterLayer:
    return LoRALayer(target, rank=2, alpha=2, settings=LoraSettings(dora="output"))


ADAPTERS = {
    "dora": dora,
    "dora_columns": lambda target: LoRALayer(target, rank=2, alpha=2, settings=LoraSettings(dora="input")),
    "ggpo": lambda target: LoRALayer(target, rank=2, alpha=2, settings=LoraSettings(noise=(0.03, 0.01))),
    "lokr": lambda target: LoKrLayer(target, rank=2, alpha=2, settings=LokrSettings(dora="output")),
}


def adapter_run(module: nn.Module, kind: str) -> list[Tensor]:
    """Outputs and gradients of two passes of an adapter that is not zero, with a step between them."""
    torch.manual_seed(1)
    layer = ADAPTERS[kind](TargetSpec("x", (TargetModule("x", module),), "denoiser"))
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    layer.attach()
    found = []
    for _ in range(2):
        y = module(torch.randn(3, 24))
        y.square().sum().backward()
        layer.step_taken()
        found += [y.detach(), *(p.grad.clone() for p in layer.parameters())]
        found += [layer.merged_weight().detach()]
    layer.detach()
    return found


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_read_the_weight(adapter: str, kind: str) -> None:
    results = [adapter_run(module, adapter) for module in pair(kind)]
    assert len(results[0]) == len(results[1]) >= 6
    for left, right in zip(*results):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_merged_into_quantised_weights(kind: str) -> None:
    layer, plain = pair(kind)
    for module, refused in ((layer, True), (plain, False)):
        target = TargetSpec("lora_unet_x", (TargetModule("x", module),), "denoiser")
        adapter = LoRALayer(replace(target), rank=2, alpha=2)
        if not refused:
            adapter.merge()
            continue
        with pytest.raises(UserError, match="lora_unet_x: nothing can be merged into quantised weights"):
            adapter.merge()
