# SPDX-License-Identifier: Apache-2.0
"""diffusers reads our files: every key is used and its U-Net answers like ours merged."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from networks.formats import to_kohya, to_peft
from networks.lora import create_network
from networks.targets import sd_targets
from tests.networks.models import distance, randomize, run_unet, tiny_clip, tiny_unet

pytest.importorskip("peft")

IDS = torch.tensor([[48, 1, 2, 3, 49]])


def pipeline(encoder: nn.Module, unet: nn.Module) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=None, text_encoder=encoder, tokenizer=None, unet=unet, scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def trained(encoder: nn.Module, unet: nn.Module, **arguments: Any) -> Any:
    torch.manual_seed(5)
    network = create_network(1.0, 4, 2.0, None, encoder, unet, **arguments)
    randomize(network)
    return network


FORMS: dict[str, dict[str, str]] = {
    "plain": {},
    "conv": {"conv_dim": "2", "conv_alpha": "1"},
    "rs_lora": {"rs_lora": "True"},
    "scalar": {"use_scalar": "True"},
}


@pytest.mark.parametrize("form", ["kohya", "peft"])
@pytest.mark.parametrize("arguments", FORMS)
def test_load_lora_weights(arguments: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder, unet = tiny_clip(), tiny_unet()
    network = trained(encoder, unet, **FORMS[arguments])
    path = tmp_path / "lora.safetensors"
    network.save(path, dtype=None, metadata={"ss_network_dim": "4"})
    tensors = to_peft(network.state(None), sd_targets(encoder, unet, conv=True))
    theirs = pipeline(copy.deepcopy(encoder), copy.deepcopy(unet))
    unused = load_watched(theirs, str(path) if form == "kohya" else tensors, caplog)
    assert unused == []
    assert adapter_count(theirs.unet) + adapter_count(theirs.text_encoder) == len(network.named_layers())
    network.merge_into()
    assert distance(run_unet(theirs.unet), run_unet(unet)) < 1e-5
    assert distance(theirs.text_encoder(IDS)[0], encoder(IDS)[0]) < 1e-5


@pytest.mark.parametrize("arguments", [{}, {"conv_dim": "2"}], ids=["attention", "conv"])
def test_load_dora(arguments: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """peft form, U-Net: diffusers 0.42 drops dora_scale of kohya files and cannot read an encoder's DoRA."""
    encoder, unet = tiny_clip(), tiny_unet()
    network = trained(encoder, unet, dora_wd="True", **arguments)
    network.attach(train_denoiser=True, train_text_encoder=False)
    theirs = pipeline(copy.deepcopy(encoder), tiny_unet())
    tensors = to_peft(network.state(None), sd_targets(encoder, unet, conv=True))
    assert load_watched(theirs, tensors, caplog) == []
    assert adapter_count(theirs.unet) == len(network.named_layers())
    network.merge_into()
    assert distance(run_unet(theirs.unet), run_unet(unet)) < 1e-5


def load_watched(pipe: Any, lora: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Load, and return what the libraries said about keys that they did not use."""
    logging.getLogger("diffusers").propagate = True
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(lora)
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if "nexpected key" in message or "UNEXPECTED" in message]


def adapter_count(model: nn.Module) -> int:
    return sum(name.endswith("lora_A.default_0") for name, _ in model.named_modules())


def test_peft_keys_load_into_our_network() -> None:
    encoder, unet = tiny_clip(), tiny_unet()
    network = trained(encoder, unet, dora_wd="True", conv_dim="2")
    state = network.state(None)
    peft = to_peft(state, sd_targets(encoder, unet, conv=True))
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight" in peft
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight" in peft
    again = to_kohya(peft)
    assert again.keys() == {key for key in state if not key.endswith(".alpha")}
    other = create_network(1.0, 4, 2.0, None, encoder, unet, dora_wd="True", conv_dim="2")
    other.load(peft)
    expected = run_with(network, unet)
    assert distance(run_with(other, unet), expected) < 1e-6


def run_with(network: Any, unet: nn.Module) -> torch.Tensor:
    network.attach(train_denoiser=True, train_text_encoder=True)
    output = run_unet(unet)
    network.detach()
    return output
