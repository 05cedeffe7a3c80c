# SPDX-License-Identifier: Apache-2.0
"""Ranks by the type of a layer, found by words in its published name, for architectures with numbered blocks.

Order: the layers that are adapted at all, then the first matching type, then the selected blocks. Rank 0: no adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from library.adapters.target_spec import TargetSpec
from library.adapters.targets import DENOISER_PREFIX

Ranges = tuple[tuple[int, int], ...] | None  # of block numbers, ends included; None: all


@dataclass(frozen=True)
class TypeRanks:
    """Which layers of a denoiser get adapters, and their ranks. Text encoders have rank `dim`."""

    dim: int
    kinds: tuple[str, ...]  # prefixes of the names that are adapted, e.g. "double_blocks_"
    types: tuple[tuple[tuple[str, ...], int | None], ...] = ()  # (words of the name, rank); None: not given
    outside: Mapping[str, int] = field(default_factory=dict)  # start of the name -> rank, outside of the blocks
    blocks: Mapping[str, Ranges] = field(default_factory=dict)  # start of the name -> numbers of the blocks that learn

    def includes(self, target: TargetSpec) -> bool:
        """Whether the layer may have an adapter."""
        return target.part == "text_encoder" or short_name(target).startswith((*self.kinds, *self.outside))

    def rank(self, target: TargetSpec) -> int:
        """The rank of a layer that `includes`; 0: none."""
        if target.part == "text_encoder":
            return self.dim
        name = short_name(target)
        rank = next((rank for start, rank in self.outside.items() if name.startswith(start)), self.dim)
        by_type = [own for words, own in self.types if own is not None and all(word in name for word in words)]
        if rank and by_type:  # a layer outside of the blocks that is not asked for stays without
            rank = by_type[0]
        chosen = next((self.blocks[start] for start in self.blocks if name.startswith(start)), None)
        number = block_number(name)
        if chosen is not None and number is not None and not any(low <= number <= high for low, high in chosen):
            return 0
        return rank


def short_name(target: TargetSpec) -> str:
    """The published name with `_` for `.`, without the prefix."""
    return target.name.removeprefix(f"{DENOISER_PREFIX}_")


def block_number(name: str) -> int | None:
    """The number in `double_blocks_3_img_mod_lin`."""
    found = re.match(r"[a-z_]+_(\d+)_", name)
    return None if found is None else int(found[1])


def check_blocks(option: str, ranges: Ranges, start: str, targets: Iterable[TargetSpec]) -> list[str]:
    """Problems of a selection among the blocks whose names begin with `start`: at most one line."""
    numbers = {block_number(short_name(t)) for t in targets if short_name(t).startswith(start)} - {None}
    last = max((number for number in numbers if number is not None), default=-1)
    beyond = [high for _, high in ranges or () if high > last]
    if last < 0 or not beyond:  # without a denoiser there is nothing to select from
        return []
    return [f"--network_args: {option}: there is no block {beyond[0]}; this model has 0 to {last}"]
