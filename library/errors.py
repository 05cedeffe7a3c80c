# SPDX-License-Identifier: Apache-2.0
"""What a user did wrong, said in one line each; how a run can end, and with which exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

EXIT_BAD_INPUT = 2
EXIT_STOPPED = 3  # Ctrl-C, SIGTERM, SIGHUP, or the launcher is gone: the step was finished and the state saved
EXIT_DIVERGED = 4  # non-finite loss or gradients
EXIT_PROCESS_DIED = 5  # a process that the run needs was killed, for example for memory: the state was saved
EXIT_AT_ONCE = 130  # a second signal


class UserError(Exception):
    """Bad input: one or more clear lines, shown without a traceback; the script ends with exit code 2.

    Each line names the file or option, says what is wrong and what the nearest right thing is.
    """

    code = EXIT_BAD_INPUT

    def __init__(self, problems: str | Iterable[str]):
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ProcessDied(UserError):
    """A process that the training needs was killed from outside."""

    code = EXIT_PROCESS_DIED


class StopTraining(Exception):
    """The run must end now and nothing may be written over a good file (non-finite loss, for example)."""


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that looks most like `name`, or None when none is close."""
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown(what: str, name: str, candidates: Iterable[str], *, kind: str = "key") -> str:
    """One line about an unknown name of some kind: `what` says where it stands, for example "--network_args"."""
    names = sorted(set(candidates))
    hint = nearest(name, names)
    if hint is not None:
        return f"{what}: unknown {kind} '{name}'. Did you mean '{hint}'?"
    return f"{what}: unknown {kind} '{name}'. Known: {', '.join(names)}"


def first_names(names: Sequence[str], limit: int = 3) -> str:
    """The first few names and how many more there are: `a.png, b.png, c.png and 17 more`."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
