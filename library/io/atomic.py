# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: files and folders are complete or absent.

A file is written to a temporary name in the same folder, flushed to disk, read back and renamed. Folders are written
the same way; an older folder is first moved aside, so that a complete one exists at every instant, and
`clean_leftovers` finishes what a killed process left behind.

Temporary names are `.<stem>~<stage>~<host>~<pid>~<process><number><suffix>`, with the stages tmp (being written), new
(complete, not renamed yet) and old (moved aside). The suffix is kept because some writers choose the file type by it.
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
# Messages for the same errors by writers in Rust and C++, which give no error code.
FULL_WORDS = (
    "No space left", "File too large", "Disk quota", "not enough space", "PytorchStreamWriter failed", "unexpected pos",
)  # fmt: skip
FOREIGN_AGE_S = 24 * 3600.0  # leftovers of other machines are removed when they are older
TEMP_NAME = re.compile(
    r"\.(?P<stem>.+)~(?P<stage>tmp|new|old)~(?P<host>[0-9a-f]{8})~(?P<pid>\d+)"
    r"~(?P<process>[0-9a-f]{8})[0-9a-f]{8}(?P<suffix>\..*)?"
)


class SaveError(UserError):
    """A save has failed and the previous file is untouched: one line with folder, reason and bytes needed."""


# ---- files --------------------------------------------------------------------------------------------------------


def atomic_write(
    path: str | Path, write: Callable[[Path], object], check: Callable[[Path], object] | None = None, *, size: int = 0
) -> Path:
    """Write a file atomically: `write` fills a temporary file, `check` reads it back, then it is renamed to `path`.

    size: number of bytes to be written, for the message when the disk is full. An older file `path` stays untouched
    until the rename. Raises SaveError when the file system refuses.
    """
    path = Path(path)
    temp = temp_name(path, "tmp")
    try:
        with saving(path, size):
            # Created here to get the mode of the umask, whatever `write` does to it.
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
    """Turn errors of the file system into a SaveError that names the folder."""
    # measured before, since a partial file takes the rest
    free = free_bytes(path.parent) if path.parent.is_dir() else 0
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
    """Whether the error or one of its causes says that the disk is full. torch.save hides the original error."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL) or any(word in str(error) for word in FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_bytes(folder: Path) -> int:
    """Free bytes in `folder` for this user."""
    return shutil.disk_usage(folder).free


def _with_retries(action: Callable[[], None]) -> None:
    """Retry an action: Windows refuses to replace a file while a reader (a virus scanner, a UI) has it open."""
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
    """Yield an empty temporary folder. When the block succeeds, the folder is flushed and renamed to `path`.

    An older folder `path` is replaced as a whole. If the process is killed between the two renames, `clean_leftovers`
    renames the new folder. Raises SaveError when the file system refuses.
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
    """Rename the complete folder `temp` to `path`. When several processes do so at once, the last one wins."""
    new = temp_name(path, "new")
    os.rename(temp, new)
    moved = []
    for _ in range(100):
        try:
            os.rename(new, path)
            break
        except OSError as error:
            # another process may have moved the folder in the way since; Windows refuses for other reasons, too
            taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            if not taken and not (error.errno in (errno.EACCES, errno.EPERM) and path.is_dir()):
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


# ---- leftovers of killed processes --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TempName:
    """The parts of a temporary name. final: the name that it stands for."""

    final: str
    stage: str
    host: str
    pid: int
    process: str


@functools.cache
def _process() -> str:
    """A random id of this process: in containers, process ids are often reused."""
    return uuid.uuid4().hex[:8]


def temp_name(path: Path, stage: str) -> Path:
    """A new temporary name in the folder of `path`, short enough for every file system."""
    suffix = path.suffix if len(path.suffix) < 20 else ""
    stem = path.name[: len(path.name) - len(suffix)]
    return path.with_name(f".{stem}~{stage}~{_host()}~{os.getpid()}~{_process()}{uuid.uuid4().hex[:8]}{suffix}")


def read_temp_name(name: str) -> TempName | None:
    """The parts of a temporary name made by `temp_name`, None for all other names."""
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
    """Remove partial files of killed processes from `folder`, and rename complete folders to their final names.

    Returns the final names that were affected. Temporary files of running processes and everything that is not named
    by `temp_name` are kept. Never raises: what cannot be removed is left.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [(p, t) for p in folder.iterdir() if (t := read_temp_name(p.name)) and _is_dead(t, p)]
    # A complete new folder goes first, so that it gets the name, and not the older one.
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
    """Remove a folder atomically: it is renamed first, so that it is complete or gone at every instant."""
    gone = temp_name(path, "tmp")
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


# ---- flushing -----------------------------------------------------------------------------------------------------


def sync_file(path: Path) -> None:
    """Flush a file's content to disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk, on systems that support it."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do not support it
            raise
    finally:
        os.close(handle)
