# SPDX-License-Identifier: Apache-2.0
"""ControlNet-LLLite: keys, the formula written out a second time, and what it must not change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.adapters.layers.lllite import LLLiteNetwork, conv_strides
from library.errors import UserError
from library.families.adapters import load_network_module
from networks.control_net_lllite import create_network, create_network_from_weights
from tests.adapters.models import distance, randomize, read_json, run_unet, tiny_unet

SDXL: dict[str, Any] = {
    "sample_size": 128, "cross_attention_dim": 2048, "use_linear_projection": True, "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
DOWN, MIDDLE = "lllite_unet_input_blocks_1_1_transformer_blocks_0", "lllite_unet_middle_block_1_transformer_blocks_0"
LAYERS = ("attn1_to_q", "attn1_to_k", "attn1_to_v", "attn2_to_q")


def full_unet(**config: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel(**config)
    return unet


def control(batch: int = 2, size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(9)) * 2 - 1


def made(unet: nn.Module, *, dim: int = 6, dropout: float | None = None, emb: str = "8") -> LLLiteNetwork:
    torch.manual_seed(5)
    network = create_network(1.0, dim, None, None, None, unet, neuron_dropout=dropout, cond_emb_dim=emb)
    assert isinstance(network, LLLiteNetwork)
    return network


def attached(unet: nn.Module, **values: Any) -> LLLiteNetwork:
    """At work, with random weights and a control image."""
    network = made(unet, **values)
    randomize(network)
    network.attach(train_denoiser=True, train_text_encoder=False)
    network.set_condition(control())
    return network


# ---- keys ---------------------------------------------------------------------------------------------------------


def test_keys_and_shapes_of_sdxl() -> None:
    """Equal to those of the files that people share, in their order."""
    facts = read_json("sdxl_lllite_keys.json")
    expected = {f"{m}.{k}": shape for m, form in facts["modules"].items() for k, shape in facts["forms"][form].items()}
    with torch.device("meta"):
        network = create_network(1.0, 64, None, None, None, full_unet(**SDXL), cond_emb_dim="32")
        default = create_network(1.0, None, None, None, None, full_unet(**SDXL))
    for one in (network, default):
        found = {key: [*value.shape] for key, value in one.named_parameters()}
        found = {key.removeprefix("layers."): shape for key, shape in found.items()}
        assert found == expected and [*found] == [*expected]
    assert len(expected) == 1600


def test_layers_of_stable_diffusion_1() -> None:
    """Blocks 1 and 2 are at the size of the latents, and the middle a level below those of SDXL."""
    with torch.device("meta"):
        network = made(full_unet(sample_size=64, cross_attention_dim=768, attention_head_dim=8))
    blocks = ["input_blocks_1", "input_blocks_2", "input_blocks_4", "input_blocks_5", "input_blocks_7",
              "input_blocks_8", "middle_block"]  # fmt: skip
    layers = network.named_layers()
    assert [*layers] == [f"lllite_unet_{b}_1_transformer_blocks_0_{name}" for b in blocks for name in LAYERS]
    strides = {b: layers[f"lllite_unet_{b}_1_transformer_blocks_0_attn1_to_q"].target.stride for b in blocks}
    assert strides == dict(zip(blocks, (8, 8, 16, 16, 32, 32, 64)))


def test_strides_of_the_convolutions() -> None:
    assert [conv_strides(stride) for stride in (8, 16, 32, 64)] == [[4, 2], [4, 4], [4, 4, 2], [4, 4, 4]]


# ---- the formula --------------------------------------------------------------------------------------------------


def literal_change(w: Mapping[str, Tensor], image: Tensor, x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The sentence of the docs as code: image to one vector per token, beside what `down` makes of x, mid, up."""
    e = image
    for place, stride in enumerate(strides):
        e = F.conv2d(e if place == 0 else F.relu(e), w[f"conditioning1.{2 * place}.weight"],
                     w[f"conditioning1.{2 * place}.bias"], stride=stride)  # fmt: skip
    tokens = e.permute(0, 2, 3, 1).reshape(len(image), -1, e.shape[1])
    down = F.relu(x @ w["down.0.weight"].T + w["down.0.bias"])
    mid = F.relu(torch.cat([tokens, down], -1) @ w["mid.0.weight"].T + w["mid.0.bias"])
    return mid @ w["up.0.weight"].T + w["up.0.bias"]


def weights_of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


