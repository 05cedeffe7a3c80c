# SPDX-License-Identifier: Apache-2.0
"""TOML and JSON files of users and other programs. Every mistake in a file is reported in one line.

Deep nesting, integers with thousands of digits and duplicate keys are mistakes, too.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from library.errors import UserError, first_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_NESTED = 64  # levels; files in practice have a handful
QUOTED = re.compile(r'"(?:\\.|[^"\\])*"|\'[^\']*\'')
TOO_DEEP = "is nested too deeply"
TOO_LONG = "holds a whole number with too many digits"


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """Parse a JSON document. Raises ValueError with a text to follow the file's name: `line 3 is not valid JSON`.

    Bytes are UTF-8 (or another encoding that JSON allows). finite: refuse NaN and infinities, which are not valid JSON,
    but which some programs write.
    """
    try:
        constant = _refuse_constant if finite else float
        return _not_too_deep(json.loads(text, object_pairs_hook=_once, parse_constant=constant))
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} is not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except _Refused:
        raise
    except ValueError:  # int() converts a limited number of digits
        raise ValueError(TOO_LONG) from None


class _Refused(ValueError):
    """The document is well-formed, but not accepted."""


def _refuse_constant(word: str) -> float:
    raise _Refused(f"holds {word}, which is not a JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys, whose first values would be lost silently. Raises ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise _Refused(f"has keys that stand there several times: {first_names(twice)}")
    return found


def _not_too_deep(document: Any) -> Any:
    """`document`, if it is not nested too deeply to be processed. Raises ValueError."""
    level = [document] if isinstance(document, (dict, list)) else []
    for _ in range(MOST_NESTED):
        inner = (v for item in level for v in (item.values() if isinstance(item, dict) else item))
        level = [v for v in inner if isinstance(v, (dict, list))]
        if not level:
            return document
    raise _Refused(TOO_DEEP)


def read_text(path: Path, what: str, kind: str) -> str:
    """Read a UTF-8 text file. what: the option that names it; kind: what is expected, such as "a TOML file".

    Raises UserError.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{what}: {path} is a folder; {kind} is needed") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: {path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read: {error.strerror or error}") from None


def read_json(path: Path, what: str, kind: str = "a JSON file") -> Any:
    """Read a JSON file. Raises UserError with `what`, the file and the line."""
    try:
        return parse_json(read_text(path, what, kind))
    except ValueError as error:
        raise UserError(f"{what}: {file_and(path, error)}") from None


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Read a TOML file. Raises UserError with `what`, the file and the line."""
    text = read_text(path, what, "a TOML file")
    if any(_long_key(line) for line in text.split("\n")):  # the parser would take minutes for it
        raise UserError(f"{what}: {path} {TOO_DEEP}")
    try:
        return _not_too_deep(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        reason, _, place = str(error).partition(" (at ")
        number = re.match(r"line (\d+)", place)
        line = int(number.group(1)) if number else text.rstrip("\n").count("\n") + 1  # "end of document"
        raise UserError(f"{what}: {path}, line {line} is not valid TOML: {reason}") from None
    except (RecursionError, _Refused):
        raise UserError(f"{what}: {path} {TOO_DEEP}") from None
    except ValueError as error:  # too many digits, or an invalid date
        reason = TOO_LONG if "digits" in str(error) else f"is not valid TOML: {error}"
        raise UserError(f"{what}: {path} {reason}") from None


def _long_key(line: str) -> bool:
    """Whether a line of TOML starts with a dotted key, `a.b.c...`, of more than MOST_NESTED parts."""
    parts = QUOTED.sub("_", line).partition("=")[0].split(".")
    return len(parts) > MOST_NESTED and all(part.strip() for part in parts)


def file_and(path: str | Path, error: ValueError) -> str:
    """Combine a file's name and an error of `parse_json`: `file, line 3 is ...` or `file is ...`."""
    reason = str(error)
    return f"{path}, {reason}" if reason.startswith("line ") else f"{path} {reason}"
