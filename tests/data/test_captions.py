# SPDX-License-Identifier: Apache-2.0
"""Captions: the texts and splits of sd-scripts 0.10.1 (golden files), the cached variants, and what varies."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from library.data.captions import (
    cached_caption,
    caption_variants,
    compose,
    final_caption,
    lost_choices,
    possible_texts,
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


# Where sd-scripts trains its own marks, or joins with a comma what it split at something else (docs/differences.md)
OURS = {
    "sep_no_shuffle_stays": lambda theirs: "chr, cls, blue eyes, hat, smile, gloves, best quality, 8k",
    "separator_dot": lambda theirs: theirs.replace(",", "."),
}


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_golden(case: dict) -> None:
    rng, rules = random.Random(case["python_random_seed"]), CaptionRules(**case["options"])
    counters = {
        "epoch": case.get("current_epoch", 1),
        "step": case.get("current_step", 0),
        "total_steps": case.get("max_train_steps", 0),
    }
    ours = OURS.get(case["name"], lambda theirs: theirs)
    expected = [ours(text) for text in case["three_successive_results"]]
    assert [final_caption(case["caption"], rules, rng, **counters) for _ in range(3)] == expected


@pytest.mark.parametrize("case", SPLITS, ids=lambda c: f"{c['n']}-{c['validation_split']}-{c['validation_seed']}")
def test_split_golden(case: dict) -> None:
    """The pictures that sd-scripts holds out; it trains some of them as well."""
    names = [f"img{i}" for i in range(case["n"])]
    train, validation = split_validation(names, case["validation_split"], case["validation_seed"])
    assert validation == case["val"] and train == [name for name in case["train"] if name not in validation]
    by_number = split_validation(case["n"], case["validation_split"], case["validation_seed"])
    assert [[names[i] for i in part] for part in by_number] == [train, validation]


def test_a_split_trains_or_holds_out_each_picture() -> None:
    for n in range(1, 60):
        for split in (0.01, 0.05, 0.07, 0.1, 0.125, 0.15, 0.2, 0.25, 1 / 3, 0.3, 0.5, 0.55, 0.66, 0.9, 0.99):
            train, validation = split_validation(n, split, n)
            assert sorted(train + validation) == list(range(n)), (n, split)
            assert abs(len(validation) - n * split) <= 0.5


# ---- marks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", ".", ", ", "|", " and ", "、"])
@pytest.mark.parametrize("marks", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"shuffle_caption": True}, {"caption_tag_dropout_rate": 0.3}, {"token_warmup_step": 9}, {"keep_tokens": 1}],
    ids=str,
)
def test_marks_are_never_trained_and_parts_are_joined_with_their_separator(
    separator: str, marks: int, options: dict
) -> None:
    """In training, in validation, and where captions are cached."""
    words = ["one", "two;;;2", "three", "four"]
    joints = ["<KEEP>"] * marks + [separator] * (3 - marks)
    text = words[0] + "".join(joint + word for joint, word in zip(joints, words[1:]))
    rules = CaptionRules(
        **options, caption_separator=separator, keep_tokens_separator="<KEEP>", secondary_separator=";;;"
    )
    checked = [caption(text, rules, seed, step=seed, total_steps=9) for seed in range(10)]
    if not options.get("token_warmup_step"):
        checked += [*caption_variants(text, rules, 3, ("a",)), *caption_variants(text, rules, 999, ("a",))]
    still = validation_rules(rules)
    checked += [compose(text, still, random.Random(0), step=0, total_steps=0), *possible_texts(text, rules)]
    for found in checked:
        parts = [part.strip() for part in found.split(separator)] if found else []
        assert set(parts) <= {"one", "two", "2", "three", "four"} and len(set(parts)) == len(parts), found
        assert ("two" in parts) == ("2" in parts)
    if "," not in separator:
        assert not any("," in found for found in checked)
    (whole,) = possible_texts(text, rules)
    assert [part.strip() for part in whole.split(separator)] == ["one", "two", "2", "three", "four"]


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


OUTCOMES: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "one": ("x, y", {"caption_dropout_rate": 0.5}, {"x, y": 1}),
    "lines": ("x\ny\nz", {"enable_wildcard": True}, {"x": 1 / 3, "y": 1 / 3, "z": 1 / 3}),
    "a line twice": ("x\ny\nx", {"enable_wildcard": True}, {"x": 2 / 3, "y": 1 / 3}),
    "wildcard": ("a {b|c} d", {"enable_wildcard": True, "caption_prefix": "P"}, {"P a b d": 1 / 2, "P a c d": 1 / 2}),
    "of one line": ("{a|b|a|a}\nz", {"enable_wildcard": True}, {"a": 3 / 8, "b": 1 / 8, "z": 1 / 2}),
    "the same text": ("{a|ab}{bc|c}", {"enable_wildcard": True}, {"abc": 1 / 2, "ac": 1 / 4, "abbc": 1 / 4}),
    "shuffle": ("k, a, b", {"shuffle_caption": True, "keep_tokens": 1}, {"k, a, b": 1 / 2, "k, b, a": 1 / 2}),
    "shuffle of equals": ("a, b, a", {"shuffle_caption": True}, {"a, b, a": 1 / 3, "a, a, b": 1 / 3, "b, a, a": 1 / 3}),
    "tag dropout": ("a, b", {"caption_tag_dropout_rate": 0.25}, {"a, b": 9 / 16, "a": 3 / 16, "b": 3 / 16, "": 1 / 16}),
    "both": (
        "a, b",
        {"caption_tag_dropout_rate": 0.5, "shuffle_caption": True},
        {"a, b": 1 / 8, "b, a": 1 / 8, "a": 1 / 4, "b": 1 / 4, "": 1 / 4},
    ),
    "no tag left": (TAGS, {"caption_tag_dropout_rate": 1.0, "shuffle_caption": True, "keep_tokens": 1}, {"1girl": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTCOMES)
def test_all_outcomes_are_variants_with_their_probabilities(name: str) -> None:
    text, options, expected = OUTCOMES[name]
    rules = CaptionRules(**options)
    for n in (len(expected), len(expected) + 5):
        variants = caption_variants(text, rules, n, ("a.png", 3))
        assert variants == pytest.approx(expected)
    fewer = caption_variants(text, rules, max(1, len(expected) - 1), ("a.png", 3))
    assert fewer.keys() <= expected.keys() and sum(fewer.values()) == pytest.approx(1)
    drawn = Counter(caption(text, replace(rules, caption_dropout_rate=0.0), seed) for seed in range(2000))
    assert drawn.keys() == expected.keys()  # what is trained without a cache, as often
    for found, chance in expected.items():
        assert drawn[found] / 2000 == pytest.approx(chance, abs=0.05)


def test_variants_come_in_one_order_in_every_process() -> None:
    """A draw picks by place, and the hash of a text is another one in every process."""
    rules = CaptionRules(shuffle_caption=True, caption_tag_dropout_rate=0.5)
    assert list(caption_variants("a, b", rules, 8, ("x",))) == ["a, b", "a", "b", "", "b, a"]
    lines = list(caption_variants("c, d\n{a|b}", CaptionRules(enable_wildcard=True, shuffle_caption=True), 8, ("x",)))
    assert lines == ["c, d", "d, c", "a", "b"]
    seen = [cached_caption(TAGS, rules, 8, ("x",), random.Random(seed), epoch=1) for seed in range(40)]
    assert set(seen) == set(caption_variants(TAGS, rules, 8, ("x",)))


@pytest.mark.parametrize("n", [1, 2, 3, 8, 30])
@pytest.mark.parametrize("lines", [1, 2, 4, 7, 12])
def test_every_line_and_every_choice_is_among_the_variants(lines: int, n: int) -> None:
    """Each line has its probability, however many texts stand for it; the odd ones here have one text only."""
    rules = CaptionRules(enable_wildcard=True, shuffle_caption=True, keep_tokens=1)
    each = [f"l{line}" if line % 2 else f"l{line}, " + "{c0|c1|c2}, u, v, w, x" for line in range(lines)]
    variants = caption_variants("\n".join(each), rules, n, ("a.png",))
    assert len(variants) <= max(n, lines) and variants == caption_variants("\n".join(each), rules, n, ("a.png",))
    assert variants != caption_variants("\n".join(each), rules, n, ("b.png",))
    share: dict[str, float] = {}
    choices: dict[str, set[str]] = {}
    for text, chance in variants.items():
        first = text.split(", ")[0]
        share[first] = share.get(first, 0) + chance
        choices.setdefault(first, set()).update({"c0", "c1", "c2"} & set(text.split(", ")))
    assert share == pytest.approx({f"l{line}": 1 / lines for line in range(lines)})
    missing = any(len(choices[f"l{line}"]) < 3 for line in range(0, lines, 2))
    assert lost_choices("\n".join(each), rules, n) == (3 if missing else 0)


def test_outcomes_without_end_are_not_counted() -> None:
    """A caption of 3^60 outcomes, one whose parts have 40! orders, and one that is always the same."""
    many = CaptionRules(enable_wildcard=True, shuffle_caption=True, caption_tag_dropout_rate=0.1)
    texts = [", ".join(["{a|b|c}"] * 60), ", ".join(map(str, range(40))), "{" + "|".join(map(str, range(9999))) + "}"]
    for text in texts:
        assert len(caption_variants(text, many, 8, ("a",))) <= 8
        assert possible_texts(text, many)
    same = CaptionRules(enable_wildcard=True, shuffle_caption=True)
    assert caption_variants(", ".join(["{a|a|a}"] * 40), same, 8, ("a",)) == pytest.approx({", ".join(["a"] * 40): 1})


def test_possible_texts_hold_all_that_may_be_trained() -> None:
    rules = CaptionRules(enable_wildcard=True, caption_prefix="P,", caption_suffix=", S", shuffle_caption=True)
    assert possible_texts("a {x|y}\nb", rules) == ["P, a x, S", "P, a y, S", "P, b, S"]
    assert possible_texts("a {x|y}\nb", CaptionRules()) == ["a {x|y}"]
    wide = ", ".join("{" + "|".join(f"{place}-{k}" for k in range(3 + place)) + "}" for place in range(6))
    parts = {part for text in possible_texts(wide, CaptionRules(enable_wildcard=True)) for part in text.split(", ")}
    assert parts == {f"{place}-{k}" for place in range(6) for k in range(3 + place)}
    never = [{"caption_dropout_rate": 1.0}, {"caption_dropout_every_n_epochs": 1}, {"caption_tag_dropout_rate": 1.0}]
    assert [possible_texts("a, b", CaptionRules(**options)) for options in never] == [[""]] * 3


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
