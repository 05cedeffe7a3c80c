# SPDX-License-Identifier: Apache-2.0
"""Skips all of this folder where there is no CUDA device; what needs the simulated one, where there is a real one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.cuda_simulation.plugin import MISSING
from tests.cuda_simulation.simulate import is_simulated
from tests.trainers.conftest import dataset, ground, pictures, sd1  # noqa: F401  (fixtures)

NO_CARD = "needs a CUDA device, or the simulated one: python -m pytest -p tests.cuda_simulation.plugin tests/on_card"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if not torch.cuda.is_available():
        pytest.skip(item.config.stash.get(MISSING, NO_CARD))
    if item.get_closest_marker("simulated") and not is_simulated():
        pytest.skip("needs the simulated card")


@pytest.fixture(autouse=True)
def whole_card() -> Iterator[None]:
    """A test that limits the card's memory, or has its host not wait, does so for itself alone."""
    yield
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.set_per_process_memory_fraction(1.0)
