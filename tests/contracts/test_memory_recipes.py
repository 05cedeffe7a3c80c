# SPDX-License-Identifier: Apache-2.0
"""The recipes for cards of several sizes: their commands are right, the page lists them, and they run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from library.cli import METHODS
from library.families.registry import FAMILIES
from library.memory.choice import MemoryChoice
from library.options import Resolved, read_toml, resolve
from tests.families import CASES
from tests.script_runner import ROOT, run_script
from tests.trainers.helpers import argv, make_pictures, quick_previews, subset, write_dataset
from tools.make_memory_recipes import RECIPES, SPARE
from tools.make_options_doc import SCRIPTS

FOLDER = ROOT / "configs" / "memory"
PAGE = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))
# recipe -> case whose tiny model it runs on. Of each method of a family the recipe for the smallest card is run
TINY = {
    "sd_lora": "sd1", "sd_full": "sd1", "sdxl_lora": "sdxl", "sdxl_full": "sdxl", "sd3_medium_lora": "sd35",
    "sd3_medium_full": "sd35", "flux_lora": "flux", "flux_full": "flux", "lumina_lora": "lumina",
    "lumina_full": "lumina", "anima_lora": "anima", "anima_full": "anima",
    "flux2_klein4b_lora": "flux2", "flux2_klein4b_full": "flux2", "sana_lora": "sana", "sana_full": "sana",
    "hunyuan_image_lora": "hunyuan_image", "hunyuan_image_full": "hunyuan_image",
}  # fmt: skip


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.toml").read_text(encoding="utf-8")


def command_of(name: str) -> list[str]:
    """The words of the command in a recipe's header, from the script on."""
    lines = [line[1:] for line in text_of(name).splitlines() if line.startswith("#   ")]
    words = shlex.split(" ".join(lines))
    assert words[:2] == ["accelerate", "launch"]
    return words[2:]


def resolved(name: str) -> Resolved:
    """The options with which the header's command starts its script."""
    script, *words = command_of(name)
    method, family = SCRIPTS[script]
    return resolve(METHODS[method][1], FAMILIES[family].option_groups, words, prog="test")


def smallest(recipe: str) -> str:
    """The name of the recipe for the smallest card."""
    return min((n for n in NAMES if n.startswith(f"{recipe}_")), key=lambda n: int(n.rpartition("_")[2][:-2]))


def test_every_recipe_is_made_by_the_tool() -> None:
    assert {name.rpartition("_")[0] for name in NAMES} == set(RECIPES) and len(NAMES) >= 40
    assert set(TINY) < set(RECIPES)


@pytest.mark.parametrize("name", NAMES)
def test_command_and_options(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key is an option of the script, nothing contradicts, and what is chosen is said in the page."""
    monkeypatch.chdir(ROOT)
    found = resolved(name)
    memory: Any = found.options.memory
    assert command_of(name)[2] == f"configs/memory/{name}.toml"
    full = "finetune" in vars(found.options)
    assert (MemoryChoice.of(memory).storage == "plain") or not full
    if memory.blocks_to_swap and full:
        assert found.options.optimizer.fused_backward_pass
    peak = re.search(r"^# Predicted peak ([0-9.]+) GB: (.*)\.$", text_of(name), flags=re.MULTILINE)
    assert peak is not None
    card = int(name.rpartition("_")[2].removesuffix("gb"))
    assert float(peak[1]) <= card - SPARE / (1 << 30) + 0.005
    assert sum(float(part.split()[-1]) for part in peak[2].split(", ")) == pytest.approx(float(peak[1]), abs=0.05)
    flags = " ".join(MemoryChoice.of(memory).flags()) or "(nothing)"
    assert f"[{float(peak[1]):.1f}](../configs/memory/{name}.toml) `{flags}`" in PAGE


def test_recipes_differ_from_those_for_large_cards_in_memory_only() -> None:
    """So that who moves to another card learns the same."""
    for name in NAMES:
        recipe = RECIPES[name.rpartition("_")[0]]
        base = read_toml(ROOT / "configs" / f"{recipe.base}.toml", "configs")
        own = read_toml(FOLDER / f"{name}.toml", "configs/memory")
        edited = {*recipe.edits, *(key for way in recipe.ways for key in way), "gradient_checkpointing"}
        for section, values in base.items():
            kept = {key: value for key, value in values.items() if key not in edited}
            assert kept.items() <= own[section].items(), (name, section)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    return write_dataset(folder / "data.toml", subset(make_pictures(folder / "pictures", 2)))


@pytest.mark.parametrize("recipe", TINY)
def test_recipe_trains(recipe: str, dataset: Path, tmp_path: Path) -> None:
    """As it is, but for the paths, the length, an optimizer that needs no GPU, and fewer blocks to swap."""
    name, case = smallest(recipe), CASES[TINY[recipe]]
    model = (case.make_deep or case.make)(tmp_path / "model")
    own = {
        "config_file": f"configs/memory/{name}.toml", "dataset_config": dataset, **model, **case.options,
        "output_dir": tmp_path / "out", "output_name": "x", "optimizer_type": "AdamW", "max_train_epochs": 0,
        "max_train_steps": 1, "max_data_loader_n_workers": 0, "cache_dir": tmp_path / "cache",
        "save_model_as": "safetensors", "min_bucket_reso": 64, "max_bucket_reso": 64,
        **quick_previews(tmp_path),
    }  # fmt: skip
    if "blocks_to_swap" in text_of(name):
        own["blocks_to_swap"] = 1
    ended = run_script(*argv(own), "--optimizer_args", script=command_of(name)[0])
    assert ended.code == 0, ended.text
    assert load_file(tmp_path / "out" / "x.safetensors")
    assert list((tmp_path / "out" / "sample").glob("*.png"))
    assert "has no effect" not in ended.text and "ignored" not in ended.text
