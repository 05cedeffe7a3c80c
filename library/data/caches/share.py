# SPDX-License-Identifier: Apache-2.0
"""How the processes that see a cache folder divide the work on it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One of the processes that share a folder."""

    rank: int = 0
    world: int = 1
    writes: bool = True  # False: the folder is read-only, and this process has no work

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """This process's work: every world-th item."""
        return items[self.rank :: self.world] if self.writes else items[:0]

    def has(self, text: str) -> bool:
        """Whether a text is this process's work."""
        digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
        return self.writes and int.from_bytes(digest, "little") % self.world == self.rank

    @property
    def next(self) -> Share:
        """The share of the next process, whose records this one looks for to check that it sees what others write."""
        return Share((self.rank + 1) % self.world, self.world)


ALL = Share()


@dataclass(frozen=True)
class Shares:
    """The shares of one process: by folder, and for any other folder. Memory is not shared."""

    folders: Mapping[str, Share] = field(default_factory=dict)
    others: Share = ALL

    def of(self, folder: str | None) -> Share:
        return ALL if folder is None else self.folders.get(folder, self.others)


ALONE = Shares()
