# SPDX-License-Identifier: Apache-2.0
"""The tags that a saved file says it was trained on are the tags that it was trained on."""

from __future__ import annotations

from typing import Any

import pytest

from library.data.captions import final_caption, possible_texts
from library.data.dataset import TrainingData
from library.data.records import BucketRules, CaptionRules, DatasetConfig, Sample, SubsetConfig
from library.rng import python_rng
from library.trainers.facts import tag_frequency
from library.types import Cond

RULES: dict[str, tuple[dict[str, Any], list[str], dict[str, int]]] = {
    "plain": ({}, ["Cat, red,, dog", "cat , cat"], {"cat": 3, "red": 1, "dog": 1}),
    "mark": ({"keep_tokens_separator": "|||"}, ["sks ||| red, hat ||| 8k"], {"sks": 1, "red": 1, "hat": 1, "8k": 1}),
    "secondary": ({"secondary_separator": ";;"}, ["hat;; coat, red"], {"hat": 1, "coat": 1, "red": 1}),
    "separator": ({"caption_separator": ";", "shuffle_caption": True}, ["a, b; c"], {"a, b": 1, "c": 1}),
    "wildcards": ({"enable_wildcard": True}, ["{x|y} hat, {a, b|c}"], dict.fromkeys(["x hat", "y hat", *"abc"], 1)),
    "lines": ({"enable_wildcard": True}, ["a, b\na, c"], {"a": 1, "b": 1, "c": 1}),
    "first line": ({}, ["a, b\na, c"], {"a": 1, "b": 1}),
    "prefix": ({"caption_prefix": "sks,", "caption_suffix": "art"}, ["a, b"], {"sks": 1, "a": 1, "b art": 1}),
    "kept tags": ({"caption_tag_dropout_rate": 1.0, "keep_tokens": 1}, ["a, b", "c, d"], {"a": 1, "c": 1}),
    "no caption": ({"caption_dropout_rate": 1.0}, ["a, b"], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_tags_are_those_that_are_trained(name: str) -> None:
    options, captions, expected = RULES[name]
    rules = CaptionRules(**options)
    subset = SubsetConfig("/folder", captions=rules)
    samples = [Sample(f"/folder/{n}.png", (64, 64), text, subset, 0, 0) for n, text in enumerate(captions)]
    assert tag_frequency(samples, lambda s: possible_texts(s.caption, rules)) == {"/folder": expected}
    seen: set[str] = set()
    for seed in range(60):
        for sample in samples:
            text = final_caption(sample.caption, rules, python_rng(seed), epoch=1, step=0, total_steps=1)
            seen |= {tag.strip().lower() for tag in text.split(rules.caption_separator) if tag.strip()}
    assert seen == set(expected)


def test_pictures_that_are_not_trained_are_not_counted() -> None:
    """Those that are held out for validation, and regularisation pictures beyond the number that is used."""
    subset, reg = SubsetConfig("/folder"), SubsetConfig("/reg", is_reg=True)
    samples = [Sample(f"/folder/{n}.png", (64, 64), f"cat, {n}", subset, 0, 0) for n in range(10)]
    samples += [Sample(f"/reg/{n}.png", (64, 64), "thing", reg, 0, 0) for n in range(20)]
    data = TrainingData([(DatasetConfig((subset, reg), BucketRules((64, 64)), validation_split=0.2), samples)], seed=1)
    (pairs,) = data.trained()
    tags = tag_frequency([sample for sample, _ in pairs], data.trained_texts)
    assert tags["/reg"] == {"thing": 8}
    assert tags["/folder"].pop("cat") == 8 and sorted(tags["/folder"].values()) == [1] * 8


class NoTexts:
    """A cache of text outputs that nothing is read from."""

    def get(self, caption: str) -> Cond:
        return {}


@pytest.mark.parametrize(
    ("caption", "options"),
    [
        ("{" + "|".join("abcdefghij") + "}, x", {"enable_wildcard": True}),
        ("a, b, c, d, e, f, g, h", {"caption_tag_dropout_rate": 0.8, "shuffle_caption": True}),
        ("a, b, c, d, e, f, g, h", {"shuffle_caption": True}),
    ],
)
def test_with_cached_texts_what_is_in_the_cache_is_counted(caption: str, options: dict[str, Any]) -> None:
    subset = SubsetConfig("/folder", captions=CaptionRules(**options))
    sample = Sample("/folder/0.png", (64, 64), caption, subset, 0, 0)
    config = DatasetConfig((subset,), BucketRules((64, 64)))
    data = TrainingData([(config, [sample])], seed=1, text_variants=3)
    data = data.prepared(texts=NoTexts(), join=lambda conds: {})
    cached = {tag for text in dict.fromkeys(data.texts_of()) for tag in text.caption.split(", ") if tag}
    assert set(tag_frequency([sample], data.trained_texts)["/folder"]) == cached
