# SPDX-License-Identifier: Apache-2.0
"""Reading the records of a packed store: plausibility of an index entry, and the bytes it refers to."""

from __future__ import annotations

import errno
import os
import stat
import threading
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from library.data.caches.store_index import Entry
from library.data.caches.tensor_bytes import layout_bytes, view_bytes

HAS_PREADV = hasattr(os, "preadv")  # not on Windows; reads without a lock


def seal(key: bytes, layout: str) -> int:
    """Value mixed into the checksum of a record: rejects the bytes of another record or of another layout."""
    return zlib.crc32(layout.encode(), zlib.crc32(key))


def is_sound(entry: Entry) -> bool:
    """Whether a writer could have made this entry; the index may be damaged."""
    numbers = (entry.start, entry.length, entry.checksum)
    if type(entry.shard) is not str or type(entry.layout) is not str or any(type(n) is not int for n in numbers):
        return False
    plain_name = entry.shard.endswith(".bin") and not {"/", "\\", "\0"} & set(entry.shard)
    return plain_name and entry.start >= 0 and entry.length == layout_bytes(entry.layout)


class Reader:
    """Reads byte ranges of the shards of a folder into new tensors; keeps the files open, per process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._files: dict[tuple[int, str], BinaryIO] = {}  # by process: a file position must not be shared over a fork

    def read(self, entry: Entry) -> Tensor | None:
        """The bytes of one record, or None if the file is missing, cannot be read or is too short.

        Raises OSError if too many files are open.
        """
        try:
            file = self._open(entry.shard)
            if entry.start + entry.length > os.fstat(file.fileno()).st_size:
                return None
            buffer = torch.empty(entry.length, dtype=torch.uint8)
            count = self._read_into(file, view_bytes(buffer), entry.start)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # the record is not at fault and must not be dropped
                raise
            return None
        return buffer if count == entry.length else None

    def _open(self, shard: str) -> BinaryIO:
        """Open a shard. Raises OSError if there is no such file, or if it is a folder or a pipe."""
        key = (os.getpid(), shard)
        if key not in self._files:
            path = self.folder / shard
            if not stat.S_ISREG(path.stat().st_mode):
                raise FileNotFoundError(errno.ENOENT, "not a file", str(path))
            self._files[key] = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        return self._files[key]

    def _read_into(self, file: BinaryIO, view: memoryview, start: int) -> int:
        if HAS_PREADV:
            return os.preadv(file.fileno(), [view], start)
        with self._lock:
            file.seek(start)
            return file.readinto(view)  # type: ignore[attr-defined]

    def close(self, shard: str | None = None) -> None:
        """Close one shard, or all."""
        for key in [k for k in self._files if k[0] == os.getpid() and shard in (None, k[1])]:
            self._files.pop(key).close()
