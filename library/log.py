# SPDX-License-Identifier: Apache-2.0
"""Messages and progress bars. Messages are one line each, unwrapped, so that file names can be searched for."""

from __future__ import annotations

import logging
import os
import sys
import time
from types import TracebackType
from typing import TextIO

from library.errors import UserError, escaped

LOGGER_NAME = "trainyard"


def get_logger() -> logging.Logger:
    """The logger that everything writes to. Nothing is printed before `setup_logging`, except warnings."""
    return logging.getLogger(LOGGER_NAME)


def is_main_process() -> bool:
    """True for rank 0, also before the accelerator exists (launchers set RANK)."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """How many processes train together, also before the accelerator exists (launchers set WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def setup_logging(*, level: str | None, file: str | None, simple: bool) -> None:
    """Messages to stderr (or `file`), from rank 0 at `level`, from other ranks only errors. Idempotent.

    Raises UserError when `file` cannot be written.
    """
    logger = get_logger()
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    try:
        handler = FileHandler(file, encoding="utf-8", errors="backslashreplace") if file else ConsoleHandler(sys.stderr)
    except OSError as error:
        raise UserError(f"--console_log_file: {file} cannot be written: {error.strerror or error}") from None
    style = "%(message)s" if simple else "%(asctime)s %(levelname)-7s %(message)s"
    handler.setFormatter(LineFormatter(style, datefmt="%H:%M:%S"))
    handler.addFilter(OnlyOnce())
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(level or "INFO" if is_main_process() else "ERROR")


class ConsoleHandler(logging.StreamHandler):
    """Messages on stderr; a terminal that is gone ends no training."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            self.setStream(silenced_stderr())
        else:
            super().handleError(record)


class FileHandler(logging.FileHandler):
    """Messages in a file. Where the disk is full, stderr says so once, and the training goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif self.level <= logging.CRITICAL:
            self.setLevel(logging.CRITICAL + 1)
            name, reason = self.baseFilename, error.strerror or error
            to_stderr(f"--console_log_file: {name}: {reason}; no more messages are written, the training goes on\n")

    def close(self) -> None:
        """What it still holds may not fit on the disk."""
        try:
            super().close()
        except OSError:
            self.stream = None


class LineFormatter(logging.Formatter):
    """One line a message, whatever the names of files in it hold; a traceback follows as it is."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escaped(record.message)
        return super().formatMessage(record)


class OnlyOnce(logging.Filter):
    """Lets each warning through once: what two checks find need not be read twice."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.levelno < logging.WARNING:
            return True
        new = text not in self._seen
        self._seen.add(text)
        return new


def to_stderr(text: str) -> None:
    """Write to stderr. Where that is gone (a closed terminal, a full disk behind it), the training goes on without."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        silenced_stderr()


def silenced_stderr() -> TextIO:
    """stderr, which leads nowhere from now on: else Python would end with code 120, unable to flush it."""
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process
    return sys.stderr


class progress:
    """A progress bar on stderr with rate and ETA: redrawn in place on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, what: str, unit: str = "it", *, start: int = 0, note: str = "") -> None:
        self.total, self.what, self.unit, self.done, self.first, self.note = total, what, unit, start, start, note
        self.terminal = sys.stderr.isatty()
        self.started = self.shown = time.monotonic()

    def __enter__(self) -> progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show(end="\n")

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` items as done; `note` is shown at the end of the bar."""
        self.done += count
        self.note = self.note if note is None else note
        if time.monotonic() - self.shown >= (0.1 if self.terminal else 10.0):
            self._show(end="" if self.terminal else "\n")

    def text(self) -> str:
        """`caching latents  30/100 [00:12<00:28, 2.50 it/s]`"""
        elapsed = time.monotonic() - self.started
        rate = (self.done - self.first) / elapsed if elapsed > 0 else 0.0
        left = clock((self.total - self.done) / rate) if rate > 0 else "?"
        speed = f"{rate:.2f} {self.unit}/s" if rate >= 1 or rate == 0 else f"{1 / rate:.2f} s/{self.unit}"
        return f"{self.what} {self.done}/{self.total} [{clock(elapsed)}<{left}, {speed}] {self.note}".rstrip()

    def _show(self, end: str) -> None:
        self.shown = time.monotonic()
        if not is_main_process():
            return
        width = 24
        filled = width * self.done // max(self.total, 1)
        start = "\r\x1b[K" if self.terminal else ""
        to_stderr(f"{start}|{'#' * filled}{'.' * (width - filled)}| {self.text()}{end}")


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
