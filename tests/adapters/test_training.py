# SPDX-License-Identifier: Apache-2.0
"""Adapters inside real models: recomputation, autocast, compile, several processes, dropouts, resumed draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.adapters.adapter_network import AdapterNetwork
from networks.lora import create_network
from tests.adapters.models import distance, randomize, run_unet, tiny_clip, tiny_unet

DROPOUTS = {"rank_dropout": "0.3", "module_dropout": "0.2"}


def attached(
    unet: nn.Module, encoder: nn.Module | None = None, neuron_dropout: float | None = None, **arguments: str
) -> Any:
    torch.manual_seed(5)
    network = create_network(1.0, 4, 2.0, None, encoder, unet, neuron_dropout, **arguments)
    randomize(network)
    network.attach(train_denoiser=True, train_text_encoder=encoder is not None)
    return network


def gradients(network: AdapterNetwork, unet: nn.Module, *, seed: int = 0) -> list[Tensor]:
    """Gradients of one step; draws come from the default generator, seeded as a trainer does it for each step."""
    network.zero_grad()
    torch.manual_seed(seed)
    run_unet(unet).square().mean().backward()
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    "arguments", [{}, DROPOUTS, {"dora_wd": "True", "conv_dim": "2"}], ids=["plain", "dropouts", "dora"]
)
def test_gradient_checkpointing_changes_nothing(arguments: dict[str, str]) -> None:
    unet = tiny_unet().train()
    network = attached(unet, neuron_dropout=0.1, **arguments)
    expected = gradients(network, unet)
    unet.enable_gradient_checkpointing(  # type: ignore[operator]
        gradient_checkpointing_func=lambda f, *a, **k: checkpoint(f, *a, use_reentrant=False, **k)
    )
    found = gradients(network, unet)
    assert len(found) == len([*network.parameters()])
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_draws_depend_on_the_seed_only() -> None:
    """A resumed run seeds the step and draws the same: no generator state of our own."""
    unet = tiny_unet()
    network = attached(unet, neuron_dropout=0.2, **DROPOUTS)
    first = gradients(network, unet, seed=7)
    other = gradients(network, unet, seed=8)
    fresh = tiny_unet()
    resumed = attached(fresh, neuron_dropout=0.2, **DROPOUTS)
    resumed.load_state_dict(network.state_dict())
    again = gradients(resumed, fresh, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_no_dropout_in_eval_mode() -> None:
    unet = tiny_unet()
    network = attached(unet, neuron_dropout=0.5, rank_dropout="0.5", module_dropout="0.5")
    network.eval()
    assert torch.equal(run_unet(unet), run_unet(unet))


@pytest.mark.parametrize("arguments", [{"conv_dim": "2"}, {"dora_wd": "True"}], ids=["plain", "dora"])
def test_autocast_with_a_bf16_model(arguments: dict[str, str]) -> None:
    """float32 adapters on a bf16 model: float32 gradients, bf16 computation."""
    unet = tiny_unet()
    network = attached(unet, **arguments)
    exact = run_unet(unet)
    unet.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run_unet(unet)
    output.float().square().mean().backward()
    assert distance(output, exact) < 5e-2
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())


def test_compiles_in_one_graph() -> None:
    unet = tiny_unet()
    network = attached(unet, dora_wd="True", train_norm="True", rank_dropout="0.0")
    expected = gradients(network, unet)
    blocks: Any = unet.mid_block.attentions[0].transformer_blocks  # type: ignore[union-attr,index]
    block = blocks[0]
    blocks[0] = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = gradients(network, unet)
    assert all(distance(a, b) < 1e-4 for a, b in zip(found, expected, strict=True))
    with network.disabled():
        plain = run_unet(unet)
    network.detach()
    blocks[0] = block
    assert distance(plain, run_unet(unet)) < 1e-6


class Transformer2DModel(nn.Module):
    """Two layers in a module whose class is a target."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).sin())


class Step(nn.Module):
    """What a trainer wraps: the model and the network whose parameters are shared."""

    def __init__(self, model: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.model, self.network = model, network

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_ddp_finds_a_gradient_for_every_parameter_under_module_dropout(tmp_path: Any) -> None:
    """DDP refuses the next step when a parameter had none, so a dropped adapter must still give (zero) gradients."""
    model = nn.Sequential(Transformer2DModel()).requires_grad_(False)
    network = attached(model, module_dropout="0.9")
    store = f"file://{(tmp_path / 'store').as_posix()}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Step(model, network))
        for step in range(4):
            torch.manual_seed(step)
            wrapped(torch.randn(4, 6)).square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len([*network.parameters()]) == 4 and all(p.grad is not None for p in network.parameters())


def test_only_the_trained_model_stays_in_network_and_file() -> None:
    encoder, unet = tiny_clip(), tiny_unet()
    network = create_network(1.0, 4, 1.0, None, encoder, unet)
    network.attach(train_denoiser=False, train_text_encoder=True)
    assert {key.partition("_text")[0] for key in network.state(None)} == {"lora_te"}
    assert network.param_groups(learning_rate=1e-3)[0]["name"] == "textencoder"
    assert len(network.param_groups(learning_rate=1e-3)) == 1
    assert network.module_parameters().keys() == {key.partition(".")[0] for key in network.state(None)}
    assert sum(map(len, network.module_parameters().values())) == len([*network.parameters()])
