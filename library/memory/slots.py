# SPDX-License-Identifier: Apache-2.0
"""How much of the device blocks take that pass through slots, and what that saves. Arithmetic only, no torch."""

from __future__ import annotations

from collections.abc import Sequence

SLOTS = 2  # that images of main memory pass through on the device: one is used while the next one arrives


def slot_bytes(sizes: Sequence[int], slots: int = SLOTS) -> int:
    """Bytes of the slots for images of these sizes, each slot as large as the largest image."""
    return min(slots, len(sizes)) * max(sizes, default=0)


def saved_bytes(sizes: Sequence[int], slots: int = SLOTS) -> int:
    """Bytes of the device that are free when weights of these sizes pass through slots, less those of the slots."""
    return sum(sizes) - slot_bytes(sizes, slots)
