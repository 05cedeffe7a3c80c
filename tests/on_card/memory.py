# SPDX-License-Identifier: Apache-2.0
"""The card's memory, for tests."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def limited(bytes_: int) -> Iterator[None]:
    """A card that refuses this process more than `bytes_`, as a smaller one would: torch.OutOfMemoryError."""
    device = torch.cuda.current_device()
    settle()
    torch.cuda.set_per_process_memory_fraction(bytes_ / torch.cuda.get_device_properties(device).total_memory, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextlib.contextmanager
def peak_of() -> Iterator[list[int]]:
    """Append the most bytes that were in use at once within it."""
    settle()
    torch.cuda.reset_peak_memory_stats()
    found: list[int] = []
    yield found
    found.append(torch.cuda.max_memory_allocated())


def settle() -> None:
    """Free what nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()
