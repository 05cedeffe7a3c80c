# SPDX-License-Identifier: Apache-2.0
"""Rows of the table of faults (tests/trainers/faults.py) that a program without care for them would not survive."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.errors import EXIT_PROCESS_DIED
from tests.trainers import child
from tests.trainers.faults import outcome, rank_with_fault
from tests.trainers.helpers import DEFAULTS


def test_a_preview_that_fails_in_one_process_is_only_a_warning(sd1: Path, ground: Path) -> None:
    """Every step saves, too: of weights that are split over processes, the second save reads less than the first."""
    found = outcome("`--shard_base`: a preview fails between passes", 1, sd1, ground)
    assert found.codes == [0, 0] and found.states[-1] == 6 and found.half_written == []
    (line,) = found.told[0]
    assert "1 of 1 previews failed at step 3, the training goes on" in line and "another process failed" in line


def test_a_process_that_fails_inside_a_pass_releases_the_other(sd1: Path, ground: Path) -> None:
    found = outcome("`--shard_base`: a preview fails inside a pass", 1, sd1, ground)
    assert found.codes == [EXIT_PROCESS_DIED] * 2 and found.seconds < 40 and found.half_written == []
    assert found.states[-1] >= 2
    line = "error: process 1 failed while the others waited for it: RuntimeError: a mistake in the program"
    assert found.told[1] == [line]


@pytest.mark.parametrize("asked", ["plan", "debug_dataset"])
def test_what_is_only_printed_is_printed_once(asked: str, sd1: Path, dataset: Path, tmp_path: Path) -> None:
    values = {**DEFAULTS, "pretrained_model_name_or_path": sd1, "dataset_config": dataset, "output_dir": tmp_path}
    (port,) = child.free_ports(1)
    both = [child.start(rank_with_fault, r, port, {**values, asked: True}, None, tmp_path) for r in (0, 1)]
    assert [child.exit_code(process) for process in both] == [0, 0]
    first, second = ((tmp_path / f"{rank}.log").read_text(encoding="utf-8") for rank in (0, 1))
    sign = "GB" if asked == "plan" else "--debug_dataset: wrote"
    assert sign in first and sign not in second
