# SPDX-License-Identifier: Apache-2.0
"""Metadata files of pictures: a JSON object, picture name -> values, or JSON Lines with the name as `image_path`."""

from __future__ import annotations

from typing import Any, NamedTuple

from library.text_files import file_and, parse_json
from library.values import shown, text_problem


class MetadataEntry(NamedTuple):
    """What a metadata file says of a picture."""

    key: str  # its name
    caption: str
    tags: str
    references: list[str]


def read_metadata(path: str) -> tuple[list[MetadataEntry], list[str]]:
    """The entries of a JSON or JSON Lines file, and the problems of the file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        return [], [f"{path}: is not UTF-8 text (byte {error.start})"]
    if path.lower().endswith(".jsonl"):
        raw, problems = _json_lines(path, text)
    else:
        raw, problems = _json_object(path, text)
    entries = []
    for where, key, values in raw:
        wrong = _wrong_entry(key, values)
        if wrong:
            problems.append(f"{path}: {where} {wrong}")
            continue
        texts = (values.get("caption") or "", values.get("tags") or "")
        entries.append(MetadataEntry(key, *texts, values.get("references") or []))
    return entries, problems


def _json_object(path: str, text: str) -> tuple[list[tuple[str, Any, Any]], list[str]]:
    try:
        document = parse_json(text)
    except ValueError as error:
        return [], [file_and(path, error)]
    if not isinstance(document, dict):
        return [], [f"{path}: expects an object of picture names, got a {type(document).__name__}"]
    return [(f"entry '{key}'", key, values) for key, values in document.items()], []


def _json_lines(path: str, text: str) -> tuple[list[tuple[str, Any, Any]], list[str]]:
    rows: list[tuple[str, Any, Any]] = []
    problems = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
        except ValueError as error:
            problems.append(f"{path}, line {number} {str(error).removeprefix('line 1 ')}")
            continue
        key = values.get("image_path") if isinstance(values, dict) else None
        rows.append((f"line {number}", key, values))
    return rows, problems


def _wrong_entry(key: Any, values: Any) -> str | None:
    if not isinstance(values, dict):
        return f"expects an object with caption or tags, got {shown(values)}"
    if not isinstance(key, str) or not key:
        return "has no image_path"
    wrong = text_problem(key, path=True)
    if wrong:
        return f"the name of the picture {wrong}"
    for name in ("caption", "tags"):
        if not isinstance(values.get(name), (str, type(None))):
            return f"expects a text as {name}, got {shown(values[name])}"
        wrong = text_problem(values.get(name) or "")
        if wrong:
            return f"{name} {wrong}"
    references = values.get("references") or []
    if not isinstance(references, list) or not all(isinstance(item, str) for item in references):
        return f"expects a list of file names as references, got {shown(references)}"
    wrong = next(filter(None, (text_problem(item, path=True) for item in references)), None)
    return f"the name of a reference picture {wrong}" if wrong else None
