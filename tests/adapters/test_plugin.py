# SPDX-License-Identifier: Apache-2.0
"""--network_module: our modules by name, the real LyCORIS package through the kohya contract, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from library.adapters.adapter_network import AdapterNetwork
from library.adapters.foreign.network_module import PluginNetwork
from library.adapters.layer_network import LayerNetwork
from library.errors import UserError
from library.families.adapters import load_network_module, own_modules
from tests.adapters.models import distance, randomize, run_unet, tiny_clip, tiny_unet

IDS = torch.tensor([[48, 1, 2, 3, 49]])


def test_our_own_module_by_its_name() -> None:
    network = load_network_module("networks.lora").create_network(1.0, 4, 1.0, None, [tiny_clip()], tiny_unet(), None)
    assert isinstance(network, LayerNetwork)
    assert next(iter(network.named_layers())) == "lora_te_text_model_encoder_layers_0_self_attn_k_proj"
    assert "networks.lora" in own_modules()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("networks.lorra", "Did you mean networks.lora?"),
        ("json", "has no create_network()"),
        ("lycoris.nothing_here", "pip install lycoris-lora"),
    ],
)
def test_a_module_that_is_none(name: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        load_network_module(name)
    assert len(error.value.problems) == 1 and "\n" not in str(error.value)
    assert f"--network_module {name}" in str(error.value) and expected in str(error.value)


def lycoris(encoder: nn.Module, unet: nn.Module, **arguments: str) -> AdapterNetwork:
    module = pytest.importorskip("lycoris.kohya")
    assert module.create_network
    torch.manual_seed(2)
    made = load_network_module("lycoris.kohya").create_network(
        1.0, 4, 2.0, None, encoder, unet, 0.0, preset="attn-mlp", **arguments
    )
    assert isinstance(made, PluginNetwork)
    return made


ALGORITHMS = {
    "lora": ({"algo": "lora"}, {"alpha", "lora_down.weight", "lora_up.weight"}),
    "loha": ({"algo": "loha"}, {"alpha", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    "dora": ({"algo": "lora", "dora_wd": "True"}, {"alpha", "lora_down.weight", "lora_up.weight", "dora_scale"}),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_lycoris_learns_and_saves(algorithm: str, tmp_path: Path) -> None:
    arguments, suffixes = ALGORITHMS[algorithm]
    encoder, unet = tiny_clip(), tiny_unet()
    plain = run_unet(unet)
    network = lycoris(encoder, unet, **arguments)
    network.attach(train_denoiser=True, train_text_encoder=True)
    network.epoch_started()
    network.enable_gradient_checkpointing()
    groups = network.param_groups(learning_rate=1.0, unet_lr=2.0, text_encoder_lr=[3.0])
    assert [(group["name"], group["lr"]) for group in groups] == [("textencoder", 3.0), ("unet", 2.0)]
    grouped = {id(p) for group in groups for p in group["params"]}
    assert grouped == {id(p) for p in network.parameters()}
    assert distance(run_unet(unet), plain) < 1e-5

    optimizer = torch.optim.SGD([{**group, "lr": 0.5} for group in groups])
    for _ in range(2):
        optimizer.zero_grad()
        (run_unet(unet).square().mean() + encoder(IDS)[0].square().mean()).backward()
        optimizer.step()
    learned = run_unet(unet)
    assert distance(learned, plain) > 1e-4
    with network.disabled():
        assert distance(run_unet(unet), plain) < 1e-5 or algorithm == "dora"  # LyCORIS keeps W + ΔW at multiplier 0
    assert distance(run_unet(unet), learned) < 1e-6

    state = network.state(torch.float16)
    names = {key.partition(".")[0] for key in state}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in names
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in names
    assert all(name.startswith(("lora_unet_", "lora_te_text_model_")) for name in names)
    assert {key.partition(".")[2] for key in state} == suffixes
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert network.module_parameters().keys() == names

    other = lycoris(encoder, fresh := tiny_unet(), **arguments)
    other.attach(train_denoiser=True, train_text_encoder=True)
    other.load(network.state(None))
    assert distance(run_unet(fresh), learned) < 1e-5


def test_lycoris_norm_limit_and_unet_only() -> None:
    network = lycoris(tiny_clip(), tiny_unet(), algo="lora")
    network.attach(train_denoiser=True, train_text_encoder=False)
    assert all(key.startswith("lora_unet_") for key in network.state(None))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0)
    report = network.scale_norms(0.5)
    assert int(report.scaled) == len(network.module_parameters())
    assert float(report.maximum) == pytest.approx(0.5, rel=1e-3)


def test_lycoris_from_weights_and_detach(tmp_path: Path) -> None:
    encoder, unet = tiny_clip(), tiny_unet()
    network = lycoris(encoder, unet, algo="loha")
    network.attach(train_denoiser=True, train_text_encoder=True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2)
    learned = run_unet(unet)
    path = tmp_path / "loha.safetensors"
    network.save(path, dtype=None, metadata={"a": "b"})
    fresh = tiny_unet()
    made, weights = load_network_module("lycoris.kohya").create_network_from_weights(1.0, path, None, encoder, fresh)
    assert weights.keys() == network.state(None).keys()
    made.attach(train_denoiser=True, train_text_encoder=True)
    assert distance(run_unet(fresh), learned) < 1e-5
    made.detach()
    assert torch.equal(run_unet(fresh), run_unet(tiny_unet()))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_lycoris_as_base_weights(strength: float) -> None:
    """Loaded before anything is attached, then merged at the strength that was asked for."""
    encoder, unet = tiny_clip(), tiny_unet()
    network = lycoris(encoder, unet, algo="lora")
    network.attach(train_denoiser=True, train_text_encoder=True)
    randomize(network)
    weights, plain = network.state(None), tiny_unet().state_dict()
    fresh = tiny_unet()
    made, _ = load_network_module("lycoris.kohya").create_network_from_weights(
        strength, None, None, tiny_clip(), fresh, weights_sd=weights
    )
    made.load(weights)
    made.merge_into()
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    key = "lora_unet_" + name.replace(".", "_")
    change = weights[f"{key}.lora_up.weight"] @ weights[f"{key}.lora_down.weight"] * weights[f"{key}.alpha"] / 4
    assert distance(fresh.state_dict()[f"{name}.weight"], plain[f"{name}.weight"] + strength * change) < 1e-6


def test_arguments_are_checked_before_anything_is_built() -> None:
    with pytest.raises(UserError, match="unknown key 'conv_dims'"):
        load_network_module("networks.lora").check_arguments({"conv_dims": "4"})
    load_network_module("networks.lora").check_arguments({"conv_dim": "4"})


def test_wrong_file_for_lycoris() -> None:
    network = lycoris(tiny_clip(), tiny_unet(), algo="lora")
    network.attach(train_denoiser=True, train_text_encoder=True)
    with pytest.raises(UserError, match="1 keys of the adapter file belong to no adapter here: lora_unet_nothing"):
        network.load({"lora_unet_nothing.alpha": torch.ones(())})


# ---- a minimal module of a user -----------------------------------------------------------------------------------


class Minimal(nn.Module):
    """The oldest form of the contract: two learning rates, groups without names, no multiplier."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))
        self.applied: tuple[bool, bool] | None = None

    def apply_to(self, text_encoder: Any, unet: Any, train_text_encoder: bool, train_unet: bool) -> None:
        self.applied = (train_text_encoder, train_unet)
        unet.register_forward_hook(lambda module, args, output: output + self.shift)

    def prepare_optimizer_params(self, text_encoder_lr: float, unet_lr: float) -> list[dict[str, Any]]:
        return [{"params": iter([self.shift]), "lr": unet_lr}]

    def load_weights(self, file: str) -> Any:
        from safetensors.torch import load_file

        return self.load_state_dict(load_file(file), strict=False)

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        from safetensors.torch import save_file

        save_file({"shift": self.shift.detach().to(dtype or torch.float32)}, file)


