# SPDX-License-Identifier: Apache-2.0
"""Training runs with every adapter kind: exact resume, files to start from, base weights, metadata, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from tests.tiny import make_tiny_sd
from tests.trainers.helpers import assert_same_run, make_pictures, subset, train, train_with_stops, write_dataset

KINDS: dict[str, dict[str, Any]] = {
    "lora_fa": {"network_args": ["conv_dim=2", "rank_dropout=0.2"]},
    "dylora": {"network_args": ["dyloRA=2", "conv_dim=4", "loraplus_lr_ratio=4"]},
    "oft": {"network_dim": 2, "network_alpha": 0.01, "network_args": ["enable_all_linear=True"]},
    "loha": {"network_args": ["conv_dim=2", "use_tucker=True", "rank_dropout=0.2"], "scale_weight_norms": 0.5},
    "lokr": {"network_dim": 2, "network_args": ["factor=2", "dora_wd=True", "module_dropout=0.2"]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_dataset(folder / "dataset.toml", subset(make_pictures(folder / "pictures")))


# At the first save: what is said of the programs, in the order of ComfyUI, Forge and diffusers
SAID = {
    "lora_fa": ["as it was trained in ComfyUI and Forge and diffusers"],
    "dylora": ["as it was trained in ComfyUI and Forge and diffusers"],
    "oft": ["ComfyUI loads nothing of the file; --lora_format comfy is for it", "Forge refuses", "diffusers refuses"],
    "loha": ["as it was trained in ComfyUI and Forge", "diffusers refuses the file"],
    "lokr": ["ComfyUI changes", "Forge changes", "diffusers refuses the file"],  # a DoRA of rows
}


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_exactly(
    kind: str, model: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"network_module": f"networks.{kind}", "save_state": True, "max_train_steps": 3, **KINDS[kind]}
    caplog.set_level("INFO")
    whole = train(model, dataset, tmp_path / "whole", save_every_n_steps=2, **values)
    assert len(set(whole.losses)) == 3
    said = [record.getMessage() for record in caplog.records if ".safetensors: " in record.getMessage()]
    starts = [f"x-step00000002.safetensors: {line}" for line in SAID[kind]]
    assert len(said) == len(starts) and all(line.startswith(start) for line, start in zip(said, starts)), said
    assert_same_run(train_with_stops(model, dataset, tmp_path / "stopped", [1], **values), whole)

    metadata = whole.metadata
    assert metadata["ss_network_module"] == f"networks.{kind}"
    arguments = dict(item.split("=") for item in KINDS[kind]["network_args"])
    assert all(f'"{key}": "{value}"' in metadata["ss_network_args"] for key, value in arguments.items())


def test_full_matrices_in_half_precision(model: Path, dataset: Path, tmp_path: Path) -> None:
    """Programs ask for them with a rank that is no number in fp16."""
    values = {"network_module": "networks.lokr", "network_dim": 100_000, "network_alpha": 1, "max_train_steps": 1}
    saved = train(model, dataset, tmp_path, save_precision="fp16", **values).weights
    assert all(torch.isfinite(value).all() for value in saved.values())
    assert {float(value) for key, value in saved.items() if key.endswith(".alpha")} == {100_000}
    assert {value.dtype for key, value in saved.items() if not key.endswith(".alpha")} == {torch.float16}


@pytest.mark.parametrize("kind", ["oft", "lokr"])
def test_starts_from_a_file(kind: str, model: Path, dataset: Path, tmp_path: Path) -> None:
    """As --network_weights with its own form, and as --base_weights that become part of the model.

    The LoKr is a DoRA in the comfy format: only with the model's weights its magnitudes become the trained ones.
    """
    values = {"network_module": f"networks.{kind}", "network_dim": 2, "network_alpha": 0.01, "max_train_steps": 1}
    values |= {"network_args": ["dora_wd=True"], "lora_format": "comfy"} if kind == "lokr" else {}
    first = train(model, dataset, tmp_path / "first", **values)
    options = {"network_weights": first.file, "dim_from_weights": True, "network_dim": None, "learning_rate": 1e-9}
    on = train(model, dataset, tmp_path / "on", **{**values, **options})
    assert on.weights.keys() == first.weights.keys()
    assert all(torch.allclose(on.weights[key], value, atol=1e-7) for key, value in first.weights.items())
    based = train(model, dataset, tmp_path / "based", base_weights=first.file, **values)
    assert on.losses == pytest.approx(based.losses, rel=1e-4)  # the same model, once as adapters, once merged
    assert based.losses != pytest.approx(first.losses, rel=1e-5)


def test_frozen_ranks_of_dylora_keep_their_values(model: Path, dataset: Path, tmp_path: Path) -> None:
    """With AdamW, which would move weights of gradient 0 by their moments and its decay."""
    seen: list[list[torch.Tensor]] = []

    def look(trainer: Any) -> None:
        blocks = [p for layer in trainer.network.named_layers().values() for p in layer.lora_down]
        seen.append([block.detach().clone() for block in blocks])
        gradients.append([block.grad is not None for block in blocks])

    gradients: list[list[bool]] = []
    train(
        model, dataset, tmp_path, network_module="networks.dylora", network_args=["unit=1"], optimizer_type="AdamW",
        max_train_steps=4, each_step=look,
    )  # fmt: skip
    for before, after, moved in zip(seen, seen[1:], gradients[1:]):
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert not any(c and not m for c, m in zip(changed, moved, strict=True))
        assert 0 < sum(changed) <= sum(moved) < len(moved)


def test_what_is_refused_before_training(model: Path, dataset: Path, tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    damaged, vae = tmp_path / "damaged.safetensors", tmp_path / "vae.safetensors"
    save_file({f"{name}.lora_down.weight": torch.ones(1, 8), f"{name}.alpha": torch.ones(3)}, damaged)
    save_file({"encoder.conv_in.weight": torch.ones(1)}, vae)
    for values, expected in (
        ({"network_module": "networks.lokrr"}, "Did you mean networks.lokr?"),
        ({"network_module": "networks.dylora", "network_args": ["units=2"]}, "Did you mean 'unit'?"),
        ({"network_module": "networks.loha", "lora_format": "peft"}, "have no name in the peft format"),
        (
            {"network_module": "networks.oft", "network_dim": 2, "lora_format": "peft"},
            "OFT has no names in other formats than kohya and comfy",
        ),
        (
            {"network_weights": str(damaged)},
            f"--network_weights {damaged}: the adapter file is damaged: 1 of 2 tensors",
        ),
        ({"base_weights": [str(damaged)]}, f"--base_weights {damaged}: the adapter file is damaged: 1 of 2 tensors"),
        ({"network_weights": str(vae)}, "holds no adapter: none of its 1 keys is one of an adapter's"),
        ({"base_weights": [str(tmp_path)]}, "is a folder without adapter_model.safetensors"),
    ):
        with pytest.raises(UserError) as error:
            train(model, dataset, tmp_path, **values)
        assert any(expected in line for line in error.value.problems), error.value.problems
        assert not (tmp_path / "x.safetensors").exists()


def test_what_has_no_place_in_fp16_is_saved_all_the_same(
    model: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Presets of a GUI: network_dim 100000 is LyCORIS' word for whole matrices, and its alpha is that too."""
    pytest.importorskip("lycoris.kohya")

    def grow(trainer: Any) -> None:
        next(p for name, p in trainer.network.named_parameters() if name.endswith("lokr_w1")).data.fill_(1e5)

    done = train(
        model, dataset, tmp_path, network_module="lycoris.kohya", network_dim=100000, network_alpha=100000,
        network_args=["algo=lokr", "factor=2", "preset=attn-mlp"], save_precision="fp16", max_train_steps=1,
        each_step=grow,
    )  # fmt: skip
    kinds = {key: value.dtype for key, value in done.weights.items()}
    wide = [key for key, kind in kinds.items() if kind == torch.float32 and not key.endswith(".alpha")]
    assert len(wide) == 1 and wide[0].endswith("lokr_w1") and float(done.weights[wide[0]].max()) == 1e5
    assert all(float(value) == 100000 for key, value in done.weights.items() if key.endswith(".alpha"))
    assert f"1 of {len(kinds) * 2 // 3} tensors are written in float32" in caplog.text
