# SPDX-License-Identifier: Apache-2.0
"""One process of two has no more batches, or is gone: both end after the same step, with what went wrong kept."""

from __future__ import annotations

from collections import deque

import pytest

from library.errors import EXIT_PROCESS_DIED, UserError
from library.trainers.feed import Feed, Steps
from library.trainers.signals import OtherProcessDied, exchanging

TOTAL = 8


def steps(fails_at: int | None = None) -> Steps:
    """Each step has no micro-batches here; the numbers of steps count from 1."""
    for step in range(1, TOTAL + 1):
        if step == fails_at:
            raise UserError(f"picture of step {step}")
        yield []


def taken_by_two(*fails_at: int | None) -> list[int]:
    """How many steps each of two processes takes when what was said in the step before counts, as in StopVote."""
    feeds = [Feed(steps(at), processes=2) for at in fails_at]
    if any(feed.failure for feed in feeds):  # told before the first step
        return [0, 0]
    sources, taken, said = [iter(feed) for feed in feeds], [0, 0], deque([False])
    while True:
        batches = [next(source, None) for source in sources]
        if all(one is None for one in batches):
            return taken
        assert None not in batches, "one process waits for the other for ever"
        taken = [count + 1 for count in taken]
        said.append(any(feed.failure for feed in feeds))
        if said.popleft():
            return taken


@pytest.mark.parametrize("fails_at", range(1, TOTAL + 1))
def test_both_stop_after_the_same_step(fails_at: int) -> None:
    """The one that fails has its batches for all of the steps until then: up to the one before the failing one."""
    assert taken_by_two(None, fails_at) == [max(0, fails_at - 1) if fails_at > 3 else 0] * 2
    assert taken_by_two(fails_at, fails_at) == taken_by_two(None, fails_at)


def test_nothing_fails() -> None:
    assert taken_by_two(None, None) == [TOTAL, TOTAL]


def test_one_process_takes_each_step_that_it_can() -> None:
    feed = Feed(steps(fails_at=4), processes=1)
    assert len(list(feed)) == 3 and str(feed.failure) == "picture of step 4"


def test_a_process_that_is_gone() -> None:
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:6214")
    with pytest.raises(OtherProcessDied) as told, exchanging(2):
        raise gone
    assert told.value.code == EXIT_PROCESS_DIED
    for processes, error in ((1, gone), (2, RuntimeError("a mistake of ours"))):
        with pytest.raises(RuntimeError) as kept, exchanging(processes):
            raise error
        assert kept.value is error
