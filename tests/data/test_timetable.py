# SPDX-License-Identifier: Apache-2.0
"""Timetables of resolutions: reading, refusals, the datasets and the stages that follow from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from library.data.config import load_dataset_config
from library.data.dataset import TrainingData
from library.data.options import DataOptions, parse_schedule
from library.data.scan import scan
from library.data.timetable import make_stages
from library.errors import UserError
from tests.trainers.helpers import make_pictures, subset, write_datasets

THREE = [[0.0, 64, 4], [0.5, 96], [0.75, 128, 1]]


def load(tmp_path: Path, *datasets: dict[str, Any], **options: Any) -> TrainingData:
    pictures = make_pictures(tmp_path / "pictures", 6, size=(160, 160))
    tables = [{"batch_size": 2, **table, "subsets": [subset(pictures)]} for table in datasets]
    file = write_datasets(tmp_path / "data.toml", *tables)
    configs = load_dataset_config(DataOptions(dataset_config=str(file), **options), bucket_step=8)
    found = scan(configs)
    return TrainingData([(dataset.config, dataset.samples) for dataset in found.datasets], seed=1)


def test_each_stage_has_its_size(tmp_path: Path) -> None:
    """Two datasets with timetables of their own, a third at one size; each stage plans with what is then its size."""
    data = load(
        tmp_path, {"resolution_schedule": THREE, "validation_split": 0.4},
        {"resolution_schedule": [[0, [64, 32]], [0.6, 64]]}, {"resolution": 32},
    )  # fmt: skip
    assert data.shares == (0.0, 0.5, 0.6, 0.75)
    sizes = [[(c.buckets.resolution, c.batch_size) for c in data.stage_sizes(k)] for k in range(4)]
    assert sizes[0] == [((64, 64), 4), ((64, 32), 2), ((32, 32), 2)]
    assert sizes[2] == [((96, 96), 2), ((64, 64), 2), ((32, 32), 2)] and sizes[3][0] == ((128, 128), 1)
    for number in range(4):
        plans = data.plan_epoch(1, stage=number)
        assert len(plans) == data.batches_per_epoch[number]
        for plan in plans:
            (size, batch) = sizes[number][plan.dataset]
            assert plan.bucket == size and len(plan.samples) <= batch and plan.stage == number
            assert data.load(plan, step=0).pixels.shape[2:] == size[::-1]  # type: ignore[union-attr]
    assert {plan.bucket for plan in data.validation_plans()} == {(128, 128)}
    assert max(plan.bucket for plan in data.each_shape()) == (128, 128)
    # every picture once per size; those that a dataset holds out are nowhere trained
    jobs = [(job.sample.path, job.bucket.reso) for job in data.encoding_jobs()]
    assert len(jobs) == len(set(jobs))
    assert {size for _, size in jobs} == {(64, 64), (96, 96), (128, 128), (64, 32), (32, 32)}
    assert len([size for _, size in jobs if size == (128, 128)]) == 6  # 4 are trained, 2 for validation
    assert len([size for _, size in jobs if size == (96, 96)]) == 4
    alone = load(tmp_path, {"resolution": 128})
    assert sorted(text.caption for text in alone.texts_of()) == sorted(
        text.caption for text in load(tmp_path, {"resolution_schedule": THREE}).texts_of()
    )


def test_positions_are_unique_in_the_run(tmp_path: Path) -> None:
    data = load(tmp_path, {"resolution_schedule": THREE})
    stages = make_stages(data.shares, data.batches_per_epoch, per_step=1, max_steps=20, max_epochs=None)
    assert [(s.first_step, s.steps, s.first_epoch, s.epochs) for s in stages] == [
        (0, 10, 0, 5), (10, 5, 5, 2), (15, 5, 7, 1),
    ]  # fmt: skip
    data = data.prepared(total_steps=20, stages=stages)
    plans = [plan for epoch in range(1, 9) for plan in data.plan_epoch(epoch)]
    assert [data.plan_epoch(epoch)[0].stage for epoch in range(1, 9)] == [0] * 5 + [1] * 2 + [2]
    assert [data.load(plan, step=0).position for plan in plans] == [*range(5 * 2 + 2 * 3 + 6)]


def test_epochs_are_whole_where_the_run_is_given_in_epochs() -> None:
    stages = make_stages((0, 0.5, 0.8), (10, 20, 40), per_step=3, max_steps=9, max_epochs=5)
    assert [(s.first_step, s.steps, s.first_epoch, s.epochs) for s in stages] == [
        (0, 12, 0, 3), (12, 7, 3, 1), (19, 14, 4, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "epochs", "said"), [(2, None, "3 stages do not fit into 2 steps"), (9, 2, "2 epochs")]
)
def test_more_stages_than_steps(steps: int, epochs: int | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_stages((0, 0.5, 0.8), (4, 4, 4), per_step=1, max_steps=steps, max_epochs=epochs)


def test_the_narrower_table_wins_and_the_largest_size_stands_for_the_dataset(tmp_path: Path) -> None:
    """A dataset's one resolution wins over the command line's timetable, and a timetable over its resolution."""
    data = load(tmp_path, {"resolution": 32}, {}, resolution_schedule=json.dumps([[0, 64], [0.5, 32]]))
    assert [c.buckets.resolution for c in data.stage_sizes(0)] == [(32, 32), (64, 64)]
    assert [c.buckets.resolution for c in data.stage_sizes(1)] == [(32, 32), (32, 32)]
    assert [dict(stats.buckets) for stats in data.stats()] == [{(32, 32): 6}, {(64, 64): 6}]
    data = load(tmp_path, {"resolution_schedule": THREE}, resolution=(512, 512))
    assert data.stage_sizes(2)[0].buckets.resolution == (128, 128)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([[0, 64], [0.5, 96], [0.5, 128]], "must have rising shares, got 0.5 after 0.5"),
        ([[0.1, 64]], "must begin at share 0 of the run, got 0.1"),
        ([[0, 64], [1, 96]], "shares below 1"),
        ([[0, 64], [1.5, 96]], "shares of the run between 0 and 1, got 1.5"),
        ([[0, 4]], "must be between 8 and 65535"),
        ([[0, 64, 0]], "a whole batch size above 0 at share 0"),
        ([[0, 64, 1, 1]], r"\[share, resolution, batch size\]"),
        ([], "expects entries such as"),
        ("0:64", "expects entries such as"),
        ([[0, None]], "expects a resolution at share 0"),
        ([["x", 64]], "shares of the run between 0 and 1"),
    ],
)
def test_refused_entries(value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_schedule(value)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"resolution_schedule": [[0, 64], [0.5, 100]]}, "100x100 is not a multiple of 8.*nearest is 96x96"),
        ({"resolution_schedule": THREE, "resolution": 64}, "resolution 64x64 contradicts.*largest is 128x128"),
        ({"resolution_schedule": [[0, 64], [0.5, 256]], "enable_bucket": True}, "give at most 64"),
        ({"resolution_schedule": [[0.5, 64]]}, "must begin at share 0"),
    ],
)
def test_refused_datasets(table: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as told:
        load(tmp_path, table)
    assert len(told.value.problems) == 1 and "datasets[0]: " in told.value.problems[0]


def test_the_recipe(tmp_path: Path) -> None:
    recipe = (Path(__file__).parents[2] / "configs" / "dataset_resolutions.toml").read_text(encoding="utf-8")
    pictures = make_pictures(tmp_path / "pictures", 2)
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.replace("pictures/my_character", pictures.as_posix()), encoding="utf-8")
    (dataset,) = load_dataset_config(DataOptions(dataset_config=str(file)), bucket_step=64)
    sizes = [(config.buckets.resolution[0], config.batch_size) for config in dataset.sizes]
    assert sizes == [(512, 8), (768, 4), (1024, 2)] and (dataset.batch_size, dataset.main_size) == (2, 2)
