# SPDX-License-Identifier: Apache-2.0
"""Sequences without storage of their own: a concatenation, and items that are made on demand."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain
from typing import TypeVar, overload

T = TypeVar("T")


class Joined(Sequence[T]):
    """Concatenation of sequences."""

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


class Made(Sequence[T]):
    """A sequence whose items are made on demand. make: number -> item."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self.places, self.make = range(count), make

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, which: int) -> T: ...
    @overload
    def __getitem__(self, which: slice) -> Sequence[T]: ...
    def __getitem__(self, which: int | slice) -> T | Sequence[T]:
        places = self.places[which]
        return [self.make(place) for place in places] if isinstance(places, range) else self.make(places)


def place_in(ends: Sequence[int], number: int) -> tuple[int, int]:
    """(part, index in the part) of item `number`. ends: cumulative lengths of the parts."""
    part = bisect_right(ends, number)
    return part, number - (ends[part - 1] if part else 0)
