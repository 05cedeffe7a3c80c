# SPDX-License-Identifier: Apache-2.0
"""Models and pictures for training tests, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_tiny_sd
from tests.trainers.helpers import make_pictures, subset, write_dataset


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what all tests share."""
    return tmp_path_factory.mktemp("ground")


@pytest.fixture(scope="session")
def sd1(ground: Path) -> Path:
    return make_tiny_sd(ground / "sd1", version=1)


@pytest.fixture(scope="session")
def sd2(ground: Path) -> Path:
    return make_tiny_sd(ground / "sd2", version=2, v_prediction=True)


@pytest.fixture(scope="session")
def pictures(ground: Path) -> Path:
    """Five pictures of 64 x 64 with captions."""
    return make_pictures(ground / "pictures", 5)


@pytest.fixture(scope="session")
def dataset(ground: Path, pictures: Path) -> Path:
    """Three batches an epoch; the last holds one picture."""
    return write_dataset(ground / "dataset.toml", subset(pictures))