def install(monkeypatch: pytest.MonkeyPatch, create: Any) -> None:
    module = ModuleType("users_network")
    module.create_network = create  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_network", module)


def test_a_minimal_users_module(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda *args, **kwargs: Minimal())
    module = load_network_module("users_network")
    unet = nn.Linear(4, 4)
    network = module.create_network(1.0, None, None, None, None, unet)
    assert isinstance(network, PluginNetwork)
    network.attach(train_denoiser=True, train_text_encoder=False)
    assert network.network.applied == (False, True)
    [group] = network.param_groups(learning_rate=1e-3, unet_lr=None, text_encoder_lr=[1e-4])
    assert (group["lr"], group["name"], len(group["params"])) == (1e-3, "group 1", 1)
    with torch.no_grad():
        network.network.shift.fill_(2.0)
    assert torch.equal(network.state(None)["shift"], torch.full((4,), 2.0))
    network.load({"shift": torch.ones(4)})
    assert torch.equal(network.network.shift, torch.ones(4))
    for call, text in (
        (lambda: network.merge_into(), "no merge_to"),
        (lambda: network.scale_norms(1.0), "--scale_weight_norms"),
        (network.detach, "no restore"),
        (lambda: module.create_network_from_weights(1.0, "x", None, None, unet), "no create_network_from_weights"),
    ):
        with pytest.raises(UserError, match=text):
            call()


def test_a_users_module_gets_the_encoders_that_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No None in the place of the others, and the rate of the encoder's own place."""
    given: list[Any] = []

    class Rates(Minimal):
        def prepare_optimizer_params_with_multiple_te_lrs(self, text_encoder_lr: Any, unet_lr: Any, lr: Any) -> Any:
            given.append(text_encoder_lr)
            return [{"params": [self.shift], "lr": lr}]

    def create(multiplier: float, dim: Any, alpha: Any, vae: Any, text_encoder: Any, unet: Any, **kwargs: Any) -> Rates:
        given.append(text_encoder)
        return Rates()

    install(monkeypatch, create)
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    module = load_network_module("users_network")
    network = module.create_network(1.0, None, None, None, [None, first, second], nn.Linear(4, 4))
    network.param_groups(learning_rate=1.0, text_encoder_lr=[0.1, 0.2, 0.3])
    network.param_groups(learning_rate=1.0, text_encoder_lr=0.1)
    network.param_groups(learning_rate=1.0)
    module.create_network(1.0, None, None, None, [None, second], nn.Linear(4, 4))
    assert given == [[first, second], [0.2, 0.3], [0.1, 0.1], None, second]


def test_a_users_module_that_breaks_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda *args, **kwargs: nn.Linear(1, 1))
    with pytest.raises(UserError, match="users_network: its network lacks apply_to, prepare_optimizer_params"):
        load_network_module("users_network").create_network(1.0, 4, 1.0, None, None, None)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("rank must be even")

    install(monkeypatch, refuse)
    with pytest.raises(UserError, match="users_network refuses these --network_args: ValueError: rank must be even"):
        load_network_module("users_network").create_network(1.0, 3, 1.0, None, None, None)
