# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are whole or not there.

A file is written beside its place under a temporary name, flushed to the disk, read back, and renamed. A folder alike;
an older folder is first moved aside, so that at every instant a whole one exists, and `clean_leftovers` finishes what a
kill interrupted.

Temporary names: `.<stem>~<stage>~<host>~<pid>~<process><number><suffix>` with the stages tmp (being written), new
(whole, not yet in place) and old (moved aside). The ending stays: other people's writers choose the file type by it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import platform
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} if hasattr(errno, "EDQUOT") else {errno.ENOSPC, errno.EFBIG}
# Writers in Rust and C++ tell the same in words only.
FULL_WORDS = (
    "No space left",
    "File too large",
    "Disk quota",
    "not enough space",
    "PytorchStreamWriter failed",
    "unexpected pos",
)
FOREIGN_AGE_S = 24 * 3600.0  # a leftover of another machine is old enough to be dead
TEMP_NAME = re.compile(
    r"\.(?P<stem>.+)~(?P<stage>tmp|new|old)~(?P<host>[0-9a-f]{8})~(?P<pid>\d+)"
    r"~(?P<process>[0-9a-f]{8})[0-9a-f]{8}(?P<suffix>\..*)?"
)


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


@contextlib.contextmanager
def saving(path: Path, size: int) -> Iterator[None]:
    """Turn what a file system says into a SaveError that names the folder."""
    free = free_bytes(path.parent) if path.parent.is_dir() else 0  # before: what is half-written takes the rest
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _means_full(error):
            need = f"{size:,} bytes are needed, " if size else ""
            room = f"{free:,} were free" + (", so a quota or limit says no" if size and free >= 2 * size else "")
            raise SaveError(f"{path.parent}: no room left for {path.name}: {need}{room}; an older one stays") from error
        if isinstance(error, OSError):
            raise SaveError(f"cannot write {path}: {error.strerror or error}; an older one stays") from error
        raise


def _means_full(error: BaseException | None) -> bool:
    """True when the error, or one that it came from, says that there is no room. torch.save hides the first one."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL) or any(word in str(error) for word in FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


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


@contextlib.contextmanager
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
    """Rename the whole folder `temp` to `path`; another process may do so at the same time, the last one stays."""
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
    process: str


@functools.cache
def _process() -> str:
    """Tells this process from an earlier one with the same id, which is usual in containers."""
    return uuid.uuid4().hex[:8]


def temp_name(path: Path, stage: str) -> Path:
    """A new temporary name beside `path`, on the same file system, short enough for every file system."""
    suffix = path.suffix if len(path.suffix) < 20 else ""
    stem = path.name[: len(path.name) - len(suffix)]
    return path.with_name(f".{stem}~{stage}~{_host()}~{os.getpid()}~{_process()}{uuid.uuid4().hex[:8]}{suffix}")


def read_temp_name(name: str) -> TempName | None:
    """The parts of one of our temporary names, None for every other name."""
    found = TEMP_NAME.fullmatch(name)
    if found is None:
        return None
    final = found["stem"] + (found["suffix"] or "")
    return TempName(final, found["stage"], found["host"], int(found["pid"]), found["process"])


def _host() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _is_dead(temp: TempName, path: Path) -> bool:
    if temp.host == _host() and os.name != "nt":  # os.kill on Windows would end the process
        if temp.pid == os.getpid():
            return temp.process != _process()
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

    Returns the final names that were affected. Temporary files of running processes, and everything that is not named
    by `temp_name`, stay. Raises nothing: what cannot be removed stays.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [(p, t) for p in folder.iterdir() if (t := read_temp_name(p.name)) and _is_dead(t, p)]
    # A whole new folder goes first, so that it, and not the older one, gets the name.
    for path, temp in sorted(found, key=lambda item: ("new", "old", "tmp").index(item[1].stage)):
        with contextlib.suppress(OSError):
            final = folder / temp.final
            if path.is_dir() and temp.stage != "tmp" and not final.exists():
                os.rename(path, final)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return sorted({temp.final for _, temp in found})


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is whole or gone at every instant: it loses its name first."""
    gone = temp_name(path, "tmp")
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


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
