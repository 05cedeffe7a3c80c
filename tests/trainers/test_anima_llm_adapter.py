# SPDX-License-Identifier: Apache-2.0
"""The LLM adapter of Anima learns when it is asked to, with cached texts too, and only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.families.registry import FAMILIES
from library.options import resolve
from library.trainers.options import NetworkTrainerOptions
from tests.families.anima import loss, make
from tests.trainers.finetune_runs import finetune
from tests.trainers.helpers import make_pictures, micro_generator, subset, train, write_dataset

CACHED = {"cache_text_encoder_outputs": True, "network_train_unet_only": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"family": "anima", **make(tmp_path_factory.mktemp("model"))}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    return write_dataset(root / "data.toml", subset(make_pictures(root / "pictures", 2, captions=["red cat", ""])))


def test_a_lora_of_the_adapter_equals_the_literal_reference(
    model: dict[str, Any], dataset: Path, tmp_path: Path
) -> None:
    """Also with texts from the cache, which hold what goes into the adapter."""
    values = {**model, **CACHED, "network_args": ["train_llm_adapter=True"], "max_train_steps": 1}
    network = train(None, dataset, tmp_path / "first", **values).trainer.network
    for layer in network.named_layers().values():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    save_file(network.state(None), tmp_path / "trained.safetensors")
    values |= {"network_weights": tmp_path / "trained.safetensors", "keep_gradients": True}
    adapters = {k: v.requires_grad_() for k, v in load_file(tmp_path / "trained.safetensors").items()}
    expected = None
    for name, texts in {"cached": CACHED, "encoded": {"cache_text_encoder_outputs": None}}.items():
        run = train(None, dataset, tmp_path / name, **{**values, **texts})
        if expected is None:
            plain = train(None, dataset, tmp_path / "plain", **{**values, "cache_text_encoder_outputs": None})
            batch = plain.trainer.data.load(plain.trainer.data.plan_epoch(1)[0], step=0)
            expected = loss(model, batch, adapters, micro_generator(plain, 0))
            expected.backward()
        assert run.losses[0] == pytest.approx(expected.item(), rel=1e-5)
        found = run.trainer.gradients[0]
        inside = [key for key in found if "llm_adapter" in key]
        assert len(inside) == 40 and all(bool(found[key].any()) for key in inside)
        largest = max(float(adapters[key].grad.abs().max()) for key in found)  # type: ignore[union-attr]
        for key, gradient in found.items():
            assert float((gradient - adapters[key].grad).abs().max()) < 1e-5 * largest, key


@pytest.mark.parametrize("rate", [None, 1e-3])
def test_full_training_leaves_it_alone_unless_it_has_a_rate(
    model: dict[str, Any], dataset: Path, tmp_path: Path, rate: float | None
) -> None:
    run = finetune(dataset, tmp_path, **model, llm_adapter_lr=rate, mlp_lr=0.0, max_train_steps=1)
    before, after = load_file(model["pretrained_model_name_or_path"]), load_file(run.file)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".self_attn." in name for name in changed) and not any(
        ".blocks.0.mlp." in n and "adapter" not in n for n in changed
    )
    assert any("llm_adapter" in name for name in changed) == (rate is not None)


def test_rates_of_full_training_are_answered_by_networks() -> None:
    words = [
        "--pretrained_model_name_or_path",
        "x",
        "--self_attn_lr",
        "1e-4",
        "--train_data_dir",
        "x",
        "--output_dir",
        "x",
    ]
    answers = resolve(NetworkTrainerOptions, FAMILIES["anima"].option_groups, words, prog="x").answers
    assert [a.partition(";")[0] for a in answers if "--self_attn_lr" in a] == ["--self_attn_lr: for full training"]
