# SPDX-License-Identifier: Apache-2.0
"""Which part of the work on a cache folder is done by which of the processes that see this folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One process among those that share a folder."""

    rank: int = 0
    world: int = 1
    writes: bool = True  # False: the folder cannot be written; then nothing is this process's work

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """Every world-th item: this process's work."""
        return items[self.rank :: self.world] if self.writes else items[:0]

    def has(self, text: str) -> bool:
        """Whether what belongs to a text is this process's work."""
        digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
        return self.writes and int.from_bytes(digest, "little") % self.world == self.rank

    @property
    def next(self) -> Share:
        """The work of the next process: what this one looks for, to see that it finds what others have written."""
        return Share((self.rank + 1) % self.world, self.world)


ALL = Share()


@dataclass(frozen=True)
class Shares:
    """The shares of one process: of folders by name, and of any other folder. Memory is of each process alone."""

    folders: Mapping[str, Share] = field(default_factory=dict)
    others: Share = ALL

    def of(self, folder: str | None) -> Share:
        return ALL if folder is None else self.folders.get(folder, self.others)


ALONE = Shares()
