# SPDX-License-Identifier: Apache-2.0
"""The index of a packed store: an sqlite file with the location of each record and the digests of source files.

A row is committed only after its bytes are on disk, so every record in the index can be read. sqlite serialises the
writers; the rollback journal (not WAL) is used because it also works on network and read-only folders. A file that is
damaged or not such an index is renamed and a new index is started: all records are then encoded again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sqlite3
import sys
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from library.errors import UserError
from library.log import get_logger

FILE_NAME = "index.sqlite"
VERSION = 1
CHUNK = 500  # values per statement; sqlite before 3.32 allows 999
BUSY_SECONDS = 60.0
NO_VERSION = 1000  # from here on the number is damage, not the version of a newer program

T = TypeVar("T")
Statement = tuple[str, Sequence[Sequence[object]]]  # SQL, and the values of each time that it is executed

TABLES = """
CREATE TABLE IF NOT EXISTS shards (name TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER);
CREATE TABLE IF NOT EXISTS records (key BLOB PRIMARY KEY, shard TEXT, start INTEGER, length INTEGER, checksum INTEGER,
    layout TEXT, owner BLOB) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS records_by_shard ON records (shard);
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, digest BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS retired (digest BLOB PRIMARY KEY) WITHOUT ROWID;
"""


class Entry(NamedTuple):
    """Location of a record. `layout`: JSON list of [name, dtype, shape]; `owner`: digest of its source file.

    Values are as read from the index: a damaged index may hold any type (see `store_reader.is_sound`).
    """

    key: bytes
    shard: str
    start: int  # bytes
    length: int  # bytes
    checksum: int
    layout: str
    owner: bytes


class FileRow(NamedTuple):
    """Size, time and digest of a file when it was last read."""

    path: str
    size: int
    mtime_ns: int
    digest: bytes


class ShardState(NamedTuple):
    """Size and time of a shard file when all its records were known to be intact."""

    name: str
    size: int
    mtime_ns: int


class Index:
    """An sqlite file of a store folder. Safe for several threads and processes; one connection per process.

    owned: a damaged file is replaced by a new one. Otherwise it is left to the process that writes it and treated as
    empty. checked: inode of each file, by name, that was checked as a whole in this run; it is added to.
    """

    def __init__(
        self, folder: Path, name: str = FILE_NAME, *, owned: bool = True, checked: dict[str, int] | None = None
    ) -> None:
        self.folder, self.owned, self.ignored = folder, owned, False
        self.checked = {} if checked is None else checked
        self.path = folder / name
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._pid = os.getpid()
        self._of_parents: list[sqlite3.Connection | None] = []
        self._opened = 0  # identity of the file that was opened

    # ---- records ----------------------------------------------------------------------------------------------------

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        """The entries of those keys that are present."""
        return {row[0]: _entry(row) for row in self._select_many("SELECT * FROM records WHERE key IN", keys)}

    def of_shard(self, name: str) -> list[Entry]:
        """All entries of one shard, in order of position."""
        return [_entry(row) for row in self._select("SELECT * FROM records WHERE shard = ? ORDER BY start", (name,))]

    def is_empty(self) -> bool:
        return not self._select("SELECT 1 FROM records LIMIT 1")

    def add(self, entries: Iterable[Entry], shard: ShardState) -> None:
        """Commit records whose bytes are already on disk, and the state of their shard, in one transaction."""
        rows = list(entries)
        self._write(
            ("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", rows),
            ("INSERT OR REPLACE INTO shards VALUES (?, ?, ?)", [shard]),
            needed=sum(row.length for row in rows),
        )

    def drop(self, entries: Iterable[Entry]) -> None:
        """Drop records, unless another process has written them again elsewhere."""
        statement = "DELETE FROM records WHERE key = ? AND shard = ? AND start = ?"
        self._write((statement, [(e.key, e.shard, e.start) for e in entries]))

    def drop_keys(self, keys: Iterable[bytes]) -> None:
        """Drop records wherever they are stored."""
        self._write(("DELETE FROM records WHERE key = ?", [(key,) for key in keys]))

    # ---- shards -----------------------------------------------------------------------------------------------------

    def shard_states(self) -> dict[str, ShardState]:
        return {row[0]: ShardState(*row) for row in self._select("SELECT * FROM shards")}

    def set_shard_state(self, shard: ShardState) -> None:
        self._write(("INSERT OR REPLACE INTO shards VALUES (?, ?, ?)", [shard]))

    def drop_shard(self, name: str) -> None:
        self._write(
            ("DELETE FROM records WHERE shard = ?", [(name,)]),
            ("DELETE FROM shards WHERE name = ?", [(name,)]),
        )

    def live_bytes(self, dead: Collection[bytes]) -> dict[str, int]:
        """Bytes per shard of the records whose owner is not dead."""
        live: dict[str, int] = {}
        query = "SELECT shard, owner, total(length) FROM records GROUP BY shard, owner"  # sum() fails on absurd lengths
        for shard, owner, size in self._select(query):
            live[shard] = live.get(shard, 0) + (0 if owner in dead else int(size))
        return live

    def dead_owners(self) -> set[bytes]:
        """Digests that a file once had and that no file has now."""
        query = "SELECT digest FROM retired WHERE digest NOT IN (SELECT digest FROM files)"
        return {row[0] for row in self._select(query)}

    def owners_among(self, digests: Iterable[bytes]) -> set[bytes]:
        """The subset of the digests that some file has."""
        return {row[0] for row in self._select_many("SELECT digest FROM files WHERE digest IN", list(digests))}

    # ---- contents of files ------------------------------------------------------------------------------------------

    def file_rows(self, paths: Sequence[str]) -> dict[str, FileRow]:
        found = self._select_many("SELECT * FROM files WHERE path IN", [_stored(path) for path in paths])
        rows = (FileRow(os.fsdecode(path), *rest) for path, *rest in found)
        return {row.path: row for row in rows if isinstance(row.digest, bytes)}  # else damaged: the file is read again

    def set_file_rows(self, rows: Sequence[FileRow], retired: Iterable[bytes] = ()) -> None:
        """retired: earlier digests of these files according to other indexes."""
        changed = "INSERT OR IGNORE INTO retired SELECT digest FROM files WHERE path = ? AND digest <> ?"
        self._write(
            ("INSERT OR IGNORE INTO retired VALUES (?)", [(digest,) for digest in retired]),
            (changed, [(_stored(row.path), row.digest) for row in rows]),
            ("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", [(_stored(row.path), *row[1:]) for row in rows]),
        )

    # ---- sqlite -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    def _select(self, query: str, values: Sequence[object] = ()) -> list[tuple]:
        def rows(connection: sqlite3.Connection | None) -> list[tuple]:
            return [] if connection is None else connection.execute(query, values).fetchall()

        return self._healed(rows, create=False)

    def _select_many(self, query: str, values: Sequence[object]) -> Iterator[tuple]:
        for first in range(0, len(values), CHUNK):
            chunk = values[first : first + CHUNK]
            yield from self._select(f"{query} ({','.join('?' * len(chunk))})", chunk)

    def _write(self, *statements: Statement, needed: int = 0) -> None:
        """Execute all statements in one transaction. needed: bytes, for the message about a full disk."""

        def commit(connection: sqlite3.Connection | None) -> None:
            if connection is None:  # damaged, and left to the process that writes it
                return
            with _transaction(connection):
                for statement, values in statements:
                    connection.executemany(statement, values)

        self._healed(commit, create=True, needed=needed)

    def _healed(self, action: Callable[[sqlite3.Connection | None], T], *, create: bool, needed: int = 0) -> T:
        """The result of `action`. If the file turns out to be damaged, retry with a new index."""
        with self._lock, self._errors(needed):
            try:
                return action(self._connected(create=create))
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
            self._set_aside()
            return action(self._connected(create=create))

    def _connected(self, *, create: bool) -> sqlite3.Connection | None:
        """This process's connection, or None if there is no index yet and `create` is False."""
        if self.ignored:
            return None
        if self._pid != os.getpid():
            # A connection must not be used, nor closed, on the other side of a fork: keep it alive and open another.
            self._of_parents.append(self._connection)
            self._connection, self._pid = None, os.getpid()
        if self._connection is None and (create or os.path.lexists(self.path)):
            self._connection = self._open()
        return self._connection

    def _open(self) -> sqlite3.Connection | None:
        self._opened = self._identity()
        if self._opened and not self.path.is_file():  # a folder, a pipe: sqlite would wait for it or refuse it
            self._set_aside()
            if self.ignored:
                return None
        try:
            return self._opened_file()
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
        self._set_aside()
        return None if self.ignored else self._opened_file()

    def _opened_file(self) -> sqlite3.Connection:
        """A connection to the file, which is checked as a whole when the run opens it for the first time."""
        identity = self._identity()
        connection = _connect(self.path, check=identity == 0 or self.checked.get(self.path.name) != identity)
        self.checked[self.path.name] = self._identity()
        return connection

    def _identity(self) -> int:
        """Inode of the file at `path`; 0 if there is none."""
        return os.lstat(self.path).st_ino if os.path.lexists(self.path) else 0

    def _set_aside(self) -> None:
        """Rename the file, unless another process has just done so."""
        self.close()
        if not self.owned:
            get_logger().warning(f"{self.path} is damaged: what it names is encoded again")
            self.ignored = True
            return
        if self._identity() != self._opened:
            return
        damaged = self.path.with_suffix(".damaged")
        if damaged.is_dir() or self.path.is_dir():
            damaged = self.path.with_suffix(f".{uuid.uuid4().hex[:8]}.damaged")
        try:
            os.replace(self.path, damaged)
            self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)  # it is about the other file
        except OSError as error:
            raise unwritable(self.folder, f"{self.path.name} is damaged; {error.strerror}") from error
        get_logger().warning(f"{self.path} is damaged: kept as {damaged.name}, everything is encoded again")
        self._opened = 0

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
            if "locked" in text:
                reason = f"another program has locked it for {BUSY_SECONDS:.0f} s: end that one"
                raise UserError(f"--cache_dir: {self.path}: {reason}, or give another folder") from error
            message = f"--cache_dir: {self.path} cannot be used ({text}); delete the folder or give another one"
            raise UserError(message) from error


