# SPDX-License-Identifier: Apache-2.0
"""The demonstration of edits, shortened: its pairs, both recipes, and what its scores mean."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from tests.script_runner import run_script
from tools.base_model.draw import COLOURS, draw_scene
from tools.edit_demo import COLOUR, HELD_OUT, Edit, edited, held_out_edits, is_right, load_editor, scenes, write_pairs

ROOT = Path(__file__).parents[2]
PAIRS = "output/domain/pairs"  # of configs/domain_pairs.toml


def test_pairs_differ_in_the_colour_of_the_thing_alone(tmp_path: Path) -> None:
    write_pairs(tmp_path, 12)
    before, after = ([*sorted((tmp_path / name).glob("*.png"))] for name in ("before", "after"))
    assert [path.name for path in before] == [path.name for path in after] and len(before) == 12
    for one, other in zip(before, after):
        first, second = (np.asarray(Image.open(path)) for path in (one, other))
        assert (first[0] == second[0]).all() and (first != second).any()
        assert other.with_suffix(".txt").read_text() == "make it red\n"


def test_only_the_same_thing_in_red_on_the_same_background_is_right() -> None:
    rng = random.Random(3)
    for scene in scenes(HELD_OUT, 14, rng):
        edit = Edit(scene.thing, scene.background, draw_scene(scene, rng))
        red = replace(scene, colour=COLOUR)
        other = next(name for name in COLOURS if name not in (COLOUR, scene.background))
        assert is_right(edit, draw_scene(red, rng))
        assert not is_right(edit, edit.picture)
        assert not is_right(edit, draw_scene(replace(red, thing="circle"), rng))
        assert not is_right(edit, draw_scene(replace(red, background=other), rng))


def test_both_recipes_train_and_the_second_changes_edits(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", 16)
    recipe = (ROOT / "configs" / "domain_pairs.toml").read_text(encoding="utf-8")
    assert recipe.count(PAIRS) == 2
    pairs = tmp_path / "pairs.toml"
    pairs.write_text(recipe.replace(PAIRS, (tmp_path / "pairs").as_posix()), encoding="utf-8")
    own = ("--output_dir", str(tmp_path), "--max_train_steps", "2", "--lr_warmup_steps", "0")
    first = run_script("--config_file", "configs/domain_stage1.toml", *own)
    assert first.code == 0, first.text
    domain, edits = tmp_path / "domain.safetensors", tmp_path / "make_it_red.safetensors"
    second = run_script(
        "--config_file", "configs/domain_stage2_edit.toml", *own, "--dataset_config", str(pairs),
        "--base_weights", str(domain),
    )  # fmt: skip
    assert second.code == 0, second.text
    assert load_file(edits)["lora_unet_conv_in.diff"][:, 4:].any()
    shown = held_out_edits(2)
    results = [
        edited(load_editor(files), ["make it red"] * 2, [edit.picture for edit in shown], seed=1, steps=2)
        for files in ([domain], [domain, edits])
    ]
    assert all(np.abs(np.asarray(a, float) - np.asarray(b, float)).max() > 20 for a, b in zip(*results))
