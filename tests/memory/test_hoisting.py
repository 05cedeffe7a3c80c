# SPDX-License-Identifier: Apache-2.0
"""Hoisted modulations change no bit of losses and gradients, and their weights are nowhere but in main memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from library.memory.block_swap import BlockSwap
from library.memory.hoisting import Hoisting
from library.memory.host_image import is_placeholder
from library.memory.quantise import QuantKind, quantise
from networks import lora_flux
from tests.adapters.models import randomize
from tests.memory.swap_models import MODELS, Sample, recompute
from tests.memory.test_block_swap import CPU, PoisonedRing, PoisonedSwap, assert_equal, attach_lora, gradients


class PoisonedHoisting(Hoisting):
    ring_class = PoisonedRing


def modulations(sample: Sample) -> list[nn.Linear]:
    """By their names in diffusers: `norm1.linear`, `norm1_context.linear` and `norm.linear` of every block."""
    named = [item for block in sample.blocks for item in block.named_modules()]
    return [m for name, m in named if name in ("norm1.linear", "norm1_context.linear", "norm.linear")]  # type: ignore[misc]


def hoist(sample: Sample) -> PoisonedHoisting:
    hoisting = PoisonedHoisting(sample.denoiser.time_text_embed, modulations(sample), CPU, blocks=sample.blocks)
    hoisting.install()
    return hoisting


@pytest.mark.parametrize("name", ["flux", "sd3"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
def test_losses_and_gradients_are_the_same(name: str, recomputed: bool, swapped: bool) -> None:
    sample = MODELS[name]()
    parameters = attach_lora(sample)  # on the modulations, too
    for block in sample.blocks if recomputed else ():
        recompute(block)
    expected = gradients(sample, parameters)
    weights = {name: value.clone() for name, value in sample.denoiser.state_dict().items()}
    linears = modulations(sample)
    assert len(linears) == {"flux": 2 * 2 + 3, "sd3": 2 * 4}[name]
    hoisting = hoist(sample)
    swap = None
    if swapped:
        swap = PoisonedSwap(sample.blocks, range(1, len(sample.blocks)), CPU, without=hoisting.tensors)
        swap.install()
    assert_equal(gradients(sample, parameters), expected)
    assert sum(is_placeholder(linear.weight) for linear in linears) == len(linears) - 2
    hoisting.home()
    if swap is not None:
        swap.home()
    assert all(torch.equal(value, weights[name]) for name, value in sample.denoiser.state_dict().items())
    assert_equal(gradients(sample, parameters), expected)
    if swap is not None:
        swap.remove()
    hoisting.remove()
    assert_equal(gradients(sample, parameters), expected)
    assert all("forward" not in vars(linear) for linear in linears)


def test_each_pass_copies_each_weight_once() -> None:
    sample = MODELS["flux"]()
    hoisting = hoist(sample)
    count = len(hoisting.linears)
    copies = []
    for seed in range(3):
        before = hoisting.ring.copies
        sample.loss(seed)
        copies.append(hoisting.ring.copies - before)
    # at the end of a pass the first weight is sent for, and takes the place of the last but one
    assert copies == [count + 1, count, count]
    sizes = [sum(p.numel() * 4 for p in linear.parameters()) for linear in hoisting.linears]
    assert hoisting.ring.nbytes == 2 * max(sizes)


def test_a_pass_without_gradient_between_forward_and_recomputation() -> None:
    """Previews and priors have other times; recomputation must not meet their answers."""
    sample = MODELS["sd3"]()
    parameters = attach_lora(sample)
    for block in sample.blocks:
        recompute(block)
    expected = gradients(sample, parameters, passes=1)
    hoist(sample)
    loss = sample.loss(0)
    with torch.no_grad():
        other = sample.loss(5)
    loss.backward()
    assert_equal([loss.detach(), *(torch.zeros(()) if p.grad is None else p.grad for p in parameters)], expected)
    with torch.no_grad():
        assert torch.equal(sample.loss(5), other)


def test_quantised_in_their_own_way() -> None:
    """A Linear with a forward of its own, on class or instance, computes with its tensors present."""

    class Scaled(nn.Linear):
        def __init__(self, like: nn.Linear) -> None:
            super().__init__(like.in_features, like.out_features)
            self.register_buffer("scale", torch.full((like.out_features,), 0.5))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    sample = MODELS["flux"]()
    torch.manual_seed(3)
    for block in sample.blocks:
        norm = block.get_submodule("norm1" if hasattr(block, "norm1") else "norm")
        norm.linear = Scaled(norm.linear).requires_grad_(False)
    special = sample.blocks[0].norm1.linear
    own = special.forward
    special.forward = lambda x: own(x) + 1
    instance = special.forward
    expected = sample.loss(0)
    hoisting = hoist(sample)
    assert torch.equal(sample.loss(0), expected)
    hoisting.remove()
    assert special.forward is instance and torch.equal(sample.loss(0), expected)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_real_adapters_on_quantised_weights_with_blocks_swapped(kind: QuantKind) -> None:
    sample = MODELS["flux"]()
    quantise(sample.denoiser, kind)
    args = dict.fromkeys(("img_mod_dim", "txt_mod_dim", "single_mod_dim"), "2")
    torch.manual_seed(2)
    network = lora_flux.create_network(1.0, 4, 4, None, [], sample.denoiser, **args)
    network.attach(train_denoiser=True, train_text_encoder=False)
    randomize(network)
    for block in sample.blocks[::2]:
        recompute(block)
    parameters = [*network.parameters()]
    expected = gradients(sample, parameters)
    hoisting = hoist(sample)
    swap = PoisonedSwap(sample.blocks, range(5), CPU, without=hoisting.tensors)
    swap.install()
    assert_equal(gradients(sample, parameters), expected)


def test_in_half_precision_under_autocast() -> None:
    sample = MODELS["flux"]()
    sample.denoiser.bfloat16()
    parameters = attach_lora(sample)

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(sample, parameters)

    expected = run()
    hoist(sample)
    assert_equal(run(), expected)


def test_compiled_blocks_share_a_graph() -> None:
    """Answers are inputs of the graph, not part of it: other times need no other graph, nor do other blocks."""
    torch._dynamo.reset()
    sample = MODELS["flux"]()
    expected = [sample.loss(seed) for seed in range(2)]
    hoisting = hoist(sample)
    swap = BlockSwap(sample.blocks, range(5), CPU, without=hoisting.tensors)
    swap.install()
    counter = CompileCounterWithBackend("eager")
    for block in sample.blocks:
        block.forward = torch.compile(block.forward, backend=counter)  # type: ignore[method-assign]
    for seed, loss in enumerate(expected):
        torch.testing.assert_close(sample.loss(seed), loss)
    # double blocks, the first single block (its input has other strides), the other single blocks
    assert counter.frame_count == 3


def test_what_learns_is_refused() -> None:
    sample = MODELS["flux"]()
    hoisting = hoist(sample)
    next(sample.denoiser.time_text_embed.parameters()).requires_grad_()
    with pytest.raises(ValueError, match="learns before"):
        sample.loss(0)
    hoisting.remove()
    sample.denoiser.requires_grad_()
    with pytest.raises(ValueError, match="cannot be hoisted"):
        hoist(sample)