@pytest.mark.parametrize("multiplier", [1.0, -0.5])
def test_one_layer_is_the_formula(multiplier: float) -> None:
    unet = tiny_unet()
    network = attached(unet)
    network.set_multiplier(multiplier)
    layer = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    x = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(2))  # 64 pixels are 4 tokens a side there
    change = literal_change(weights_of(network.state(None), f"{MIDDLE}_attn1_to_q"), control(), x, (4, 4))
    expected = F.linear(x + multiplier * change, layer.weight, layer.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert distance(expected, F.linear(x, layer.weight, layer.bias)) > 0.1  # type: ignore[arg-type]


class Controlled(nn.Module):
    """A Linear layer with the control written into its own forward pass."""

    def __init__(self, layer: nn.Linear, w: dict[str, Tensor], strides: tuple[int, ...]):
        super().__init__()
        self.layer, self.w, self.strides = layer, w, strides

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + literal_change(self.w, control(), x, self.strides))


def test_whole_model_and_gradients_equal_a_plain_reimplementation() -> None:
    unet = tiny_unet()
    network = attached(unet)
    state = {key: value.requires_grad_() for key, value in network.state(None).items()}
    output = run_unet(unet)
    output.square().mean().backward()

    plain = tiny_unet()
    for prefix, path, strides in (
        (DOWN, "down_blocks.0.attentions.0.transformer_blocks.0", (4, 2)),
        (MIDDLE, "mid_block.attentions.0.transformer_blocks.0", (4, 4)),
    ):
        for name in LAYERS:
            attention, _, layer = name.partition("_")
            parent = plain.get_submodule(f"{path}.{attention}")
            own = weights_of(state, f"{prefix}_{name}")
            setattr(parent, layer, Controlled(getattr(parent, layer), own, strides))
    expected = run_unet(plain)
    expected.square().mean().backward()

    assert distance(output, expected) < 1e-5
    parameters = {key.removeprefix("layers."): value for key, value in network.named_parameters()}
    assert parameters.keys() == state.keys()
    largest = max(float(value.grad.abs().max()) for value in state.values() if value.grad is not None)
    for key, value in state.items():
        found = parameters[key].grad
        assert value.grad is not None and found is not None
        assert float((found - value.grad).abs().max()) < 1e-5 * largest, key


# ---- what it must not change --------------------------------------------------------------------------------------


def test_untrained_it_changes_nothing() -> None:
    unet = tiny_unet()
    before = run_unet(unet)
    network = made(unet)
    network.attach(train_denoiser=True, train_text_encoder=False)
    network.set_condition(control())
    assert torch.equal(run_unet(unet), before)


def test_no_control_image_disabled_detached_and_multiplier_zero_are_the_base() -> None:
    unet = tiny_unet()
    before = run_unet(unet)
    network = attached(unet)
    changed = run_unet(unet)
    assert distance(changed, before) > 0.01
    network.set_condition(None)
    assert torch.equal(run_unet(unet), before)
    network.set_condition(control())
    with network.disabled():
        assert torch.equal(run_unet(unet), before)
    network.set_multiplier(0.0)
    assert torch.equal(run_unet(unet), before)
    network.set_multiplier(1.0)
    network.detach()
    assert torch.equal(run_unet(unet), before)
    for _ in range(2):  # twice is once
        network.attach(train_denoiser=True, train_text_encoder=False)
    assert torch.equal(run_unet(unet), changed)


def test_one_control_image_serves_a_whole_batch() -> None:
    """A preview's prompt and its negative."""
    unet = tiny_unet()
    network = attached(unet)
    network.set_condition(control(1).repeat(2, 1, 1, 1))
    expected = run_unet(unet)
    network.set_condition(control(1))
    assert distance(run_unet(unet), expected) < 1e-6


