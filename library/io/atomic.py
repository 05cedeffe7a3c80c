# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are whole or not there.

A file is written beside its place under a temporary name, flushed to the disk, read back, and renamed. A folder alike; an older
folder is first moved aside, so that at every instant a whole one exists, and `clean_leftovers` finishes what a kill interrupted.

Temporary names: `.<stem>~<stage>~<host>~<pid>~<number><suffix>` with the stages tmp (being written), new (whole, not yet in
place) and old (moved aside). The ending stays: other people's writers choose the file type by it.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} if hasattr(errno, "EDQUOT") else {errno.ENOSPC, errno.EFBIG}
# Writers in Rust and C++ tell the same in words only.
FULL_WORDS = ("No space left", "StorageFull", "not enough space", "File too large", "Disk quota", "PytorchStreamWriter failed")
FOREIGN_AGE_S = 24 * 3600.0  # a leftover of another machine is old enough to be dead
TEMP_NAME = re.compile(r"\.(?P<stem>.+)~(?P<stage>tmp|new|old)~(?P<host>[0-9a-f]{8})~(?P<pid>\d+)~[0-9a-f]{8}(?P<suffix>\..*)?")


class SaveError(UserError):
    """A save did not succeed and what was there before is untouched: one line with folder, reason and bytes needed."""


# ---- files --------------------------------------------------------------------------------------------------------


def atomic_write(
    path: str | Path, write: Callable[[Path], object], check: Callable[[Path], object] | None = None, *, size: int = 0
) -> Path:
    """Let `write` fill a temporary file, flush it, let `check` read it back, then give it the name `path`.

    `size` is the number of bytes that will be written, for the message when the disk is full.
    Raises SaveError when the file system refuses; an older file `path` is untouched until the last instant.
    """
    path = Path(path)
    temp = temp_name(path, "tmp")
    try:
        with saving(path, size):
            # Created here so that it gets the mode that the umask asks for, whatever `write` does to it.
            temp.touch(exist_ok=False)
            mode = temp.stat().st_mode
            write(temp)
            if os.name != "nt":
                temp.chmod(mode)
            sync_file(temp)
            if check is not None:
                check(temp)
            _with_retries(lambda: os.replace(temp, path))
            sync_folder(path.parent)
    finally:
        temp.unlink(missing_ok=True)
    return path


@contextmanager
def saving(path: Path, size: int) -> Iterator[None]:
    """Turn what a file system says into a SaveError that names the folder."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in FULL and not _sounds_full(error):
            raise SaveError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
        if not isinstance(error, OSError) and not _sounds_full(error):
            raise
        need = f"{size:,} bytes are needed" if size else "it does not fit"
        raise SaveError(
            f"{path.parent}: no room left for {path.name}: {need}, {free_bytes(path.parent):,} are free; the older file is untouched"
        ) from error


def _sounds_full(error: Exception) -> bool:
    return any(word in str(error) for word in FULL_WORDS)


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write into `folder`."""
    return shutil.disk_usage(folder).free


def _with_retries(action: Callable[[], None]) -> None:
    """Windows refuses to replace a file while a reader (a virus scanner, a UI) holds it for a moment."""
    for wait in (0.1, 0.3, 1.0):
        try:
            return action()
        except PermissionError:
            if os.name != "nt":
                raise
            time.sleep(wait)
    action()


# ---- folders ------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_folder(path: str | Path, *, size: int = 0) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block ends well, its content is flushed and takes the name `path`.

    An older folder `path` is replaced as a whole. After a kill between the two renames `clean_leftovers` puts the new
    one into place. Raises SaveError when the file system refuses.
    """
    path = Path(path)
    temp = temp_name(path, "tmp")
    try:
        with saving(path, size):
            temp.mkdir()
            yield temp
            for item in sorted(temp.rglob("*")):
                sync_folder(item) if item.is_dir() else sync_file(item)
            sync_folder(temp)
            _swap_in(temp, path)
            sync_folder(path.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _swap_in(temp: Path, path: Path) -> None:
    """Rename the whole folder `temp` to `path`; another process may do the same at the same time, the last one stays."""
    new = temp_name(path, "new")
    os.rename(temp, new)
    moved = []
    for _ in range(100):
        try:
            os.rename(new, path)
            break
        except OSError as error:
            if not path.is_dir() or error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES, errno.EPERM):
                shutil.rmtree(new, ignore_errors=True)
                raise
        aside = temp_name(path, "old")
        try:
            os.rename(path, aside)
            moved.append(aside)
        except FileNotFoundError:
            continue  # the other process moved it first
    for aside in moved:
        shutil.rmtree(aside, ignore_errors=True)


# ---- what a killed run left ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TempName:
    """What a temporary name says: `final` is the name that it stands for."""

    final: str
    stage: str
    host: str
    pid: int


def temp_name(path: Path, stage: str) -> Path:
    """A new temporary name beside `path`, on the same file system, short enough for every file system."""
    suffix = path.suffix if len(path.suffix) < 20 else ""
    stem = path.name[: len(path.name) - len(suffix)]
    return path.with_name(f".{stem}~{stage}~{_host()}~{os.getpid()}~{uuid.uuid4().hex[:8]}{suffix}")


def read_temp_name(name: str) -> TempName | None:
    """The parts of one of our temporary names, None for every other name."""
    found = TEMP_NAME.fullmatch(name)
    if found is None:
        return None
    return TempName(found["stem"] + (found["suffix"] or ""), found["stage"], found["host"], int(found["pid"]))


def _host() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _is_dead(temp: TempName, path: Path) -> bool:
    if temp.host == _host() and os.name != "nt":  # os.kill on Windows would end the process
        if temp.pid == os.getpid():
            return False
        try:
            os.kill(temp.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False
    try:
        return time.time() - path.stat().st_mtime > FOREIGN_AGE_S
    except OSError:
        return False


def clean_leftovers(folder: str | Path) -> list[str]:
    """Remove what killed runs left half-written in `folder`, and put whole folders back to their name.

    Returns the final names that were affected. Temporary files of running processes, and everything that is not named by
    `temp_name`, stay. Raises nothing: what cannot be removed stays.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [(p, t) for p in folder.iterdir() if (t := read_temp_name(p.name)) and _is_dead(t, p)]
    newest = sorted(found, key=lambda item: (item[1].stage != "new", item[1].stage != "old", -item[0].stat().st_mtime_ns))
    for path, temp in newest:
        final = folder / temp.final
        if path.is_dir() and temp.stage in ("new", "old") and not final.exists():
            os.rename(path, final)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return sorted({temp.final for _, temp in found})


# ---- to the disk --------------------------------------------------------------------------------------------------


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk, where the system has such a thing."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such call
            raise
    finally:
        os.close(handle)
