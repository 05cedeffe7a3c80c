# SPDX-License-Identifier: Apache-2.0
"""Damaged copies of a file's bytes, always the same ones: what readers are tried with."""

from __future__ import annotations

from collections.abc import Iterator

from library.rng import python_rng

INTERESTING = (
    b"\0",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff" * 8,
    b"\0" * 16,
    b"(" * 64,
    b"-1",
    b"1e999",
    b"null",
    b"\xe2\x28",
)


def damaged_copies(whole: bytes, count: int, seed: str) -> Iterator[bytes]:
    """Bits flipped, bytes overwritten, cut, repeated, moved, left out; also empty and noise."""
    rng = python_rng("damage", seed)
    for number in range(count):
        data = bytearray(whole)
        place, other = sorted(rng.randrange(len(whole) + 1) for _ in range(2))
        kind = number % 8
        if kind == 0:
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            value = rng.choice(INTERESTING)
            data[place : place + len(value)] = value
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            data[place:other] = b""
        elif kind == 4:
            data[place:place] = data[place:other][:4096]
        elif kind == 5:
            data[place:other] = rng.randbytes(other - place)
        elif kind == 6:
            data = bytearray(data[other:] + data[:other])
        else:
            data = bytearray(rng.randbytes(rng.choice((0, 1, 7, 64, 4096))))
        yield bytes(data)
