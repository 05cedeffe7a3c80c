# SPDX-License-Identifier: Apache-2.0
"""The indexes of a store folder: each process that fills the folder writes its own index, and all are read.

This avoids concurrent writes to one sqlite file, which need locks that network folders often lack. The first process
writes the same file as a single process does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from library.data.caches.share import ALL, Share
from library.data.caches.store_index import FILE_NAME, Entry, FileRow, Index, ShardState

PREFIX, SUFFIX = FILE_NAME.split(".")


class Indexes:
    """All indexes of a folder, with the interface of one `Index`. checked: see there."""

    def __init__(self, folder: Path, share: Share = ALL, checked: dict[str, int] | None = None) -> None:
        self.folder, self.share = folder, share
        self.checked: dict[str, int] = {} if checked is None else checked
        own = FILE_NAME if share.rank == 0 else f"{PREFIX}-{share.rank}.{SUFFIX}"
        self.own = Index(folder, own, checked=self.checked)
        self._others: dict[str, Index] = {}
        self._look()

    def _look(self) -> list[Index]:
        """Open the indexes that are new in the folder and return them."""
        try:
            names = sorted(os.listdir(self.folder))
        except OSError:
            return []
        new = []
        for name in names:
            is_index = name == FILE_NAME or (name.startswith(f"{PREFIX}-") and name.endswith(f".{SUFFIX}"))
            if is_index and name != self.own.path.name and name not in self._others:
                # of another process: only that one may replace it if it is damaged
                self._others[name] = Index(self.folder, name, owned=self.share.world == 1, checked=self.checked)
                new.append(self._others[name])
        return new

    @property
    def _all(self) -> list[Index]:
        return [self.own, *self._others.values()]

    # ---- records ----------------------------------------------------------------------------------------------------

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        """The entries of those keys that are present."""
        found: dict[bytes, Entry] = {}
        for indexes in (lambda: self._all, self._look):
            for index in indexes() if len(found) < len(keys) else ():
                found |= index.find([key for key in keys if key not in found])
        return found

    def of_shard(self, name: str) -> list[Entry]:
        """All entries of one shard, in order of position."""
        return [entry for index in self._all for entry in index.of_shard(name)]

    def is_empty(self) -> bool:
        self._look()
        return all(index.is_empty() for index in self._all)

    def add(self, entries: Iterable[Entry], shard: ShardState) -> None:
        """Commit records whose bytes are already on disk, and the state of their shard, in one transaction."""
        self.own.add(entries, shard)

    def drop(self, entries: Sequence[Entry]) -> None:
        """Drop records, unless another process has written them again elsewhere."""
        for index in self._all:
            known = index.find([entry.key for entry in entries])
            if known:
                index.drop([entry for entry in entries if entry.key in known])

    def drop_keys(self, keys: Iterable[bytes]) -> None:
        """Drop records wherever they are stored."""
        wanted = list(keys)
        for index in self._all:
            if known := index.find(wanted):
                index.drop_keys(known)

    # ---- shards -----------------------------------------------------------------------------------------------------

    def shard_states(self) -> dict[str, ShardState]:
        return {name: state for index in reversed(self._all) for name, state in index.shard_states().items()}

    def set_shard_state(self, shard: ShardState) -> None:
        self._of_shard(shard.name).set_shard_state(shard)

    def drop_shard(self, name: str) -> None:
        self._of_shard(name).drop_shard(name)

    def _of_shard(self, name: str) -> Index:
        """The index of the process that wrote a shard."""
        return next((index for index in self._all if name in index.shard_states()), self.own)

    def live_bytes(self) -> dict[str, int]:
        """Bytes per shard of the live records."""
        dead, live = self.dead_owners(), dict[str, int]()
        for index in self._all:
            for name, size in index.live_bytes(dead).items():
                live[name] = live.get(name, 0) + size
        return live

    def dead_owners(self) -> set[bytes]:
        """Digests that a file once had and that no file has now."""
        dead = set().union(*(index.dead_owners() for index in self._all))
        return dead.difference(*(index.owners_among(dead) for index in self._all)) if dead else dead

    # ---- contents of files ------------------------------------------------------------------------------------------

    def file_rows(self, paths: Sequence[str]) -> dict[str, FileRow]:
        """The newest row of each path that has one."""
        self._look()
        found: dict[str, FileRow] = {}
        for index in self._all:
            for path, row in index.file_rows(paths).items():
                if path not in found or row.mtime_ns > found[path].mtime_ns:
                    found[path] = row
        return found

    def set_file_rows(self, rows: Sequence[FileRow]) -> None:
        before = self.file_rows([row.path for row in rows]) if self._others else {}
        retired = [before[row.path].digest for row in rows if row.path in before]
        self.own.set_file_rows(rows, retired)

    def close(self) -> None:
        for index in self._all:
            index.close()
