# SPDX-License-Identifier: Apache-2.0
"""Stores of named tensors under a content key: packed shard files on the disk, or a dict in memory.

A folder holds one index per writer, and shards of raw bytes. Each writer appends to its own shard, and flushes bytes to
disk before it commits the index row that refers to them. Records in the index are therefore complete, even if a process
is killed or several write at once. Later damage (a truncated, overwritten or replaced shard, a wrong index row) is
detected by a CRC-32 over key, layout and bytes at every read; a damaged record is dropped and counts as missing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import stat
import threading
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from library.data.caches.share import ALL, Share
from library.data.caches.store_index import Entry, FileRow, ShardState, no_space, unwritable
from library.data.caches.store_indexes import Indexes
from library.data.caches.store_reader import Reader, is_sound, seal
from library.data.caches.tensor_bytes import Packed, Tensors, pack, unpack, view_bytes
from library.errors import UserError

SHARD_BYTES = 1 << 30
GROUP_BYTES = 64 << 20
CHECKED_BYTES = 1 << 30  # `check` reads up to this many at every start: half a second if cached, and soon needed anyway
GROUP_SECONDS = 5.0
ABANDONED_SECONDS = 3600.0
MOST_ENTRIES = 200_000  # kept in memory; a lookup in the index takes about 50 us
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Found:
    """Result of `check` for the keys that it was given."""

    missing: frozenset[bytes] = frozenset()  # damaged ones included
    damaged: frozenset[bytes] = frozenset()


class MemoryStore:
    """A store in the memory of this process."""

    share = ALL  # other processes do not see what this one writes

    def __init__(self) -> None:
        self._records: dict[bytes, dict[str, Tensor]] = {}
        self._files: dict[str, FileRow] = {}

    def put(self, key: bytes, tensors: Tensors, owner: bytes = b"") -> None:
        self._records[key] = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def get(self, key: bytes) -> dict[str, Tensor]:
        """The tensors under `key`. Raises KeyError."""
        return dict(self._records[key])

    def discard(self, key: bytes) -> None:
        self._records.pop(key, None)

    def check(self, keys: Iterable[bytes], *, quick: bool = False) -> Found:
        return Found(frozenset(keys) - self._records.keys())

    def is_empty(self) -> bool:
        return not self._records

    def flush(self) -> None:
        """Does nothing: there is nothing to write."""

    def require_space(self, needed: int) -> None:
        """Does nothing: main memory is not measured."""

    def prune(self) -> int:
        return 0

    def file_rows(self, paths: Sequence[str]) -> dict[str, FileRow]:
        return {path: self._files[path] for path in paths if path in self._files}

    def set_file_rows(self, rows: Sequence[FileRow]) -> None:
        self._files.update((row.path, row) for row in rows)

    def close(self) -> None:
        """Does nothing: no file is open."""


# ---- writing --------------------------------------------------------------------------------------------------------


@dataclass
class _Writer:
    """The shard that this process appends to, and its records that are not committed yet."""

    file: BinaryIO
    name: str
    position: int = 0  # bytes written
    safe: int = 0  # bytes whose records are committed
    group_start: float = 0.0
    pending: dict[bytes, Entry] = field(default_factory=dict)

    def append(self, parts: Iterable[memoryview]) -> int:
        """Write the parts and return the position of the first byte."""
        start = self.position
        for part in parts:
            while part.nbytes:
                count = self.file.write(part)
                self.position += count
                part = part[count:]
        return start


class PackedStore:
    """A store in a folder, shared between threads, processes and runs.

    share: this process's part in filling it. checked: the indexes that this run has checked already, see `Index`.
    """

    def __init__(
        self, folder: str | Path, share: Share = ALL, *, shard_bytes: int = SHARD_BYTES,
        group_bytes: int = GROUP_BYTES, checked: dict[str, int] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.share = Path(folder), share
        self.shard_bytes, self.group_bytes = shard_bytes, group_bytes
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._index = Indexes(self.folder, share, checked)
        self._reader = Reader(self.folder)
        self._writer: _Writer | None = None
        self._entries: dict[bytes, Entry] = {}  # as last seen in the index
        self._checked = 0  # bytes that this object was asked to check

    def __reduce__(self) -> tuple:
        """Pickle the path of the folder: a copy in another process opens the same folder."""
        sizes = {"shard_bytes": self.shard_bytes, "group_bytes": self.group_bytes}
        make = functools.partial(PackedStore, **sizes, checked=dict(self._index.checked))  # type: ignore[arg-type]
        return make, (str(self.folder), self.share)

    # ---- write ------------------------------------------------------------------------------------------------------

    def put(self, key: bytes, tensors: Tensors, owner: bytes = b"") -> None:
        """Append one record. It is durable after `flush`, which is called every GROUP_BYTES or GROUP_SECONDS.

        owner: digest of the file that the record was made from; once that file has changed, `prune` may drop the
        record. Raises UserError if the disk is full or the folder cannot be written.
        """
        self._append(key, pack(tensors), owner)

    def flush(self) -> None:
        """Flush the bytes to disk, then commit the index rows that refer to them."""
        with self._lock:
            writer = self._own_writer()
            if writer is None or not writer.pending:
                return
            with self._disk_errors(writer):
                os.fsync(writer.file.fileno())
                now = os.fstat(writer.file.fileno())
                self._index.add(writer.pending.values(), ShardState(writer.name, now.st_size, now.st_mtime_ns))
            writer.pending.clear()
            writer.safe = writer.position

    def require_space(self, needed: int) -> None:
        """Raises UserError if the disk has less than `needed` bytes free."""
        self._make_folder()
        if shutil.disk_usage(self.folder).free < needed:
            raise no_space(self.folder, needed, "estimated")

    def close(self) -> None:
        """Flush and close all files; they are reopened on use."""
        with self._lock:
            self.flush()
            if (writer := self._own_writer()) is not None:
                writer.file.close()
            self._writer = None
            self._reader.close()
            self._index.close()

    def _append(self, key: bytes, packed: Packed, owner: bytes) -> None:
        with self._lock:
            writer = self._own_writer() or self._new_writer()
            if not writer.pending:
                writer.group_start = time.monotonic()
            with self._disk_errors(writer, packed.length):
                start = writer.append(packed.parts)
            checksum = packed.checksum ^ seal(key, packed.layout)
            writer.pending[key] = Entry(key, writer.name, start, packed.length, checksum, packed.layout, owner)
            self._entries.pop(key, None)
            group_full = writer.position - writer.safe >= self.group_bytes
            shard_full = writer.position >= self.shard_bytes
            if group_full or shard_full or time.monotonic() - writer.group_start >= GROUP_SECONDS:
                self.flush()
            if shard_full:
                writer.file.close()
                self._writer = None

    def _own_writer(self) -> _Writer | None:
        """This process's writer; a forked child starts its own shard."""
        if self._pid != os.getpid():
            self._writer, self._pid = None, os.getpid()
        return self._writer

    def _new_writer(self) -> _Writer:
        self._make_folder()
        name = f"{os.getpid()}-{uuid.uuid4().hex}.bin"
        try:
            file = open(self.folder / name, "xb", buffering=0)  # noqa: SIM115 - closed with the shard
        except OSError as error:
            raise self._explained(error, 0) from error
        self._writer = _Writer(file, name)
        return self._writer

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._explained(error, 0) from error

    @contextlib.contextmanager
    def _disk_errors(self, writer: _Writer, needed: int = 0) -> Iterator[None]:
        """On an error while writing, restore the shard to its last commit and raise UserError."""
        try:
            yield
        except (OSError, UserError) as error:
            needed += writer.position - writer.safe
            self._writer = None
            with contextlib.suppress(OSError):
                writer.file.truncate(writer.safe)
                writer.file.close()
                if writer.safe == 0:
                    os.unlink(self.folder / writer.name)
            if isinstance(error, UserError):
                raise
            raise self._explained(error, needed) from error

    def _explained(self, error: OSError, needed: int) -> UserError:
        reason = error.strerror or str(error)
        return no_space(self.folder, needed, reason) if error.errno in FULL else unwritable(self.folder, reason)

    # ---- read -------------------------------------------------------------------------------------------------------

    def get(self, key: bytes) -> dict[str, Tensor]:
        """New tensors with the record under `key`.

        Raises KeyError if the record is missing or damaged; a damaged one has been dropped, and the next `check`
        reports it as missing. Raises UserError if it cannot be dropped.
        """
        entry = self._entries.get(key)
        buffer = self._whole(entry) if entry is not None else None
        if buffer is None:  # not known here, or moved by the `prune` of another process
            entry = self._find([key]).get(key)
            buffer = self._whole(entry) if entry is not None else None
        if entry is None or buffer is None:
            if entry is not None:
                self._drop([entry], must=True)
            raise KeyError(key)
        return unpack(buffer, entry.layout)

    def discard(self, key: bytes) -> None:
        """Drop a record that does not contain what its reader expects."""
        self._entries.pop(key, None)
        self._index.drop_keys([key])

    def check(self, keys: Iterable[bytes], *, quick: bool = False) -> Found:
        """Find the keys that must be written. Damaged records are dropped from the index.

        Up to CHECKED_BYTES, all records are read and their checksums compared. Beyond that, only those in shards whose
        size or time differs from the last commit (the run was killed, the folder was copied, bytes were changed);
        `get` detects other damage. quick: look at the index only.
        """
        wanted = frozenset(keys)
        found = self._find(list(wanted))
        damaged: set[bytes] = set()
        if not quick:
            unsound = [entry for entry in found.values() if not is_sound(entry)]
            self._drop(unsound)
            damaged = {entry.key for entry in unsound}
            entries = [entry for entry in found.values() if entry.key not in damaged]
            damaged |= self._damaged_among(entries)
        return Found(frozenset(wanted - found.keys() | wanted & damaged), wanted & damaged)

    def _damaged_among(self, entries: Sequence[Entry]) -> set[bytes]:
        """Drop the damaged entries and return their keys."""
        size = sum(entry.length for entry in entries)
        self._checked += size
        if self._checked <= CHECKED_BYTES:
            in_order = sorted(entries, key=lambda entry: (entry.shard, entry.start))
            bad = [entry for entry in in_order if self._whole(entry) is None]
            self._drop(bad)
            return {entry.key for entry in bad}
        states = self._index.shard_states()
        return set().union(*(self._check_shard(name, states.get(name)) for name in sorted({e.shard for e in entries})))

    def is_empty(self) -> bool:
        self.flush()
        return self._index.is_empty()

    def _find(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        self.flush()
        found = self._index.find(keys)
        if len(self._entries) > MOST_ENTRIES:
            self._entries.clear()
        self._entries.update(found)
        return found

    def _whole(self, entry: Entry) -> Tensor | None:
        """The bytes of a record, or None if they are not what was written under its key."""
        buffer = self._reader.read(entry) if is_sound(entry) else None
        if buffer is None:
            return None
        checksum = zlib.crc32(view_bytes(buffer))
        # without the seal: written by an older version
        return buffer if entry.checksum in (checksum ^ seal(entry.key, entry.layout), checksum) else None

    def _drop(self, entries: Sequence[Entry], *, must: bool = False) -> None:
        """Drop damaged records. In a read-only folder they stay and are found again; must: raise UserError instead."""
        for entry in entries:
            self._entries.pop(entry.key, None)
        if entries and (must or os.access(self.folder, os.W_OK)):
            sound = [entry for entry in entries if is_sound(entry)]
            self._index.drop(sound)
            self._index.drop_keys({entry.key for entry in entries} - {entry.key for entry in sound})

    def _check_shard(self, name: str, known: ShardState | None) -> set[bytes]:
        """Drop the damaged records of a shard and return their keys."""
        try:
            now = os.stat(self.folder / name)
            state = ShardState(name, now.st_size, now.st_mtime_ns)
        except OSError:
            state = ShardState(name, -1, 0)
        if state == known:
            return set()
        bad = [entry for entry in self._index.of_shard(name) if self._whole(entry) is None]
        self._drop(bad)
        if os.access(self.folder, os.W_OK):
            self._index.set_shard_state(state)
        return {entry.key for entry in bad}

    # ---- files and unused records -----------------------------------------------------------------------------------

    def file_rows(self, paths: Sequence[str]) -> dict[str, FileRow]:
        """What is remembered about the files at these paths."""
        return self._index.file_rows(paths)

    def set_file_rows(self, rows: Sequence[FileRow]) -> None:
        """Remember size, time and digest of files."""
        if rows:
            self._make_folder()
            self._index.set_file_rows(rows)

    def prune(self, *, abandoned_s: float = ABANDONED_SECONDS) -> int:
        """If over half of all bytes belong to no live record, rewrite the live ones. Returns the number of bytes freed.

        Shards written to in the last `abandoned_s` seconds may belong to a running process and are left alone.
        """
        with self._lock:
            self.flush()
            live = self._index.live_bytes()
            stats = self._shard_files()
            total = sum(file.st_size for file in stats.values())
            if total == 0 or 2 * sum(live.values()) >= total:
                return 0
            freed = 0
            for name, file in stats.items():
                if 2 * live.get(name, 0) < file.st_size and time.time() - file.st_mtime >= abandoned_s:
                    freed += file.st_size - self._rewrite(name)
            return freed

    def _shard_files(self) -> dict[str, os.stat_result]:
        found = {}
        for path in self.folder.glob("*.bin"):
            with contextlib.suppress(OSError):  # another process has just removed it
                found[path.name] = path.stat()
        return {name: file for name, file in found.items() if stat.S_ISREG(file.st_mode)}

    def _rewrite(self, shard: str) -> int:
        """Move the live records of a shard to this process's shard and return their size in bytes."""
        if (writer := self._own_writer()) is not None and writer.name == shard:
            writer.file.close()
            self._writer = None
        dead, moved = self._index.dead_owners(), 0
        for entry in self._index.of_shard(shard):
            if entry.owner not in dead and (buffer := self._whole(entry)) is not None:
                packed = Packed([view_bytes(buffer)], entry.length, zlib.crc32(view_bytes(buffer)), entry.layout)
                self._append(entry.key, packed, entry.owner)
                moved += entry.length
        self.flush()
        self._index.drop_shard(shard)
        self._reader.close(shard)
        with contextlib.suppress(OSError):  # on Windows a reader may have it open: then the next prune removes it
            os.unlink(self.folder / shard)
        return moved


TensorStore = MemoryStore | PackedStore
