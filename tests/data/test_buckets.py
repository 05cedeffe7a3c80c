# SPDX-License-Identifier: Apache-2.0
"""Buckets: the numbers of sd-scripts 0.10.1 (golden file), and sizes that fit no bucket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.data.buckets import Bucket, BucketManager, center_crop, crop_ltrb
from library.data.parts import make_parts
from library.data.records import BucketRules, DatasetConfig, Sample, SubsetConfig
from library.errors import UserError

GOLDEN = Path(__file__).parents[1] / "data_files" / "data" / "buckets.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))


def rules_of(case: dict) -> BucketRules:
    options = {key: value for key, value in case["options"].items() if key != "name"}
    return BucketRules(**options | {"resolution": tuple(options["resolution"])})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["options"]["name"])
def test_golden(case: dict) -> None:
    manager = BucketManager(rules_of(case))
    assert list(manager.adjusted_min_max or (None, None)) == case["adjusted_min_max"]
    assert [list(reso) for reso in manager.predefined] == case["predefined_resolutions"]
    used = set()
    for row in case["rows"]:
        size, bucket = (row[0], row[1]), manager.select((row[0], row[1]))
        used.add(bucket.reso)
        assert [*size, *bucket.reso, *bucket.resized, *crop_ltrb(bucket.reso, size), *center_crop(bucket)] == row
    assert [list(reso) for reso in sorted(used)] == case["final_sorted_buckets"]


NO_UPSCALE = BucketRules((512, 512), enable_bucket=True, bucket_no_upscale=True)


@pytest.mark.parametrize("size", [(63, 500), (500, 63), (40, 40), (5000, 10), (10, 5000), (100_000, 3)])
def test_size_without_bucket(size: tuple[int, int]) -> None:
    with pytest.raises(UserError) as caught:
        BucketManager(NO_UPSCALE).select(size, "folder/a.png")
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"folder/a.png: {size[0]}x{size[1]} is too small or too narrow")


def test_every_picture_without_a_bucket_is_named() -> None:
    subset = SubsetConfig("folder")
    pictures = (("a.png", (63, 500)), ("b.png", (512, 512)), ("c.png", (10, 10)), ("d.png", (300, 200)))
    samples = [Sample(name, size, "", subset, 0, 0) for name, size in pictures]
    with pytest.raises(UserError) as caught:
        make_parts([(DatasetConfig((subset,), NO_UPSCALE), samples)], 0, None)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["a.png", "c.png"]
    assert BucketManager(NO_UPSCALE).select((300, 200)) == Bucket((256, 192), (300, 200))


def test_resolution_below_one_step() -> None:
    with pytest.raises(UserError, match="32x32 is smaller than bucket_reso_steps = 64"):
        BucketManager(BucketRules((32, 32), enable_bucket=True))


def test_minimum_below_one_step_becomes_one_step() -> None:
    manager = BucketManager(BucketRules((128, 128), enable_bucket=True, min_bucket_reso=32, max_bucket_reso=200))
    assert manager.adjusted_min_max == (64, 256)
    assert manager.predefined == [(64, 192), (64, 256), (128, 128), (192, 64), (256, 64)]


def test_picture_always_covers_its_bucket() -> None:
    for rules in (BucketRules((512, 512), enable_bucket=True), NO_UPSCALE, BucketRules((768, 512))):
        manager = BucketManager(rules)
        for width in range(70, 2000, 97):
            for height in range(70, 2000, 89):
                reso, resized = manager.select((width, height))
                assert resized[0] >= reso[0] and resized[1] >= reso[1]
