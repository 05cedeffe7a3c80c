# SPDX-License-Identifier: Apache-2.0
"""Test-wide settings: one thread (tiny models lose time to more), no network, and a cache folder of its own."""

import gc
import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered of weights between runs must not come from, or go into, the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """What is alive after a module's tests stays: the collections of later runs need not look at it again."""
    yield
    gc.collect()
    gc.freeze()
