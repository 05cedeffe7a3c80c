# SPDX-License-Identifier: Apache-2.0
"""Several sequences as one, without a copy."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import TypeVar, overload

T = TypeVar("T")


class Joined(Sequence[T]):
    """The items of all parts, one part after the other."""

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self.parts = [part for part in parts if part]
        self.ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, which: int) -> T: ...
    @overload
    def __getitem__(self, which: slice) -> Sequence[T]: ...
    def __getitem__(self, which: int | slice) -> T | Sequence[T]:
        places = range(len(self))[which]
        if isinstance(places, range):
            return [self[place] for place in places]
        part, place = place_in(self.ends, places)
        return self.parts[part][place]

    def __iter__(self) -> Iterator[T]:
        return chain.from_iterable(self.parts)


def place_in(ends: Sequence[int], number: int) -> tuple[int, int]:
    """(part, place in it) of an item of parts that end before the items `ends`."""
    part = bisect_right(ends, number)
    return part, number - (ends[part - 1] if part else 0)
