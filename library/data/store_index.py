# SPDX-License-Identifier: Apache-2.0
"""The index of a packed store: an sqlite file that says where each record is, and which file has which content.

A row is committed only after its bytes are on the disk, so whatever is in the index can be read. sqlite serialises the
writers; the rollback journal (not WAL) is used because it also works on network folders and on read-only ones.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from library.errors import UserError
from library.log import get_logger

FILE_NAME = "index.sqlite"
VERSION = 1
CHUNK = 500  # values per statement; sqlite before 3.32 allows 999
BUSY_SECONDS = 120.0

TABLES = """
CREATE TABLE IF NOT EXISTS shards (name TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER);
CREATE TABLE IF NOT EXISTS records (key BLOB PRIMARY KEY, shard TEXT, start INTEGER, length INTEGER, checksum INTEGER,
    layout TEXT, owner BLOB) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS records_by_shard ON records (shard);
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, digest BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS retired (digest BLOB PRIMARY KEY) WITHOUT ROWID;
"""


class Entry(NamedTuple):
    """Where a record lies. `layout`: JSON list of [name, dtype, shape]; `owner`: digest of its source file."""

    key: bytes
    shard: str
    start: int  # bytes
    length: int  # bytes
    checksum: int
    layout: str
    owner: bytes


class FileRow(NamedTuple):
    """What a file was when its content was last read."""

    path: str
    size: int
    mtime_ns: int
    digest: bytes


class ShardState(NamedTuple):
    """Size and time of a shard file when all its records were known to be whole."""

    name: str
    size: int
    mtime_ns: int


class Index:
    """The sqlite file of one store folder. Safe for several threads and processes; one connection per process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE_NAME
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._pid = os.getpid()
        self._of_parents: list[sqlite3.Connection | None] = []

    # ---- records ----------------------------------------------------------------------------------------------------

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        """The entries of those keys that are present."""
        return {row[0]: _entry(row) for row in self._select_many("SELECT * FROM records WHERE key IN", keys)}

    def of_shard(self, name: str) -> list[Entry]:
        """All entries of one shard, in the order of the bytes."""
        return [_entry(row) for row in self._select("SELECT * FROM records WHERE shard = ? ORDER BY start", (name,))]

    def is_empty(self) -> bool:
        return not self._select("SELECT 1 FROM records LIMIT 1")

    def add(self, entries: Iterable[Entry], shard: ShardState) -> None:
        """Commit records whose bytes are already safe, with the state of their shard, in one transaction."""
        rows = list(entries)
        with self._transaction(sum(row.length for row in rows)) as connection:
            connection.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            connection.execute("INSERT OR REPLACE INTO shards VALUES (?, ?, ?)", shard)

    def drop(self, entries: Iterable[Entry]) -> None:
        """Forget records, unless another process has written them again elsewhere."""
        with self._transaction() as connection:
            statement = "DELETE FROM records WHERE key = ? AND shard = ? AND start = ?"
            connection.executemany(statement, [(e.key, e.shard, e.start) for e in entries])

    # ---- shards -----------------------------------------------------------------------------------------------------

    def shard_states(self) -> dict[str, ShardState]:
        return {row[0]: ShardState(*row) for row in self._select("SELECT * FROM shards")}

    def set_shard_state(self, shard: ShardState) -> None:
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO shards VALUES (?, ?, ?)", shard)

    def drop_shard(self, name: str) -> None:
        with self._transaction() as connection:
            connection.execute("DELETE FROM records WHERE shard = ?", (name,))
            connection.execute("DELETE FROM shards WHERE name = ?", (name,))

    def live_bytes(self) -> dict[str, int]:
        """Bytes per shard of the records that are not dead."""
        dead = self.dead_owners()
        live: dict[str, int] = {}
        for shard, owner, size in self._select("SELECT shard, owner, sum(length) FROM records GROUP BY shard, owner"):
            live[shard] = live.get(shard, 0) + (0 if owner in dead else size)
        return live

    def dead_owners(self) -> set[bytes]:
        """Contents that some file once had and that no file has now."""
        query = "SELECT digest FROM retired WHERE digest NOT IN (SELECT digest FROM files)"
        return {row[0] for row in self._select(query)}

    # ---- contents of files ------------------------------------------------------------------------------------------

    def file_rows(self, paths: Sequence[str]) -> dict[str, FileRow]:
        found = self._select_many("SELECT * FROM files WHERE path IN", [_stored(path) for path in paths])
        rows = (FileRow(_path(path), *rest) for path, *rest in found)
        return {row.path: row for row in rows}

    def set_file_rows(self, rows: Iterable[FileRow]) -> None:
        rows = list(rows)
        with self._transaction() as connection:
            changed = "INSERT OR IGNORE INTO retired SELECT digest FROM files WHERE path = ? AND digest <> ?"
            connection.executemany(changed, [(_stored(row.path), row.digest) for row in rows])
            stored = [(_stored(row.path), *row[1:]) for row in rows]
            connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", stored)

    # ---- sqlite -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    def _select(self, query: str, values: Sequence[object] = ()) -> list[tuple]:
        with self._lock, self._errors():
            connection = self._connected(create=False)
            return [] if connection is None else connection.execute(query, values).fetchall()

    def _select_many(self, query: str, values: Sequence[object]) -> Iterator[tuple]:
        for first in range(0, len(values), CHUNK):
            chunk = values[first : first + CHUNK]
            yield from self._select(f"{query} ({','.join('?' * len(chunk))})", chunk)

    @contextlib.contextmanager
    def _transaction(self, needed: int = 0) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors(needed):
            connection = self._connected(create=True)
            assert connection is not None
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _connected(self, *, create: bool) -> sqlite3.Connection | None:
        """This process's connection, or None when there is no index yet and `create` is False."""
        if self._pid != os.getpid():
            # A connection must not be used, nor closed, on the other side of a fork: keep it alive and open another.
            self._of_parents.append(self._connection)
            self._connection, self._pid = None, os.getpid()
        if self._connection is None and (create or self.path.exists()):
            self._connection = self._open()
        return self._connection

    def _open(self) -> sqlite3.Connection:
        opened = self.path.stat().st_ino if self.path.exists() else 0
        try:
            return _connect(self.path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
        damaged = self.path.with_suffix(".damaged")
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == opened:  # else another process has just done the same
                os.replace(self.path, damaged)
                get_logger().warning(f"{self.path} is damaged: kept as {damaged.name}, everything is encoded again")
        return _connect(self.path)

    @contextlib.contextmanager
    def _errors(self, needed: int = 0) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            text = str(error)
            if "full" in text or "disk I/O" in text:
                raise no_space(self.folder, needed, text) from error
            if "readonly" in text or "unable to open" in text:
                raise unwritable(self.folder, text) from error
            message = f"--cache_dir: {self.path} cannot be used ({text}); delete the folder or give another one"
            raise UserError(message) from error


def _entry(row: tuple) -> Entry:
    """Shard names and layouts are few: every entry shares them."""
    return Entry(row[0], sys.intern(row[1]), row[2], row[3], row[4], sys.intern(row[5]), row[6])


def _connect(path: Path) -> sqlite3.Connection:
    """An open connection with the tables made. Raises sqlite3.DatabaseError when the file is damaged."""
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA synchronous = FULL")
        if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("damaged")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            _create_tables(connection)
        elif version != VERSION:
            raise UserError(f"--cache_dir: {path} has format {version}, not {VERSION}: give another folder")
    except BaseException:
        connection.close()
        raise
    return connection


def _create_tables(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    for statement in TABLES.split(";"):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def no_space(folder: Path, needed: int, reason: str) -> UserError:
    """The error for a full disk: names the folder, what is needed and what is there."""
    free = shutil.disk_usage(folder).free
    need = f"{megabytes(needed)} more needed, " if needed else ""
    return UserError(
        f"--cache_dir: no space for the cache in {folder} ({need}{megabytes(free)} free; {reason}): "
        "make room, or give another folder with --cache_dir"
    )


def unwritable(folder: Path, reason: str) -> UserError:
    """The error for a folder that cannot be written."""
    return UserError(f"--cache_dir: {folder} cannot be written ({reason}): give another folder with --cache_dir")


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _stored(path: str) -> str | bytes:
    """A path as sqlite takes it: as bytes where its name is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return path


def _path(stored: str | bytes) -> str:
    return stored if isinstance(stored, str) else os.fsdecode(stored)
