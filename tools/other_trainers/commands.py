# SPDX-License-Identifier: Apache-2.0
"""Commands in text files: `accelerate launch train_something.py --name value ...`, with variables of the shell."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from library.errors import UserError
from tools.other_trainers.keys import number_or_word

ASSIGNMENT = re.compile(r"^\s*(?:export\s+|set\s+)?([A-Za-z_]\w*)=(.*)$")
VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")


def read_command(text: str, path: Path) -> tuple[str, dict[str, Any]]:
    """The script, without folder and ending, and the options of the one command in a text. Raises UserError."""
    joined = re.sub(r"[\\`^][ \t]*\r?\n", " ", text)
    variables: dict[str, str] = {}
    for line in joined.splitlines():
        words = _words(line, path)
        found = ASSIGNMENT.match(line)
        script = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
        if found and script is None:
            variables[found[1]] = "".join(_words(found[2], path))
        elif script is not None:
            own = [VARIABLE.sub(lambda match: variables.get(match[1], match[0]), word) for word in words[script:]]
            return Path(own[0]).stem, options_of(own[1:])
    raise UserError(f"{path}: holds no command of a Python script")


def _words(line: str, path: Path) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as a command: {str(error).lower()}") from None


def options_of(words: list[str]) -> dict[str, Any]:
    """The options among words: a switch is true, one with several values a list."""
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = number_or_word(value) if equals else True
        elif name:
            value, now = number_or_word(word), found[name]
            found[name] = value if now is True else [*(now if isinstance(now, list) else [now]), value]
    return found
