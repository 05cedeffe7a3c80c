# SPDX-License-Identifier: Apache-2.0
"""TOML and JSON as users and other programs write them: whatever is in a file, what is wrong is one line.

Nested ten thousand deep, integers of thousands of digits and keys that stand there twice are mistakes of the file.
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

MOST_NESTED = 64  # levels; nothing that people write has more than a handful
QUOTED = re.compile(r'"(?:\\.|[^"\\])*"|\'[^\']*\'')
TOO_DEEP = "is nested too deeply"
TOO_LONG = "holds a whole number with too many digits"


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """A JSON document. Raises ValueError that says what is wrong, after the name of a file: `line 3 is not valid JSON`.

    Bytes are UTF-8 (or what JSON allows besides). finite: NaN and infinities, which programs write all the same, are
    refused.
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
    except ValueError:  # of int(): only so many digits are converted
        raise ValueError(TOO_LONG) from None


class _Refused(ValueError):
    """What is well-formed and still not taken."""


def _refuse_constant(word: str) -> float:
    raise _Refused(f"holds {word}, which is not a JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values under one name the first would be lost without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise _Refused(f"has keys that stand there several times: {first_names(twice)}")
    return found


def _not_too_deep(document: Any) -> Any:
    """`document`, when everything that walks through it can. Raises ValueError."""
    level = [document] if isinstance(document, (dict, list)) else []
    for _ in range(MOST_NESTED):
        inner = (v for item in level for v in (item.values() if isinstance(item, dict) else item))
        level = [v for v in inner if isinstance(v, (dict, list))]
        if not level:
            return document
    raise _Refused(TOO_DEEP)


def read_text(path: Path, what: str, kind: str) -> str:
    """A UTF-8 text file. Raises UserError naming `what` asked for it; `kind` says what is needed ("a TOML file")."""
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
    """A JSON file. Raises UserError naming `what`, the file and the line."""
    try:
        return parse_json(read_text(path, what, kind))
    except ValueError as error:
        raise UserError(f"{what}: {file_and(path, error)}") from None


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """A TOML file as a dict. Raises UserError naming `what`, the file and the line."""
    text = read_text(path, what, "a TOML file")
    if any(_long_key(line) for line in text.split("\n")):  # the parser would take minutes
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
    except ValueError as error:  # digits again, or a date that does not exist
        reason = TOO_LONG if "digits" in str(error) else f"is not valid TOML: {error}"
        raise UserError(f"{what}: {path} {reason}") from None


def _long_key(line: str) -> bool:
    """Whether a line of TOML begins with a key of more parts than anything may be nested: `a.b.c...`."""
    parts = QUOTED.sub("_", line).partition("=")[0].split(".")
    return len(parts) > MOST_NESTED and all(part.strip() for part in parts)


def file_and(path: str | Path, error: ValueError) -> str:
    """`file, line 3 is ...` or `file is ...`."""
    reason = str(error)
    return f"{path}, {reason}" if reason.startswith("line ") else f"{path} {reason}"
