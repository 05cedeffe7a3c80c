# SPDX-License-Identifier: Apache-2.0
"""For pytest: the simulated card in a test run, workers of xdist included.

    python -m pytest -p tests.cuda_simulation.plugin tests/on_card

Where it cannot be had, the tests of tests/on_card are skipped and say why.
"""

from __future__ import annotations

import pytest

from tests.cuda_simulation.build import CannotSimulate
from tests.cuda_simulation.simulate import simulate

MISSING = pytest.StashKey[str]()  # of pytest's configuration: why there is no simulated card


def _attempt() -> str | None:
    """Turn it on; the reason where that cannot be."""
    try:
        simulate()
    except CannotSimulate as error:
        return str(error)
    return None


_reason = _attempt()  # now: pytest imports this before conftest.py imports torch


def pytest_configure(config: pytest.Config) -> None:
    if _reason is not None:
        config.stash[MISSING] = _reason
