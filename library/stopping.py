# SPDX-License-Identifier: Apache-2.0
"""Requests to stop a run: Ctrl-C, SIGTERM, SIGHUP (a closed terminal), the end of the launcher, or a time limit.

Before the training, a request raises KeyboardInterrupt. During the training it is only recorded: the step is finished
and the state saved. A second signal ends the process at once. Does not import torch: handlers must be set before that.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from library.errors import EXIT_AT_ONCE, EXIT_STOPPED

TOGETHER = 1.0  # seconds; `timeout`, systemd and torchrun signal a process and right after that its group
SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if sys.platform != "win32" else [])]
# environment variables that `accelerate launch` and torchrun set for their processes
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
AGENT = "TORCHELASTIC_RUN_ID"  # torchrun forwards Ctrl-C, so that it arrives twice


class StopRequest:
    """Handles signals, and tells whether the run was asked to stop."""

    def __init__(self) -> None:
        self.interrupts = True  # the first signal raises KeyboardInterrupt; False: it is only recorded
        self.code_of_run: int | None = None  # exit code, set when the last save is done
        self._process = os.getpid()
        self._parent = os.getppid() if any(name in os.environ for name in LAUNCHERS) else None
        self._told_at: float | None = None
        self._started = time.monotonic()
        self.most_seconds: float | None = None  # since this object was made; then the run is to stop

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived, the launcher has ended or the time is over."""
        if self._told_at is None and self._parent not in (None, os.getppid()):
            self._note("the process that started this one is gone")
        limit = float("inf") if self.most_seconds is None else self.most_seconds
        if self._told_at is None and time.monotonic() - self._started > limit:
            self._note("--max_train_minutes are over")
        return self._told_at is not None

    def check(self) -> None:
        """Raises KeyboardInterrupt if the run should stop before the training."""
        if self.requested and self.interrupts:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Handle signals inside the context. Does nothing in other threads than the main one, as Python requires."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before: dict[signal.Signals, Any] = {}
        hook = sys.unraisablehook

        def unraisable(lost: sys.UnraisableHookArgs) -> None:
            """Ignore an interrupt that arrives in a destructor, where it is lost: `check` raises it again."""
            if self._told_at is None or lost.exc_type is not KeyboardInterrupt:
                hook(lost)

        sys.unraisablehook = unraisable
        for number in SIGNALS:
            if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                before[number] = signal.signal(number, self._handle)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            sys.unraisablehook = hook

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked process: the default action
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self._told_at is None:
            self._note("stopping")
            if self.interrupts:
                raise KeyboardInterrupt
        elif time.monotonic() - self._told_at > TOGETHER or (number == signal.SIGINT and AGENT not in os.environ):
            if self.code_of_run is None:
                write_at_once("\nstopped at once; the newest finished save is whole\n")
            os._exit(EXIT_AT_ONCE if self.code_of_run is None else self.code_of_run)

    def _note(self, why: str) -> None:
        self._told_at = time.monotonic()
        if not self.interrupts and self.code_of_run is None:
            write_at_once(f"\n{why}: finishing this step and saving the state (a second signal: stop at once)\n")


def end_early() -> None:
    """Let signals end the process with EXIT_STOPPED until a StopRequest takes over, since imports take a while."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, lambda number, frame: os._exit(EXIT_STOPPED))


def ignore_signals() -> None:
    """Ignore signals while the process ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_process(code: int) -> NoReturn:
    """Exit one of several processes: like sys.exit, but without finalizing the interpreter.

    Threads of gloo may still be running. One that asks for the interpreter's lock while the interpreter is finalized is
    ended by Python in the middle of C++ code, which calls std::terminate: a finished run would end with SIGABRT.
    """
    logging.shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Block signals inside the context, if the system supports it. Processes started inside never receive any."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def write_at_once(text: str) -> None:
    """Write to stderr from a signal handler. Does nothing if the terminal is closed."""
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), text.encode())
