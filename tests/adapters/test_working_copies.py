# SPDX-License-Identifier: Apache-2.0
"""LoRA layers that compute with working copies agree with the same layers without, in outputs and gradients."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from library.adapters.layers.lora import LoraSettings, lora_layer
from library.adapters.target_spec import TargetModule, TargetSpec
from library.optim.flat import FlatParameters
from library.optim.working_copy import WorkingCopies

WIDTH, RANK = 24, 4


class Attention(nn.Module):
    """q, k and v from one input, then a product and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1) @ self.v(x))


class Adapted:
    """A frozen block with LoRAs in a flat buffer: one on q, k and v together, one on the output layer."""

    def __init__(self, dtype: torch.dtype, settings: LoraSettings, *, split: bool = False, copies: bool) -> None:
        torch.manual_seed(0)
        self.block = Attention().to(dtype).requires_grad_(False)
        fused = tuple(TargetModule(name, getattr(self.block, name)) for name in "qkv")
        targets = (
            TargetSpec("fused", fused, "denoiser", split=split),
            TargetSpec("out", (TargetModule("out", self.block.out),), "denoiser"),
        )
        self.layers = [lora_layer(target, rank=RANK, alpha=2.0, settings=settings) for target in targets]
        parameters = [p for layer in self.layers for p in layer.parameters()]
        with torch.no_grad():
            for p in parameters:
                p.copy_(torch.randn(p.shape) * 0.2)
        self.flat = FlatParameters([{"params": parameters}])
        self.copies = WorkingCopies(self.flat, dtype) if copies else None
        for layer in self.layers:
            layer.attach()
            if self.copies is not None:
                layer.use_copies(self.copies.find)

    def passes(self, *inputs: Tensor, recompute: bool = False) -> tuple[list[Tensor], Tensor]:
        """The inputs' gradients and all weights' gradients, after a pass of each input with another seed."""
        gradients = []
        for number, data in enumerate(inputs):
            x = data.clone().requires_grad_(True)
            torch.manual_seed(number)
            if self.copies is not None:
                with self.copies.in_use():
                    self._learn(x, recompute)
            else:
                self._learn(x, recompute)
            assert x.grad is not None
            gradients.append(x.grad)
        return gradients, self.flat.groups[0].grad

    def _learn(self, x: Tensor, recompute: bool) -> None:
        y = checkpoint(self.block, x, use_reentrant=False) if recompute else self.block(x)
        y.float().square().mean().backward()


def inputs(dtype: torch.dtype, count: int = 2) -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.randn(2, 5, WIDTH).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "split", "dropout", "dora"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_equals_the_general_way(kind: str, dtype: torch.dtype, recompute: bool) -> None:
    """Over two micro-batches. What the copies cannot do (dropout, DoRA) is computed as ever."""
    settings = {"dropout": LoraSettings(neuron_dropout=0.3), "dora": LoraSettings(dora="output")}
    found = [
        Adapted(dtype, settings.get(kind, LoraSettings()), split=kind == "split", copies=copies).passes(
            *inputs(dtype), recompute=recompute
        )
        for copies in (True, False)
    ]
    (of_x, of_weights), (expected_x, expected) = found
    bound = 1e-5 if dtype == torch.float32 else 4e-2  # bf16: of 8 bits, rounded at other places
    assert expected.abs().max() > 1e-3
    assert (of_weights - expected).norm() < bound * expected.norm()
    for mine, theirs in zip(of_x, expected_x, strict=True):
        assert (mine - theirs).float().norm() < bound * theirs.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_micro_batches_are_summed_in_float32(dtype: torch.dtype) -> None:
    """The sum over 64 equal micro-batches is 64 times one's gradient to the bit; a sum in bf16 would stop growing."""
    data = inputs(dtype, 1)
    one = Adapted(dtype, LoraSettings(), copies=True).passes(*data)[1]
    many = Adapted(dtype, LoraSettings(), copies=True).passes(*data * 64)[1]
    if dtype == torch.bfloat16:
        assert torch.equal(many, one * 64)
    torch.testing.assert_close(many, one * 64, rtol=1e-5, atol=0.0)


def test_two_uses_in_one_pass_are_summed_in_float32() -> None:
    """A block that runs twice in a pass: the second gradient does not go through the bf16 one."""
    adapted, (data,) = Adapted(torch.bfloat16, LoraSettings(), copies=True), inputs(torch.bfloat16, 1)
    apart = Adapted(torch.bfloat16, LoraSettings(), copies=True).passes(data, data)[1]
    assert adapted.copies is not None
    with adapted.copies.in_use():
        sum(adapted.block(data).float().square().mean() for _ in range(2)).backward()
    assert torch.equal(adapted.flat.groups[0].grad, apart)


def test_follow_the_weights_and_are_not_used_outside_of_a_pass() -> None:
    adapted, (data,) = Adapted(torch.bfloat16, LoraSettings(), copies=True), inputs(torch.bfloat16, 1)
    before, plain = adapted.passes(data)[0][0], adapted.block(data)
    with torch.no_grad():
        adapted.flat.groups[0].buffer.mul_(2)
    assert not torch.equal(adapted.block(data), plain)
    assert not torch.equal(adapted.passes(data)[0][0], before)


def test_parameters_count_as_heard() -> None:
    """Weight decay spares parameters that never had a gradient; those whose gradient went to a copy have had one."""
    adapted, (data,) = Adapted(torch.bfloat16, LoraSettings(), copies=True), inputs(torch.bfloat16, 1)
    adapted.passes(data)
    before = adapted.flat.groups[0].buffer.detach().clone()
    with adapted.flat.silent_kept(processes=1), torch.no_grad():
        adapted.flat.groups[0].buffer.mul_(0.5)
    assert torch.equal(adapted.flat.groups[0].buffer.detach(), before * 0.5)


def test_a_pass_that_fails_leaves_nothing() -> None:
    adapted, (data,) = Adapted(torch.bfloat16, LoraSettings(), copies=True), inputs(torch.bfloat16, 1)
    expected = Adapted(torch.bfloat16, LoraSettings(), copies=True).passes(data)[1]
    assert adapted.copies is not None
    with pytest.raises(RuntimeError, match="no memory"), adapted.copies.in_use():
        adapted.block(data).float().square().mean().backward()
        raise RuntimeError("no memory")
    assert torch.equal(adapted.passes(data)[1], expected)


class Operations(TorchDispatchMode):
    """Counts the operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
        if not any(not alias.is_write for alias in aliases):
            self.names[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def test_operations_of_a_layer() -> None:
    """Six products, and one addition of the input's gradients."""

    def count(copies: bool) -> int:
        layers = [nn.Linear(WIDTH, WIDTH).bfloat16().requires_grad_(False) for _ in range(8)]
        chain = nn.Sequential(*layers)
        loras = [
            lora_layer(TargetSpec(str(i), (TargetModule(str(i), layer),), "denoiser"), rank=RANK, alpha=1.0,
                       settings=LoraSettings())
            for i, layer in enumerate(layers)
        ]  # fmt: skip
        flat = FlatParameters([{"params": [p for lora in loras for p in lora.parameters()]}])
        working = WorkingCopies(flat, torch.bfloat16)
        for lora in loras:
            if copies:
                lora.use_copies(working.find)
            lora.attach()
        x = torch.randn(3, WIDTH).bfloat16().requires_grad_(True)
        operations = Operations()
        with working.in_use(), operations:
            chain(x).sum().backward()
        return operations.names.total()

    assert count(copies=True) <= 8 * 9 + 6  # two of the nine are the frozen layer's
    assert count(copies=False) >= 8 * 15
