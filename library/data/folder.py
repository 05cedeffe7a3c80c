# SPDX-License-Identifier: Apache-2.0
"""One folder as a scan sees it: listed once, every file looked at once, and only if the manifest does not know it."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any

from library.data.headers import read_header
from library.data.manifest import manifest_path, read_manifest, write_manifest
from library.log import progress

IMAGE_EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "avif", "jxl"})
_ENDINGS = frozenset(f".{extension}"[-4:] for extension in IMAGE_EXTENSIONS)

_CHUNK = 256  # files between two looks at the clock
_SLOW_SECONDS = 0.00015  # waiting per file that tells a network or cold disk from a warm one
_SLOW_CHUNKS = 3  # in a row: a busy machine makes single ones wait, where threads would only cost time
_THREADS = 16
_BATCH = 8  # files a thread takes at once, because handing one over takes longer than reading a file from memory
_SHOW_PROGRESS = 5000  # files

# Windows has only the first, the others only the second: opening a pipe does not wait for somebody to write to it
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
_NO_FILES = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
             (stat.S_ISBLK, "a device"))  # fmt: skip


class Folder:
    """The files of a folder by name. `images` and `texts` hold what `look` has found of good files."""

    def __init__(self, path: str, cache_dir: str | None) -> None:
        """Raises OSError when the folder cannot be listed."""
        self.path = os.path.abspath(path)
        self.prefix = os.path.join(self.path, "")
        self._listed = os.listdir(self.path)
        self.names = frozenset(self._listed)
        self.manifest_path = manifest_path(self.path, cache_dir)
        self.manifest = read_manifest(self.manifest_path)
        self.images, self.texts = self.manifest.images, self.manifest.texts
        self.problems: dict[str, str] = {}  # file name -> what is wrong with it
        self._changed = False

    @cached_property
    def pictures(self) -> dict[str, str]:
        """Picture name -> stem, sorted by name."""
        # Most other files are sorted out by their last four letters, which are quick to have. The list and not the set:
        # its names follow each other in memory, which for 100,000 of them halves the time of this loop
        likely = [name for name in self._listed if name[-4:].lower() in _ENDINGS]
        # hidden files are not pictures: macOS keeps "._name.jpg" beside "name.jpg"
        found = [n for n in likely if n.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and n[0] != "." and "." in n]
        return {name: name.rpartition(".")[0] for name in sorted(found)}

    @cached_property
    def by_stem(self) -> dict[str, str]:
        """Stem -> picture name, the first one where several share it."""
        return {stem: name for name, stem in reversed(self.pictures.items())}

    @cached_property
    def has_npz(self) -> bool:
        return any(name.endswith(".npz") for name in self.names)

    def look_at_images(self, names: Iterable[str]) -> None:
        """Fill `images` for `names`; `problems` says what is wrong with the others."""
        self._look(names, self.images, partial(_read_file, "picture", _header), "reading image headers")

    def look_at_texts(self, names: Iterable[str]) -> None:
        """Fill `texts` for `names`; `problems` says what is wrong with the others."""
        self._look(names, self.texts, partial(_read_file, "text file", _text), "reading captions")

    def _look(self, names: Iterable[str], known: dict, read: Callable[[str], Any], what: str) -> None:
        stale: list[str] = []
        stat_of, row_of = os.stat, known.get
        with self._directory() as (handle, prefix):
            for name in names:
                row = row_of(name)
                if row is None:  # will be opened, and its size and time are cheaper to have then
                    stale.append(name)
                    continue
                try:
                    status = stat_of(prefix + name, dir_fd=handle)
                except OSError:  # became a broken link, or was deleted since the listing: opening it says so
                    stale.append(name)
                    continue
                if row[1] != status.st_mtime_ns or row[0] != status.st_size:
                    stale.append(name)
        for name, found in zip(stale, read_all(read, [self.prefix + name for name in stale], what)):
            if isinstance(found, str):
                self.problems[name] = found
                self._changed |= known.pop(name, None) is not None
            else:
                known[name] = found
                self._changed = True

    @contextlib.contextmanager
    def _directory(self) -> Iterator[tuple[int | None, str]]:
        """Handle and prefix for `os.stat`: relative to the open folder where the system can, which is quicker."""
        if os.stat not in os.supports_dir_fd:
            yield None, self.prefix
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            yield handle, ""
        finally:
            os.close(handle)

    def remember(self) -> bool:
        """Write the manifest if something changed. False where that is not possible."""
        if not self._changed:
            return True  # rows of files that are gone do no harm, and looking for them takes time
        for rows in (self.images, self.texts):
            for name in rows.keys() - self.names:
                del rows[name]
        self._changed = False
        return write_manifest(self.manifest_path, self.manifest)

    def contents(self) -> str:
        """What is in the folder, for messages: `40 .txt, 3 .gif, 2 folders`."""
        counts: dict[str, int] = {}
        for name in self.names:
            suffix = os.path.splitext(name)[1] or "files without suffix"
            kind = "folders" if os.path.isdir(self.prefix + name) else suffix
            counts[kind] = counts.get(kind, 0) + 1
        most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
        return ", ".join(f"{count} {kind}" for kind, count in most) or "nothing"


def no_file(status: os.stat_result) -> str | None:
    """Name of what is not a file whose bytes can be read, such as "a socket"; None for files and folders."""
    return next((what for is_that, what in _NO_FILES if is_that(status.st_mode)), None)


def unreadable(path: str, error: OSError) -> str:
    """Why a path could not be opened: a socket only says that there is no such device."""
    with contextlib.suppress(OSError):
        if what := no_file(os.stat(path)):
            return f"is {what}, not a file"
    return f"cannot be read ({error.strerror})"


def _read_file(kind: str, read: Callable[[str, int, int], tuple | str], path: str) -> Any:
    """(size, modification time in ns, *what `read` finds), or what is wrong. read: takes path, file handle and size."""
    try:
        handle = os.open(path, _OPEN_FLAGS)
        try:
            status = os.fstat(handle)
            if what := no_file(status):
                return f"is {what}, not a {kind}"
            found = read(path, handle, status.st_size)
        finally:
            os.close(handle)
    except OSError as error:
        return unreadable(path, error)
    return found if isinstance(found, str) else (status.st_size, status.st_mtime_ns, *found)


def _header(path: str, handle: int, size: int) -> tuple[int, int, int] | str:
    width, height, flags, problem = read_header(path, handle, size)
    return problem or (width, height, flags)


def _text(path: str, handle: int, size: int) -> tuple[str] | str:
    data = os.read(handle, size + 1)
    try:
        return (data.decode("utf-8").removeprefix("\ufeff"),)
    except UnicodeDecodeError as error:
        hint = "; it looks like UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        return f"is not UTF-8 text (byte {error.start}{hint}): save it as UTF-8"


def read_all(read: Callable[[str], Any], paths: list[str], what: str) -> list[Any]:
    """`read` of each path, in order. One thread while files come from memory, many when the storage makes us wait."""
    if not paths:
        return []
    found: list[Any] = []
    bar = progress(len(paths), what, "files") if len(paths) >= _SHOW_PROGRESS else None
    pool: ThreadPoolExecutor | None = None
    slow = 0
    try:
        for start in range(0, len(paths), _CHUNK):
            chunk = paths[start : start + _CHUNK]
            if pool is None:
                wall, busy = time.perf_counter(), time.thread_time()
                found.extend(map(read, chunk))
                waited = time.perf_counter() - wall - (time.thread_time() - busy)
                slow = slow + 1 if waited > _SLOW_SECONDS * len(chunk) else 0
                if slow == _SLOW_CHUNKS and start + _CHUNK < len(paths):
                    pool = ThreadPoolExecutor(_THREADS)
            else:
                batches = [chunk[place : place + _BATCH] for place in range(0, len(chunk), _BATCH)]
                for rows in pool.map(lambda batch: list(map(read, batch)), batches):
                    found.extend(rows)
            if bar is not None:
                bar.advance(len(chunk))
    finally:
        if pool is not None:
            pool.shutdown()
        if bar is not None:
            bar.close()
    return found
