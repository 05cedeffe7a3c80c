# SPDX-License-Identifier: Apache-2.0
"""What asks a run to stop: Ctrl-C, SIGTERM, SIGHUP (a closed terminal), and the end of the launcher.

Before the training it interrupts what is under way. In the training it is only noted: the step is finished and the
state saved. A second signal ends the process at once. No torch here: the handler must be there before the imports.
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

TOGETHER = 1.0  # seconds: `timeout`, systemd and torchrun signal a process, and its group again right after
SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if sys.platform != "win32" else [])]
# set by `accelerate launch` and by torchrun for the processes that they start
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
AGENT = "TORCHELASTIC_RUN_ID"  # its process passes Ctrl-C on, so that it comes twice


class StopRequest:
    """Whether the run was asked to stop, by whatever means."""

    def __init__(self) -> None:
        self.interrupts = True  # KeyboardInterrupt at the first signal; False: it is only noted
        self.code_of_run: int | None = None  # of a run whose last save is done
        self._process = os.getpid()
        self._parent = os.getppid() if any(name in os.environ for name in LAUNCHERS) else None
        self._told_at: float | None = None

    @property
    def requested(self) -> bool:
        """True from the first signal on, or since the launcher is gone."""
        if self._told_at is None and self._parent not in (None, os.getppid()):
            self._note("the process that started this one is gone")
        return self._told_at is not None

    def check(self) -> None:
        """Raises KeyboardInterrupt where the run should stop before the training."""
        if self.requested and self.interrupts:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Inside it signals are handled here. In another thread than the main one, Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before: dict[signal.Signals, Any] = {}
        hook = sys.unraisablehook

        def unraisable(lost: sys.UnraisableHookArgs) -> None:
            """An interrupt that comes while an object is destroyed is lost there: `check` raises it again."""
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
        if os.getpid() != self._process:  # a process forked from this one, which ends as any other
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
    """Until a StopRequest takes over, signals end the process with its code: imports come first, and take a while."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, lambda number, frame: os._exit(EXIT_STOPPED))


def ignore_signals() -> None:
    """Until the end of the process, which has nothing to do any more but to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_process(code: int) -> NoReturn:
    """Exit one of several processes: like sys.exit, but without taking the interpreter apart.

    Threads of gloo may still be at work. One that asks for the interpreter's lock while the interpreter is finalized is
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
    """Inside it signals wait, where the system can do that. Processes that are started inside never see any."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def write_at_once(text: str) -> None:
    """To stderr from inside a signal handler. The terminal may be gone."""
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), text.encode())
