# SPDX-License-Identifier: Apache-2.0
"""Errors for the user, one line per mistake, and the exit codes of a run."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

MOST_OF_A_KIND = 10  # lines of a kind that are shown; more are only counted
LONGEST_LINE = 2000
LONGEST_NAME = 200  # letters; similar names are not searched for longer ones
LONGEST_LIST = 300  # letters; longer lists of known names are not shown
# C0, C1 and other characters that start a new line on a terminal -> their escapes
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
CONTROLS |= {9: "\\t", 10: "\\n", 13: "\\r", 0x2028: "\\u2028", 0x2029: "\\u2029"}
# Parts in which lines of one kind may differ, besides paths: hints, unknown options, quoted names, numbers
NAMES = re.compile(r"Did you mean .*|(?<=nknown option )\S+|'[^']*'|\d+")

EXIT_BAD_INPUT = 2
EXIT_STOPPED = 3  # Ctrl-C, SIGTERM, SIGHUP, or the launcher has ended: the step was finished and the state saved
EXIT_DIVERGED = 4  # non-finite loss or gradients
EXIT_PROCESS_DIED = 5  # a process that the run needs was killed, for example for memory: the state was saved
EXIT_AT_ONCE = 130  # a second signal


class UserError(Exception):
    """Bad input: one or more lines that are shown without a traceback; the script ends with exit code 2.

    Each line names the file or option, what is wrong with it, and the nearest valid value.
    """

    code = EXIT_BAD_INPUT
    only_here = False  # whether of several processes this one knows what happened, so that it must tell

    def __init__(self, problems: str | Iterable[str]):
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def lines(self) -> list[str]:
        """Lines to show: one per problem, at most ten per kind and per file, then the number of the others."""
        found = [one_line(problem) for problem in self.problems]
        return [*_fewer(list(_fewer(found, _kind, "of this kind")), _place, "mistakes")]


def raise_problems(problems: Iterable[str]) -> None:
    """Raise UserError with these lines, when there are any."""
    found = list(problems)
    if found:
        raise UserError(found)


@contextmanager
def retold(line: Callable[[str], str]) -> Iterator[None]:
    """Context in which `line` rewrites every problem of a UserError, for example to put the file's name before it."""
    try:
        yield
    except UserError as error:
        raise UserError(map(line, error.problems)) from None


class ProcessDied(UserError):
    """A process that the training needs was killed by the system or another program."""

    code = EXIT_PROCESS_DIED


class StopTraining(Exception):
    """The run must end now without overwriting any file, for example because the loss is not finite."""

    def __init__(self, message: str, *, only_here: bool = False) -> None:
        """only_here: of several processes this one knows what happened, so that it must tell."""
        super().__init__(message)
        self.only_here = only_here


def how_many_shown(count: int) -> int:
    """Number of lines to show out of `count`: all, or one less than the limit, for a last line with the count."""
    return count if count <= MOST_OF_A_KIND else MOST_OF_A_KIND - 1


def _fewer(lines: list[str], group_of: Callable[[str], str], what: str) -> Iterator[str]:
    """The first lines of each group, followed by a line with the number of the others."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(group_of(line), []).append(line)
    seen = Counter[str]()
    for line in lines:
        group = group_of(line)
        seen[group] += 1
        count, shown = len(groups[group]), how_many_shown(len(groups[group]))
        if seen[group] <= shown:
            yield line
        elif seen[group] == shown + 1:
            places = {_place(other) for other in groups[group]}
            where = f"{places.pop()}: " if len(places) == 1 else ""
            yield f"{where}and {count - shown} more {what}"


def _kind(line: str) -> str:
    return " ".join("#" if "/" in word or "\\" in word else word for word in NAMES.sub("#", line).split(" "))


def _place(line: str) -> str:
    """The file or option that a line is about: the text before its first colon or line number."""
    return re.split(r": |, (?:line|prompt) \d", line, maxsplit=1)[0]


def escaped(text: str) -> str:
    """A text with its control characters escaped: file names may contain line breaks."""
    return text.translate(CONTROLS)


def one_line(text: str) -> str:
    """An escaped text, shortened to LONGEST_LINE letters."""
    shown = escaped(text)
    return shown if len(shown) <= LONGEST_LINE else f"{shown[:LONGEST_LINE]}... ({len(shown)} letters)"


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that is most similar to `name`, None when none is close."""
    if len(name) > LONGEST_NAME:
        return None
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown(what: str, name: str, candidates: Iterable[str], *, kind: str = "key") -> str:
    """One line about an unknown name. what: where it was given, for example "--network_args"."""
    names = sorted(set(candidates))
    hint = nearest(name, names)
    if hint is not None:
        return f"{what}: unknown {kind} '{name}'. Did you mean '{hint}'?"
    if sum(map(len, names)) <= LONGEST_LIST:
        return f"{what}: unknown {kind} '{name}'. Known: {', '.join(names)}"
    near = difflib.get_close_matches(name[:LONGEST_NAME], names, n=3, cutoff=0)
    return (
        f"{what}: unknown {kind} '{name}'. None of the {len(names)} known ones is like it; nearest: {', '.join(near)}"
    )


def unknown_names(what: str, names: Sequence[str], candidates: Iterable[str], *, kind: str = "key") -> Iterator[str]:
    """Lines about unknown names: `unknown` for the first ones, then the number of the others."""
    known = list(candidates)
    shown = how_many_shown(len(names))
    yield from (unknown(what, name, known, kind=kind) for name in names[:shown])
    if len(names) > shown:
        yield f"{what}: and {len(names) - shown} more unknown {kind}s"


def first_names(names: Sequence[str], limit: int = 3) -> str:
    """The first names and the number of the others: `a.png, b.png, c.png and 17 more`."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
