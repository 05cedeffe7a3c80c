# SPDX-License-Identifier: Apache-2.0
"""Metadata files of pictures (--in_json of the training), read with all their keys and written atomically.

JSON: an object, picture key -> {"caption", "tags", ...}. JSON Lines (.jsonl): the key is `image_path` of each line.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from library.data.metadata import read_metadata
from library.errors import UserError, first_names
from library.io.atomic import atomic_write
from library.text_files import parse_json

Entries = dict[str, dict[str, Any]]

LINES = ".jsonl"
KEY = "image_path"  # the picture's key in a line


def read_entries(path: Path) -> Entries:
    """Read the entries by picture key. Raises UserError with every mistake in the file."""
    try:
        rows, problems = read_metadata(str(path))
    except OSError as error:
        raise UserError(f"--in_json: {path}: {error.strerror}") from None
    twice = [key for key, count in Counter(row.key for row in rows).items() if count > 1]
    if twice:
        problems.append(f"{path}: pictures with several lines: {first_names(twice)}")
    if problems:
        raise UserError([f"--in_json: {problem}" for problem in problems])
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() != LINES:
        return parse_json(text)
    values = (parse_json(line) for line in text.split("\n") if line.strip())
    return {value.pop(KEY): value for value in values}


def write_entries(path: Path, entries: Entries) -> None:
    """Write a file for `read_entries`; its extension selects the format. Raises SaveError."""
    if path.suffix.lower() == LINES:
        lines = (json.dumps({KEY: key, **values}, ensure_ascii=False) for key, values in entries.items())
        text = "".join(f"{line}\n" for line in lines)
    else:
        text = json.dumps(entries, ensure_ascii=False, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode("utf-8")
    atomic_write(path, lambda temp: temp.write_bytes(data), size=len(data))