@pytest.mark.parametrize("size", [(72, 40), (64, 104)])
def test_any_size_that_the_model_takes(size: tuple[int, int]) -> None:
    """Sides that are no multiple of the strides: as many tokens as the U-Net has, which rounds up."""
    unet = tiny_unet()
    network = attached(unet)
    latents, texts = torch.randn(2, 4, size[0] // 8, size[1] // 8), torch.randn(2, 7, 16)
    network.set_condition(None)
    before = unet(latents, torch.tensor([10, 500]), texts).sample
    network.set_condition(control(2, size))
    assert distance(unet(latents, torch.tensor([10, 500]), texts).sample, before) > 0.01


def recomputing(unet: nn.Module) -> nn.Module:
    recompute: Callable[..., Any] = lambda f, *a, **k: checkpoint(f, *a, use_reentrant=False, **k)
    unet.train().enable_gradient_checkpointing(gradient_checkpointing_func=recompute)  # type: ignore[operator]
    return unet


def test_gradient_checkpointing_and_dropout() -> None:
    found = []
    for unet in (tiny_unet().train(), recomputing(tiny_unet())):
        network = attached(unet, dropout=0.3)
        torch.manual_seed(1)
        run_unet(unet).square().mean().backward()
        found.append([p.grad for p in network.parameters()])
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    network = attached(unet := tiny_unet(), dropout=0.3)
    assert not torch.equal(run_unet(unet), run_unet(unet))
    network.eval()
    assert torch.equal(run_unet(unet), run_unet(unet))


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_bf16(own: torch.dtype) -> None:
    """Autocast, with weights of the network in float32 and in bf16 (--full_bf16)."""
    unet = tiny_unet()
    network = attached(unet)
    exact = run_unet(unet)
    network.to(own)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_unet(unet)
    assert distance(found, exact) < 3e-2
    found.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == own for p in network.parameters())


def test_gradient_reaches_every_parameter_after_one_step() -> None:
    unet = tiny_unet()
    network = made(unet)
    network.attach(train_denoiser=True, train_text_encoder=False)
    network.set_condition(control())
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        run_unet(unet).square().mean().backward()
        optimizer.step()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []
    assert all(p.grad is None for p in unet.parameters())


def test_learns_what_only_the_control_image_tells() -> None:
    """Two equal inputs with opposite targets: without the control images the loss cannot fall below 1."""
    unet = tiny_unet()
    network = made(unet, dim=16, emb="16")
    network.attach(train_denoiser=True, train_text_encoder=False)
    latents, texts = (torch.randn(1, *shape).repeat(2, *[1] * len(shape)) for shape in ((4, 8, 8), (7, 16)))
    target = torch.ones(2, 4, 8, 8) * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    images = torch.stack([torch.full((3, 64, 64), 1.0), torch.full((3, 64, 64), -1.0)])
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-2)

    def loss() -> Tensor:
        return F.mse_loss(unet(latents, torch.tensor([500, 500]), texts).sample, target)

    network.set_condition(images)
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.85
    network.set_condition(images.flip(0))
    assert loss().item() > 1.15


# ---- files --------------------------------------------------------------------------------------------------------


def test_a_file_makes_the_same_network(tmp_path: Path) -> None:
    unet = tiny_unet()
    network = attached(unet)
    changed = run_unet(unet)
    network.save(tmp_path / "control.safetensors", dtype=None, metadata=None)
    network.detach()
    other, weights = create_network_from_weights(1.0, tmp_path / "control.safetensors", None, None, unet)
    assert weights.keys() == network.state(None).keys()
    other.attach(train_denoiser=True, train_text_encoder=False)
    other.set_condition(control())
    assert torch.equal(run_unet(unet), changed)
    fresh = made(unet)
    fresh.load(weights)
    assert all(torch.equal(value, weights[key]) for key, value in fresh.state(None).items())


def test_files_that_do_not_fit_are_refused() -> None:
    unet = tiny_unet()
    state = made(unet).state(None)
    with pytest.raises(UserError, match=r"down.0.weight has the shape \(6, 16\), here it is \(4, 16\)"):
        made(unet, dim=4).load({key: value for key, value in state.items() if key.startswith(MIDDLE)})
    with pytest.raises(UserError, match="10 keys name no layer"):
        foreign = {key.replace(f"{DOWN}_attn1_to_q", "lllite_unet_other"): value for key, value in state.items()}
        create_network_from_weights(1.0, None, None, None, unet, foreign)
    with pytest.raises(UserError, match="of another kind or damaged"):
        lora = {f"{MIDDLE}_attn1_to_q.lora_down.weight": torch.zeros(1)}
        create_network_from_weights(1.0, None, None, None, unet, lora)


def test_what_makes_no_sense_is_refused() -> None:
    unet = tiny_unet()
    with pytest.raises(UserError, match="cannot be merged"):
        made(unet).merge_into()
    with pytest.raises(UserError, match="cond_emb_dim must be at least 2"):
        made(unet, emb="1")
    with pytest.raises(UserError, match="this model has no U-Net"):
        made(nn.Linear(3, 3))
    module = load_network_module("networks.control_net_lllite")
    assert module.conditioned and not load_network_module("networks.lora").conditioned
    with pytest.raises(UserError, match="Did you mean 'cond_emb_dim'"):
        module.check_arguments({"cond_emb_dims": "3"})
