# SPDX-License-Identifier: Apache-2.0
"""tools/cache_text_encoder_outputs.py: prompts, single encoders, mistakes. Families: test_cache_latents.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from library.data.caches.share import Share, Shares
from tests.families import flux
from tests.trainers.helpers import argv, make_pictures, make_trainer, subset, write_dataset
from tools import cache_text_encoder_outputs, caching

FLAGS = {"cache_latents_to_disk": False, "cache_text_encoder_outputs_to_disk": True}
PROMPTS = "a cat --n blurred --w 64 --h 64 --s 1\na dog --w 64 --h 64 --s 1\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("flux")
    data = write_dataset(folder / "d.toml", subset(make_pictures(folder / "p", 5)))
    return {**flux.make(folder / "m"), **flux.USUAL, "dataset_config": data}


@pytest.fixture(autouse=True)
def own_state() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def run(values: dict[str, Any]) -> int:
    return cache_text_encoder_outputs.main(["--flux", *argv(values)])


def test_prompts_of_previews_are_there_too(model: dict[str, Any], tmp_path: Path) -> None:
    """Neither CLIP-L nor T5 is loaded by a training that shows pictures."""
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    values = {**model, "cache_dir": tmp_path / "cache", "sample_prompts": tmp_path / "prompts.txt"}
    assert run(values) == 0
    more = {"output_name": "x", "max_train_steps": 1, "network_dim": 2, "network_train_unet_only": True, "seed": 1}
    more |= {"sample_at_first": True, "max_data_loader_n_workers": 0, "output_dir": tmp_path / "out"}
    trainer = make_trainer({**values, **more, "cache_text_encoder_outputs_to_disk": True}, family="flux")

    def never(*arguments: Any, **others: Any) -> Any:
        raise AssertionError("a text encoder was loaded")

    trainer.family.load_text_encoder = never  # type: ignore[method-assign]
    assert trainer.run() == 0
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 2
    assert not (tmp_path / "cache" / "latents").exists()


def test_only_the_encoder_that_changed(
    model: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {**model, "cache_dir": tmp_path / "cache"}
    assert run(values) == 0
    capsys.readouterr()
    other = flux.make(tmp_path / "other", seed=1)
    assert run({**values, "clip_l": other["clip_l"]}) == 0
    text = capsys.readouterr().err
    assert "clip_l: 5 texts are needed, 0 of them are there" in text
    assert "t5xxl: 5 texts are needed, 5 of them are there" in text


def test_processes_share_the_work(model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[list[int]] = []
    monkeypatch.setattr("library.trainers.caching.shares_of", lambda folders: Shares(others=Share(len(left), 2)))

    def half(run: caching.CacheRun) -> None:
        cache_text_encoder_outputs.fill(run)
        assert run.caches.texts is not None
        parts = run.caches.texts.parts
        left.append([part.lacking(run.caches.wanted(name, others=True))[0] for name, part in parts.items()])

    words = ["--flux", *argv({**model, "cache_dir": tmp_path})]
    for _ in range(2):
        assert caching.run(words, half, "x", "", **FLAGS) == 0
    assert left == [[4, 4], [0, 0]]  # captions are divided by their digests


def test_without_a_cache_folder_it_lies_beside_the_pictures(model: dict[str, Any], tmp_path: Path) -> None:
    pictures = tmp_path / "p"
    shutil.copytree(Path(model["dataset_config"]).parent / "p", pictures, ignore=shutil.ignore_patterns(".*"))
    data = write_dataset(tmp_path / "d.toml", subset(pictures))
    assert run({**model, "dataset_config": data}) == 0
    assert list((pictures / ".trainyard" / "texts").iterdir())


def test_bad_input(model: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = Path(model["dataset_config"]).parent / "p"
    warm = write_dataset(tmp_path / "d.toml", subset(pictures, token_warmup_step=10, token_warmup_min=1))
    values = {**model, "dataset_config": warm, "t5xxl": tmp_path / "t5.safetensors",
              "sample_prompts": tmp_path / "no.txt", "cache_dir": tmp_path / "cache"}  # fmt: skip
    assert run(values) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines), lines
    for part in ("t5.safetensors", "no.txt", "token_warmup_step"):
        assert any(part in line for line in lines), lines
    assert not (tmp_path / "cache" / "texts").exists()
