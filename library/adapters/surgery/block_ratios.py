# SPDX-License-Identifier: Apache-2.0
"""Ratios per block for merging (--lbws): one number for the text encoder and one for each U-Net block with a LoRA.

The long list is BASE, IN00 ... IN11, MID, OUT00 ... OUT11, blocks numbered as in the published U-Net. Shorter lists
leave out blocks that have no LoRA by default; a layer outside of the list is merged at the ratio alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

BASE, FIRST_IN, MID, FIRST_OUT, COUNT = 0, 1, 13, 14, 26
SD_PLACE = re.compile(r"lora_unet_(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_")
XL_PLACE = re.compile(r"lora_unet_(input|output)_blocks_(\d+)_")


def _in(*numbers: int) -> list[int]:
    return [FIRST_IN + n for n in numbers]


def _out(*numbers: int) -> list[int]:
    return [FIRST_OUT + n for n in numbers]


# length of a list -> the places in the long list
PLACES: dict[int, list[int]] = {
    12: [BASE, *_in(4, 5, 7, 8), MID, *_out(*range(6))],
    17: [BASE, *_in(1, 2, 4, 5, 7, 8), MID, *_out(*range(3, 12))],
    20: [BASE, *_in(*range(9)), MID, *_out(*range(9))],
    26: [*range(COUNT)],
}


def place_of(name: str) -> int | None:
    """Index of a layer in the long list, by its kohya name; None outside of it."""
    if name.startswith("lora_te"):
        return BASE
    if name.startswith(("lora_unet_mid_block_", "lora_unet_middle_block_")):
        return MID
    found = XL_PLACE.match(name)
    if found is not None:
        return (FIRST_IN if found[1] == "input" else FIRST_OUT) + int(found[2])
    found = SD_PLACE.match(name)
    if found is None:
        return None
    level, within = int(found[2]), 2 if found[3].endswith("samplers") else int(found[4])
    return (FIRST_IN + 1 if found[1] == "down" else FIRST_OUT) + 3 * level + within


def strengths(ratio: float, numbers: Sequence[float] | None) -> Callable[[str], float]:
    """Layer -> strength at which it is merged: the ratio, times the number of its block if there is one."""
    if numbers is None:
        return lambda name: ratio
    by_place = dict(zip(PLACES[len(numbers)], numbers))

    def strength(name: str) -> float:
        place = place_of(name)
        return ratio * by_place.get(place, 1.0) if place is not None else ratio

    return strength
