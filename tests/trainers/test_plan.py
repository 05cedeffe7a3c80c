# SPDX-License-Identifier: Apache-2.0
"""Epochs and steps: arithmetic of the plan, positions, shares of several processes."""

from __future__ import annotations

import math
import os

import pytest

from library.data.options import DataOptions
from library.errors import UserError
from library.io.state import StateParts
from library.trainers.options import DistributedOptions
from library.trainers.resume import as_of_now
from library.trainers.run_plan import RunPlan, make_plan, share_of
from library.trainers.settings import distributed_settings, loading_processes
from library.types import Position


def plan(**values: object) -> RunPlan:
    given = {
        "total_batches": [10],
        "num_processes": 1,
        "accumulation": 1,
        "max_steps": 25,
        "max_epochs": None,
        "seed": 1,
    }
    return make_plan(**{**given, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batches", "processes", "accumulation", "steps_per_epoch"),
    [
        (10, 1, 1, 10), (10, 1, 3, 4), (10, 2, 1, 5), (11, 2, 1, 6), (11, 2, 4, 2), (3, 1, 8, 1), (1, 4, 1, 1),
    ],
)  # fmt: skip
def test_steps_of_an_epoch(batches: int, processes: int, accumulation: int, steps_per_epoch: int) -> None:
    made = plan(total_batches=[batches], num_processes=processes, accumulation=accumulation)
    assert (made.batches_per_epoch, made.steps_per_epoch) == (batches, steps_per_epoch)
    alone = plan(total_batches=[batches], accumulation=accumulation * processes)
    assert [*made.groups(0, 0)] == [*alone.groups(0, 0)]  # a step has the same batches, whoever takes them


def test_epochs_win_over_steps() -> None:
    assert plan().total_steps == 25 and plan().total_epochs == 3
    assert plan(max_epochs=4).total_steps == 40 and plan(max_epochs=4).total_epochs == 4
    assert plan(max_epochs=2, accumulation=3).total_steps == 8
    assert plan(max_steps=20).total_epochs == 2


def test_empty_dataset_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no batch to train on"):
        plan(total_batches=[0])


@pytest.mark.parametrize("accumulation", [1, 3, 4, 20])
def test_groups_and_positions_agree(accumulation: int) -> None:
    """Walking through the groups of all epochs, the position before each step is `position_of` that step."""
    made = plan(accumulation=accumulation, max_steps=3 * math.ceil(10 / accumulation))
    step = 0
    for epoch in range(3):
        for group in made.groups(epoch, 0):
            assert made.position_of(step) == Position(step, epoch, group.start)
            assert next(iter(made.groups(epoch, group.start))) == group  # a resumed epoch goes on with the same group
            step += 1
    assert step == made.total_steps


def test_shares_are_disjoint_and_of_one_length() -> None:
    for count in range(1, 12):
        for world in range(1, 5):
            shares = [list(share_of(range(count), rank, world)) for rank in range(world)]
            assert {len(share) for share in shares} == {math.ceil(count / world)}
            assert set().union(*shares) == set(range(count))
            extra = sum(map(len, shares)) - count
            assert extra == -count % world  # no more is done twice than evenness asks for


def test_loading_processes_are_no_more_than_cores() -> None:
    cores = os.cpu_count() or 1
    assert loading_processes(DataOptions(max_data_loader_n_workers=10_000)) == cores
    assert loading_processes(DataOptions(max_data_loader_n_workers=0)) == 0


def test_deepspeed_is_told_what_it_does_itself() -> None:
    options = DistributedOptions(deepspeed=True, zero_stage=3, ddp_timeout=5)
    settings = distributed_settings(options, max_grad_norm=0.5, batch_size=3)
    assert (settings.timeout_minutes, settings.batch_size) == (5, 3)
    given = {k: settings.deepspeed[k] for k in ("zero_stage", "gradient_clipping", "gradient_accumulation_steps")}
    assert given == {"zero_stage": 3, "gradient_clipping": 0.5, "gradient_accumulation_steps": 1}
    assert distributed_settings(DistributedOptions(), max_grad_norm=1.0, batch_size=1).deepspeed == {}


def test_states_that_counted_the_batches_of_one_process() -> None:
    facts = {"seed": 1, "processes": 2, "--gradient_accumulation_steps": 3, "batches per epoch": 5}
    state = as_of_now(StateParts({}, step=3, epoch=1, batch=2, fingerprint=facts))
    now = {"seed": 1, "--gradient_accumulation_steps x processes": 6, "batches per epoch": 10}
    assert (state.batch, state.fingerprint) == (4, now)
    assert as_of_now(state) is state
