# SPDX-License-Identifier: Apache-2.0
"""Device memory of weights that share slots, and how much that saves. Arithmetic only, without torch."""

from __future__ import annotations

from collections.abc import Sequence

SLOTS = 2  # buffers on the device for images from main memory: one is in use while the next image arrives


def slot_bytes(sizes: Sequence[int], slots: int = SLOTS) -> int:
    """Bytes of the slots for images of these sizes in bytes. Each slot is as large as the largest image."""
    return min(slots, len(sizes)) * max(sizes, default=0)


def saved_bytes(sizes: Sequence[int], slots: int = SLOTS) -> int:
    """Bytes of device memory saved when weights of these sizes in bytes share slots."""
    return sum(sizes) - slot_bytes(sizes, slots)
