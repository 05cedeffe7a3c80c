# SPDX-License-Identifier: Apache-2.0
"""Runs whose resolution changes: killed and resumed across a change, caches, the planner, metadata."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from library.errors import UserError
from library.io.state import load_state, newest_state
from tests.trainers import child
from tests.trainers.helpers import (
    DEFAULTS,
    Recorded,
    argv,
    assert_same_run,
    make_pictures,
    make_trainer,
    planned_of,
    settle,
    subset,
    train,
    write_datasets,
)
from tools.show_metadata import dataset_lines

SCHEDULE = [[0.0, 64, 2], [0.5, 128], [0.75, 192, 1]]
KILLED_IN = 3  # the last step of the first stage


def killed(values: Mapping[str, Any], output: Path) -> None:
    """A process that kills itself in the middle of a step."""
    child.redirect(output)
    settle()
    trainer = make_trainer(values)

    def look(run: Recorded) -> None:
        if run.position.step + 1 == KILLED_IN:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.each_step = look
    trainer.run()


@pytest.fixture(scope="module")
def growing(ground: Path) -> Path:
    """Five pictures in batches of 2, 3 and 1, of which two steps of two micro-batches are an epoch at first."""
    pictures = make_pictures(ground / "large", 5, size=(192, 192))
    table = {"resolution_schedule": SCHEDULE, "batch_size": 3, "subsets": [subset(pictures)]}
    return write_datasets(ground / "growing.toml", table)


def test_killed_and_resumed_across_a_change(
    sd1: Path, growing: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The steps, sizes and saves of an unbroken run; the same of one that was killed; and what its file says."""
    values: dict[str, Any] = {
        "max_train_steps": 6, "gradient_accumulation_steps": 2, "save_state": True, "cache_latents_to_disk": True,
        "cache_dir": tmp_path / "cache", "lr_scheduler": "cosine",
    }  # fmt: skip
    sizes: list[tuple[int, int]] = []

    def look(run: Recorded) -> None:
        position = run.position
        plans = run.loop.loaded.data.plan_epoch(position.epoch + 1)[position.batch : position.batch + 2]
        sizes.extend((plan.bucket[0], len(plan.samples)) for plan in plans)

    with caplog.at_level(logging.INFO):
        whole = train(sd1, growing, tmp_path / "whole", each_step=look, **values)
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if line.startswith("stage ")] == [
        "stage 1: 64x64 in batches of 2, from step 1, 3 steps = 1.5 epochs of 2 steps",
        "stage 2: 128x128 in batches of 3, from step 4, 2 steps = 2 epochs of 1 steps",
        "stage 3: 192x192 in batches of 1, from step 6, 1 steps = 0.333 epochs of 3 steps",
    ]
    assert [size for size, _ in sizes] == [64] * 5 + [128] * 4 + [192] * 2  # an epoch's last step may have one batch
    assert [count for size, count in sizes if size == 192] == [1, 1]
    assert len(whole.losses) == 6 and (whole.trainer.plan.total_epochs, whole.state.epoch) == (5, 4)

    folder, output = tmp_path / "killed", tmp_path / "output.txt"
    own = {"pretrained_model_name_or_path": sd1, "dataset_config": growing, "output_dir": folder}
    process = child.start(killed, {**DEFAULTS, **values, **own, "save_every_n_steps": 1}, output)
    assert child.exit_code(process) == -signal.SIGKILL, output.read_text(encoding="utf-8")[-3000:]
    state = newest_state(folder, "x")
    assert state is not None and load_state(state).step == KILLED_IN - 1
    resumed = train(sd1, growing, folder, resume=state, **values)
    assert_same_run(resumed, whole)
    assert resumed.losses == whole.losses[KILLED_IN - 1 :]

    (row,) = json.loads(whole.metadata["ss_datasets"])
    assert row["resolution"] == [192, 192] and whole.metadata["modelspec.resolution"] == "192x192"
    assert row["resolution_schedule"] == [[0.0, [64, 64], 2], [0.5, [128, 128], 3], [0.75, [192, 192], 1]]

    assert "    from 50% of the run: 128x128, batch size 3" in list(dataset_lines([row], 3))

    with pytest.raises(UserError, match="state of another run: stages of resolution_schedule"):
        train(sd1, growing, folder, resume=state, **{**values, "max_train_steps": 12})


def test_planner_counts_the_largest_and_caches_hold_all(sd1: Path, growing: Path, tmp_path: Path) -> None:
    values = {**DEFAULTS, "pretrained_model_name_or_path": sd1, "dataset_config": growing, "output_dir": tmp_path}
    planned = planned_of(make_trainer({**values, "max_train_steps": 8}))
    # 3 x 128 x 128 is more than 1 x 192 x 192
    assert (planned.batch.bucket, len(planned.batch.samples)) == ((128, 128), 3)
    with pytest.raises(UserError, match="3 stages do not fit into 2 steps"):
        planned_of(make_trainer({**values, "max_train_steps": 2}))


def test_command_line_and_debug_sheets(sd1: Path, tmp_path: Path) -> None:
    """The option without a dataset file: its text, its metadata, and pictures of all stages on the sheets."""
    pictures = make_pictures(tmp_path / "pictures" / "1_cat", 4, size=(128, 128))
    data = {"train_data_dir": pictures.parent, "resolution_schedule": "[[0, 64], [0.5, 128]]"}
    data |= {"caption_extension": ".txt"}
    run = train(sd1, None, tmp_path / "out", **data, max_train_epochs=2)
    assert len(run.losses) == 8 and run.metadata["ss_resolution"] == "(128, 128)"
    assert json.loads(run.metadata["ss_resolution_schedule"]) == [[0.0, [64, 64], 1], [0.5, [128, 128], 1]]
    assert "--resolution_schedule" in argv(data)
    train(sd1, None, tmp_path / "sheets", **data, debug_dataset=True)
    text = (tmp_path / "sheets" / "debug_dataset.txt").read_text(encoding="utf-8")
    assert sorted(line.split("\t")[0] for line in text.splitlines()) == sorted(
        2 * [str(p) for p in pictures.glob("*.png")]
    )
