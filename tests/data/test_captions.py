# SPDX-License-Identifier: Apache-2.0
"""Captions: the texts and splits of sd-scripts 0.10.1 (golden files), the cached variants, and what varies."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from library.data.captions import (
    cached_caption,
    caption_variant,
    caption_variants,
    final_caption,
    split_validation,
    uncacheable,
    validation_rules,
)
from library.data.records import CaptionRules

GOLDEN = Path(__file__).parents[1] / "data_files" / "data"
CASES = json.loads((GOLDEN / "captions.json").read_text(encoding="utf-8"))
SPLITS = json.loads((GOLDEN / "validation_split.json").read_text(encoding="utf-8"))
TAGS = "1girl, solo, long hair, smile, outdoors"


def caption(
    text: str, rules: CaptionRules, seed: int = 0, *, epoch: int = 1, step: int = 0, total_steps: int = 0
) -> str:
    return final_caption(text, rules, random.Random(seed), epoch=epoch, step=step, total_steps=total_steps)


def case_name(case: dict) -> str:
    counters = [f"{key}{case[key]}" for key in ("current_step", "current_epoch") if key in case]
    return "-".join([case["name"], f"seed{case['python_random_seed']}", *counters])


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_golden(case: dict) -> None:
    rng, rules = random.Random(case["python_random_seed"]), CaptionRules(**case["options"])
    counters = {
        "epoch": case.get("current_epoch", 1),
        "step": case.get("current_step", 0),
        "total_steps": case.get("max_train_steps", 0),
    }
    assert [final_caption(case["caption"], rules, rng, **counters) for _ in range(3)] == case[
        "three_successive_results"
    ]


@pytest.mark.parametrize("case", SPLITS, ids=lambda c: f"{c['n']}-{c['validation_split']}-{c['validation_seed']}")
def test_split_golden(case: dict) -> None:
    names = [f"img{i}" for i in range(case["n"])]
    train, validation = split_validation(names, case["validation_split"], case["validation_seed"])
    assert (train, validation) == (case["train"], case["val"])
    by_number = split_validation(case["n"], case["validation_split"], case["validation_seed"])
    assert [[names[i] for i in part] for part in by_number] == [train, validation]


def test_prefix_and_suffix_belong_to_the_chosen_line() -> None:
    rules = CaptionRules(enable_wildcard=True, caption_prefix="P", caption_suffix="S")
    assert {caption("one\ntwo\nthree", rules, seed) for seed in range(50)} == {"P one S", "P two S", "P three S"}


def test_wildcards_of_the_prefix_are_replaced() -> None:
    rules = CaptionRules(enable_wildcard=True, caption_prefix="{a|b}")
    assert {caption("x", rules, seed) for seed in range(50)} == {"a x", "b x"}


def test_every_n_epochs_counts_from_one() -> None:
    rules = CaptionRules(caption_dropout_every_n_epochs=2)
    assert [caption("x", rules, epoch=epoch) for epoch in (1, 2, 3, 4)] == ["x", "", "x", ""]


VARYING: list[dict[str, Any]] = [
    {"shuffle_caption": True},
    {"enable_wildcard": True},
    {"caption_dropout_rate": 0.1},
    {"caption_dropout_every_n_epochs": 2},
    {"caption_tag_dropout_rate": 0.1},
    {"token_warmup_step": 10},
]


@pytest.mark.parametrize("options", VARYING, ids=lambda options: next(iter(options)))
def test_varies(options: dict) -> None:
    rules = CaptionRules(**options)
    text = "{a|b}, c, d, e, f, g"
    assert len({caption(text, rules, s, epoch=1 + s % 2, step=s, total_steps=60) for s in range(60)}) > 1


def test_fixed_rules_do_not_vary() -> None:
    rules = CaptionRules(caption_prefix="P", caption_suffix="S", keep_tokens=2, secondary_separator=";;;")
    assert {caption("a, b;;; c", rules, s, epoch=s + 1, step=s, total_steps=9) for s in range(9)} == {"P a, b, c S"}


def test_only_token_warmup_cannot_be_cached() -> None:
    assert "token_warmup_step" in (uncacheable(CaptionRules(token_warmup_step=0.5)) or "")
    for options in VARYING[:-1]:
        assert uncacheable(CaptionRules(**options)) is None


def test_variants() -> None:
    rules = CaptionRules(shuffle_caption=True, keep_tokens=1, caption_dropout_rate=0.9)
    variants = caption_variants(TAGS, rules, 6, ("a.png", 3))
    assert variants == caption_variants(TAGS, rules, 6, ("a.png", 3))
    assert variants != caption_variants(TAGS, rules, 6, ("b.png", 3))
    assert len(variants) == 6 and len(set(variants)) > 1 and "" not in variants
    for k, variant in enumerate(variants):
        assert variant == caption_variant(TAGS, rules, k, ("a.png", 3))
        assert variant.startswith("1girl, ") and sorted(variant.split(", ")) == sorted(TAGS.split(", "))
    assert caption_variants(TAGS, CaptionRules(caption_dropout_rate=0.5), 6, ("a.png",)) == [TAGS]


def test_cached_captions_are_the_variants_and_drop_out_as_often_as_uncached_ones() -> None:
    rules = CaptionRules(shuffle_caption=True, caption_dropout_rate=0.3, caption_dropout_every_n_epochs=5)
    variants = caption_variants(TAGS, rules, 4, ("a.png",))
    seen = set()
    for seed in range(200):
        epoch = 1 + seed % 5
        text = cached_caption(TAGS, rules, 4, ("a.png",), random.Random(seed), epoch=epoch)
        assert (text == "") == (caption(TAGS, rules, seed, epoch=epoch) == "")
        seen.add(text)
    assert seen == {"", *variants}


def test_validation_rules_draw_nothing_but_wildcards() -> None:
    everything = {key: value for options in VARYING for key, value in options.items()} | {"caption_prefix": "P"}
    assert validation_rules(CaptionRules(**everything)) == CaptionRules(enable_wildcard=True, caption_prefix="P")
