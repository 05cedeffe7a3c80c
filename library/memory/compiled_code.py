# SPDX-License-Identifier: Apache-2.0
"""Compiled code from run to run: each run compiles in a folder of its own, and keeps the result in one archive.

    code = CompiledCode(kept_folder(None), key=("inductor", ...))  # before the first compilation
    code.keep(uncompilable=[])  # when everything is compiled
    code.close()

A compiler that is killed leaves files of which only a part is there, and torch loads them as they are. So nothing that
a run leaves behind is used, except for its archive, which is moved into place when it is complete, and in which every
file has a checksum. Runs at the same time, and what is left of a killed one, do not see each other's folders.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Collection, Hashable
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZIP_DEFLATED, ZipFile

from library.log import get_logger

log = get_logger()

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
VARIABLES = (CACHE_VARIABLE, "TRITON_CACHE_DIR")  # torch sets the second one to a folder below the first
DEFAULT_CACHE = Path("~/.cache/trainyard/compiled")
NOTE = "uncompilable"  # file in the archive: kinds of blocks that cannot be compiled, one per line
MOST_BYTES = 1 << 30  # of an archive; a larger one, of many sizes of pictures, is started anew
ABANDONED_SECONDS = 3600.0  # after that nobody writes to an archive that is not in place yet


def kept_folder(folder: str | Path | None) -> Path:
    """The folder of archives. None: torch's variable, or our default folder."""
    return Path(folder or os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE).expanduser().resolve()


class CompiledCode:
    """The folder in which this run compiles, filled from the archive of earlier runs with the same `key`.

    kept: the folder of archives. Until `close`, torch's environment variables name this run's folder. An archive that
    is damaged, or cannot be written, costs time and ends nothing.
    """

    def __init__(self, kept: Path, key: Hashable) -> None:
        self.archive = kept / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.zip"
        self._temporary = TemporaryDirectory(prefix="trainyard-compiled-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        self._before = {name: os.environ.pop(name, None) for name in VARIABLES}
        os.environ[CACHE_VARIABLE] = str(self.folder)
        self.found = self._unpack()  # whether there is code of an earlier run
        self._kept = self._files() if self.found else {}

    @property
    def uncompilable(self) -> frozenset[str]:
        """The kinds of blocks that an earlier run could not compile."""
        note = self.folder / NOTE
        return frozenset(note.read_text(encoding="utf-8").splitlines()) if note.is_file() else frozenset()

    def keep(self, uncompilable: Collection[str]) -> None:
        """Put everything that is compiled into the archive. Call it only while nothing is being compiled.

        uncompilable: the kinds of blocks that cannot be compiled.
        """
        (self.folder / NOTE).write_text("\n".join(sorted(uncompilable)), encoding="utf-8")
        files = self._files()
        if files == self._kept:
            return
        temporary = self.archive.with_name(f"{self.archive.stem}.{uuid.uuid4().hex}.tmp")
        try:
            self.archive.parent.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            with open(temporary, "wb") as file:
                with ZipFile(file, "w", ZIP_DEFLATED, compresslevel=1) as archive:
                    for name in files:
                        archive.write(self.folder / name, name)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.archive)
        except (OSError, ValueError) as error:  # ValueError: a file dated before 1980
            log.warning(f"--compile: {self.archive} cannot be written, the next run compiles again: {error}")
        else:
            self._kept = files
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def forget(self) -> None:
        """Start anew: what was found does not work."""
        self._empty()
        self.found, self._kept = False, {}

    def close(self) -> None:
        """Remove this run's folder and restore the environment."""
        for name, value in self._before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        self._temporary.cleanup()

    def _unpack(self) -> bool:
        """Fill the folder from the archive; whether that worked."""
        if not self.archive.exists():
            return False
        try:
            if self.archive.stat().st_size > MOST_BYTES:
                return False
            with ZipFile(self.archive) as archive:
                archive.extractall(self.folder)
        except Exception as error:  # a damaged archive raises almost anything
            log.warning(f"--compile: {self.archive} is damaged, everything is compiled again: {error}")
            self._empty()
            return False
        return True

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _files(self) -> dict[str, int]:
        """Name and size of every file; the locks of compilers, which are empty, are none of them."""
        sizes = {path: path.stat().st_size for path in sorted(self.folder.rglob("*")) if path.is_file()}
        return {
            path.relative_to(self.folder).as_posix(): size for path, size in sizes.items() if path.suffix != ".lock"
        }

    def _remove_abandoned(self) -> None:
        """Remove what a run left that was killed while it wrote this archive."""
        for path in self.archive.parent.glob(f"{self.archive.stem}.*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()
