# SPDX-License-Identifier: Apache-2.0
"""Digests of file contents, remembered by (path, size, mtime) so that a restart reads no picture."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from library.data.caches.store import TensorStore
from library.data.caches.store_index import FileRow
from library.errors import UserError
from library.log import progress

DIGEST_BYTES = 20
CHUNK_BYTES = 1 << 20
# A file written to so recently may be written to again without a new time: some file systems count in steps of 2 s
SETTLED_NS = 2_000_000_000
UNSETTLED = -1


class FileState(NamedTuple):
    """A file as the scan saw it. digest: of its content, where the index of a shard knows it."""

    path: str
    size: int
    mtime_ns: int
    digest: bytes | None = None


def state_of(path: str) -> FileState:
    """The file as it is now. Raises UserError when it is not there."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return FileState(path, stat.st_size, stat.st_mtime_ns)


def hash_file(path: str) -> FileRow:
    """Content digest of a file and what the file was when it was read. Raises UserError naming it."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    try:
        with open(path, "rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    settled = time.time_ns() - stat.st_mtime_ns >= SETTLED_NS
    return FileRow(path, stat.st_size, stat.st_mtime_ns if settled else UNSETTLED, digest.digest())


class FileHashes:
    """The digests of the files that belong to one store.

    trust: what the store remembers of a path counts whatever the file's size and time are now.
    """

    def __init__(self, store: TensorStore, *, trust: bool = False) -> None:
        self.store, self.trust = store, trust
        self._known: dict[FileState, bytes] = {}
        self._new: list[FileRow] = []
        self._saved = time.monotonic()

    def recall(self, files: Iterable[FileState]) -> list[FileState]:
        """Take what the store remembers; returns the files that it does not know, or that have changed."""
        unknown = [file for file in dict.fromkeys(files) if file.digest is None and file not in self._known]
        rows = self.store.file_rows([file.path for file in unknown])
        rest = []
        for file in unknown:
            row = rows.get(file.path)
            if row is not None and (self.trust or (row.size, row.mtime_ns) == (file.size, file.mtime_ns)):
                self._known[file] = row.digest
            else:
                rest.append(file)
        return rest

    def digest(self, file: FileState) -> bytes:
        """Digest of the content: known, remembered by the store, or read now (`save` makes the store remember it)."""
        if file.digest is not None:
            return file.digest
        if file not in self._known and self.recall([file]):
            row = hash_file(file.path)
            self._new.append(row)
            self._known[file] = row.digest
        return self._known[file]

    def read_all(self, files: Sequence[FileState], workers: int) -> None:
        """Read the files in threads (hashing releases the interpreter lock)."""
        if not files:
            return
        with ThreadPoolExecutor(max(1, workers)) as pool, progress(len(files), "reading new and changed files") as bar:
            for file, row in zip(files, pool.map(lambda file: hash_file(file.path), files)):
                self._new.append(row)
                self._known[file] = row.digest
                bar.advance()

    def save(self, *, every: float = 0) -> None:
        """Make the store remember what was read since the last call, if that was `every` seconds ago."""
        if time.monotonic() - self._saved < every:
            return
        self._saved = time.monotonic()
        rows, self._new = self._new, []
        self.store.set_file_rows(rows)
