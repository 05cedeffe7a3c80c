# SPDX-License-Identifier: Apache-2.0
"""Full-size transformers: names, shapes, ranks, groups as in sd-scripts 0.10.1."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from networks import lora_anima, lora_flux, lora_hunyuan_image, lora_lumina, lora_sd3
from tests.adapters.families import FULL, full_encoder, full_models
from tests.adapters.models import read_json

GOLDEN = read_json("families.json")


def unpacked(runs: list[Any]) -> list[tuple[str, Any]]:
    """(name, value) of every module, in order."""
    return [
        (template.format(number), value)
        for first, last, items in runs
        for number in ([None] if first is None else range(first, last + 1))
        for template, value in items
    ]


def module_of(variant: str) -> ModuleType:
    found = {"f": lora_flux, "c": lora_flux, "s": lora_sd3, "l": lora_lumina, "a": lora_anima, "h": lora_hunyuan_image}
    return found[variant[0]]


def models_of(variant: str) -> tuple[list[nn.Module], nn.Module]:
    variant = (
        variant.replace("sd35m", "sd35_medium")
        .replace("lumina_", "lumina2_")
        .replace("hunyuan_reg", "hunyuan_image_2_1")
    )
    return full_models(next((name for name in FULL if variant.startswith(name)), "flux_dev"))


def network_of(variant: str, arguments: dict[str, str], *, encoders: bool = True) -> Any:
    texts, denoiser = models_of(variant)
    given = list(texts) if encoders else []
    return module_of(variant).create_network(1.0, 4, 1.0, None, given, denoiser, **arguments)


@pytest.mark.parametrize("variant", GOLDEN["keys"])
def test_saved_keys_and_shapes(variant: str) -> None:
    golden = GOLDEN["keys"][variant]
    state = network_of(variant, golden["network_args"], encoders=golden["text_encoders"]).state(None)
    expected: dict[str, list[int]] = {
        f"{name}.{suffix}": shape
        for name, (down, up) in unpacked(golden["modules"])
        for suffix, shape in (("alpha", []), ("lora_down.weight", down), ("lora_up.weight", up))
    }
    assert [*state] == [*expected]
    assert {key: list(value.shape) for key, value in state.items()} == expected


@pytest.mark.parametrize("variant", ["flux_dev_train_t5xxl", "chroma", "sd35_large_emb_dims4", "lumina2", "anima"])
def test_network_from_a_full_size_file(variant: str) -> None:
    golden = GOLDEN["keys"][variant]
    state = network_of(variant, golden["network_args"], encoders=golden["text_encoders"]).state(None)
    texts, denoiser = models_of(variant)
    made, _ = module_of(variant).create_network_from_weights(1.0, None, None, texts, denoiser, weights_sd=state)
    again = made.state(None)
    assert [*again] == [*state]
    assert all(torch.equal(value, state[key]) for key, value in again.items())


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_ranks_alphas_and_lr_groups(case: str) -> None:
    golden = GOLDEN["cases"][case]
    network = network_of(case, golden["network_args"])
    layers = network.named_layers()
    assert [(name, [layer.rank, layer.alpha]) for name, layer in layers.items()] == unpacked(golden["modules"])
    for rates in golden["lr_groups"].values():
        groups = network.param_groups(
            learning_rate=rates["learning_rate"], unet_lr=rates["unet_lr"], text_encoder_lr=rates["text_encoder_lr"]
        )
        found = [
            {"lr": g["lr"], "n_tensors": len(g["params"]), "n_params": sum(p.numel() for p in g["params"])}
            for g in groups
        ]
        assert found == rates["groups"]
        expected = rates["descriptions"]
        if expected[:2] == ["textencoder 1", "textencoder 1"]:  # theirs calls both by one name
            expected = ["textencoder 1", "textencoder 2", *expected[2:]]
        assert [group["name"] for group in groups] == expected


def prefixes(module: ModuleType, encoders: list[nn.Module | None], **arguments: str) -> list[str]:
    network = module.create_network(1.0, 4, 1.0, None, encoders, None, **arguments)
    return list(dict.fromkeys(name.partition("_text_model")[0].partition("_encoder")[0] for name in network.layers))


def test_encoders_are_named_by_what_they_are() -> None:
    clip_l, clip_g = full_encoder("clip_l", projection=True), full_encoder("clip_g", projection=True)
    t5 = full_encoder("t5xxl")
    learns = {"train_t5xxl": "True"}
    assert prefixes(lora_sd3, [clip_l, clip_g, t5]) == ["lora_te1", "lora_te2"]  # T5 has to be asked for
    assert prefixes(lora_sd3, [clip_l, clip_g, t5], **learns) == ["lora_te1", "lora_te2", "lora_te3"]
    assert prefixes(lora_sd3, [None, clip_g, None]) == ["lora_te2"]
    assert prefixes(lora_sd3, [clip_g, t5], **learns) == ["lora_te2", "lora_te3"]  # CLIP-L is not used at all
    assert prefixes(lora_sd3, [clip_l, t5], **learns) == ["lora_te1", "lora_te3"]
    assert prefixes(lora_flux, [None, t5], **learns) == ["lora_te3"]
    assert prefixes(lora_flux, [t5], train_t5xxl="true") == ["lora_te3"]  # Chroma


def test_each_encoder_has_its_own_rate() -> None:
    encoders = [full_encoder("clip_l"), full_encoder("t5xxl")]
    network = lora_flux.create_network(1.0, 4, 1.0, None, encoders, None, train_t5xxl="True")
    groups = network.param_groups(learning_rate=1.0, text_encoder_lr=[0.5, 0.25])
    assert [(g["name"], g["lr"]) for g in groups] == [("textencoder 1", 0.5), ("textencoder 3", 0.25)]
    assert [g["name"] for g in network.param_groups(learning_rate=1.0, text_encoder_lr=[0.0, 0.25])] == [
        "textencoder 3"
    ]