def _entry(row: tuple) -> Entry:
    """An entry whose shard name and layout are interned: there are few different ones."""
    shard, layout = (sys.intern(text) if type(text) is str else text for text in (row[1], row[5]))
    return Entry(row[0], shard, row[2], row[3], row[4], layout, row[6])


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether the file itself is at fault; subclasses cover locks, permissions, disk space and programming errors."""
    return type(error) is sqlite3.DatabaseError


def _connect(path: Path, *, check: bool) -> sqlite3.Connection:
    """Open a connection and create the tables. Raises sqlite3.DatabaseError if the file is not such an index.

    check: look for damage in the whole file, which takes a second per gigabyte.
    """
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        connection.text_factory = functools.partial(str, encoding="utf-8", errors="surrogateescape")
        connection.execute("PRAGMA synchronous = FULL")
        if check and connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("damaged")
        if _version(connection) == 0:
            with _transaction(connection):
                _create_tables(connection)
        version = _version(connection)
        if VERSION < version < NO_VERSION:
            raise UserError(f"--cache_dir: {path} has format {version}, not {VERSION}: give another folder")
        if version != VERSION or _schema(connection) != _own_schema():
            raise sqlite3.DatabaseError("other tables")
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


def _schema(connection: sqlite3.Connection) -> list[tuple]:
    return connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY type, name").fetchall()


def _create_tables(connection: sqlite3.Connection) -> None:
    if _schema(connection):  # of another program, or of another process that was quicker
        return
    for statement in TABLES.split(";"):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {VERSION}")


@functools.cache
def _own_schema() -> list[tuple]:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        _create_tables(connection)
        return _schema(connection)


def no_space(folder: Path, needed: int, reason: str) -> UserError:
    """The error for a full disk: names the folder, the space needed and the space free."""
    try:
        free = f"{megabytes(shutil.disk_usage(folder).free)} free; "
    except OSError:  # the folder was removed
        free = ""
    need = f"{megabytes(needed)} more needed, " if needed else ""
    return UserError(
        f"--cache_dir: no space for the cache in {folder} ({need}{free}{reason}): "
        "make room, or give another folder with --cache_dir"
    )


def unwritable(folder: Path, reason: str) -> UserError:
    """The error for a folder that cannot be written."""
    return UserError(f"--cache_dir: {folder} cannot be written ({reason}): give another folder with --cache_dir")


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _stored(path: str) -> str | bytes:
    """A path in a form that sqlite accepts: bytes if it is not valid UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return path
