# SPDX-License-Identifier: Apache-2.0
"""Messages and progress bars. Each message is one unwrapped line, so that it can be searched for file names."""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import TextIO

from tqdm import tqdm

from library.errors import UserError, escaped

LOGGER_NAME = "trainyard"


def get_logger() -> logging.Logger:
    """The logger of all modules. Before `setup_logging` it prints warnings only."""
    return logging.getLogger(LOGGER_NAME)


def is_main_process() -> bool:
    """Whether this is rank 0."""
    return process_number() == 0


def process_number() -> int:
    """Rank of this process. Works before the accelerator exists (launchers set RANK)."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Number of processes of the run. Works before the accelerator exists (launchers set WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def setup_logging(*, level: str | None, file: str | None, simple: bool) -> None:
    """Send messages to stderr, or to `file`: from rank 0 at `level`, from other ranks only errors. May be called again.

    simple: without time and level. Raises UserError when `file` cannot be written.
    """
    tqdm.set_lock(threading.RLock())  # its own is shared with worker processes, which may be killed while they hold it
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
    """Messages on stderr, above the progress bars. A run goes on when the terminal is gone."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            self.setStream(silenced_stderr())
        else:
            super().handleError(record)


class FileHandler(logging.FileHandler):
    """Writes messages to a file. When that fails (a full disk), stderr says so once and the run goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif self.level <= logging.CRITICAL:
            self.setLevel(logging.CRITICAL + 1)
            name, reason = self.baseFilename, error.strerror or error
            to_stderr(f"--console_log_file: {name}: {reason}; no more messages are written, the training goes on\n")

    def close(self) -> None:
        """Close the file, even if buffered messages cannot be written."""
        try:
            super().close()
        except OSError:
            self.stream = None


class LineFormatter(logging.Formatter):
    """Formats a message as one line, with control characters of file names escaped. Tracebacks are unchanged."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escaped(record.message)
        return super().formatMessage(record)


class OnlyOnce(logging.Filter):
    """Drops repeated warnings: two checks may find the same problem."""

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
    """Write to stderr. If that fails (a closed terminal, a full disk), stderr is silenced and the run goes on."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        silenced_stderr()


def silenced_stderr() -> TextIO:
    """Replace stderr by os.devnull and return it. Otherwise Python could not flush it and would exit with code 120."""
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process
    return sys.stderr


class BarStream:
    """stderr as progress bars write to it: redrawn in place on a terminal, a plain line for each state elsewhere."""

    def __init__(self) -> None:
        self.is_terminal = sys.stderr.isatty()

    def __eq__(self, other: object) -> bool:
        """tqdm asks this to find the bars that a message has to make room for: those on the same terminal."""
        return self.is_terminal and other is sys.stderr

    __hash__ = None  # type: ignore[assignment]

    def write(self, text: str) -> None:
        line = text.strip()
        if self.is_terminal:
            to_stderr(text)
        elif line:  # not the blanks that clear a bar
            to_stderr(f"{line}\n")

    def flush(self) -> None:
        """Nothing is buffered."""

    def fileno(self) -> int:
        """Where tqdm reads the width of the terminal."""
        return sys.stderr.fileno()


class progress(tqdm):
    """A progress bar on stderr with rate and remaining time; only the main process shows one.

    On a terminal it fits the width and messages appear above it. Elsewhere (a file, a pipe) it is a line every ten
    seconds, without control characters.
    """

    monitor_interval = 0  # no thread of tqdm's: `miniters` is fixed

    def __init__(self, total: int, what: str, unit: str = "it", *, start: int = 0) -> None:
        stream = BarStream()
        super().__init__(
            total=total, initial=start, desc=what, unit=unit, file=stream, disable=not is_main_process(), miniters=1,
            mininterval=0.1 if stream.is_terminal else 10.0, dynamic_ncols=stream.is_terminal, ascii=True, smoothing=0,
        )  # fmt: skip

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more items as done; `note` is shown at the end of the bar."""
        if note is not None:
            self.set_postfix_str(note, refresh=False)
        self.update(count)
