# SPDX-License-Identifier: Apache-2.0
"""What a scan learnt about the files of a folder, kept so that the next start need not open them again.

One JSON file per picture folder, written to a temporary name and renamed: two processes may scan at once, the last one
wins, and a reader sees a whole file. An entry counts only while size and modification time of its file are the same. A
folder that cannot be written has no manifest, which costs time and nothing else. Columns instead of rows, and numbers
as base64 of 64-bit integers: plain JSON columns take twice as long to parse and to make, SQLite rows more than that.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.text_files import parse_json

VERSION = 2
FOLDER = ".trainyard"

# A file that changed this recently could change again without a new modification time (FAT counts in steps of 2 s)
SETTLED_NS = 2_000_000_000
_EARLIEST_NS = -(2**63)  # what 64 bits hold, the year 1677; NTFS has files of 1601


# Plain tuples: 200,000 of them are made at every start
ImageRow = tuple[int, int, int, int, int]  # file size, modification time in ns, width, height, flags (see `headers`)
TextRow = tuple[int, int, str]  # file size, modification time in ns, whole text of the file


@dataclass
class Manifest:
    """File name -> what is known of it. Only whole, readable files are remembered."""

    images: dict[str, ImageRow] = field(default_factory=dict)
    texts: dict[str, TextRow] = field(default_factory=dict)


def manifest_path(folder: str, cache_dir: str | None) -> Path:
    """Where the manifest of `folder` lies: inside it, or in the cache folder under a name made from its path."""
    if cache_dir is None:
        return Path(folder, FOLDER, "files.json")
    return Path(cache_dir, f"files-{hashlib.blake2b(os.fsencode(folder), digest_size=8).hexdigest()}.json")


def read_manifest(path: Path) -> Manifest:
    """The manifest in `path`; an empty one where there is none, or a damaged or older one."""
    try:
        if not path.is_file():  # opening a pipe would wait for a writer
            return Manifest()
        document = parse_json(path.read_bytes())
        if document["version"] != VERSION:
            return Manifest()
        return Manifest(
            _rows(document["images"], (int, int, int, int, int)),
            _rows(document["texts"], (int, int, str)),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, struct.error, RecursionError):
        return Manifest()


def write_manifest(path: Path, manifest: Manifest) -> bool:
    """Write the manifest. False where the folder cannot be written."""
    limit = time.time_ns() - SETTLED_NS
    document = {
        "version": VERSION,
        "images": _columns(manifest.images, limit),
        "texts": _columns(manifest.texts, limit),
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(document, separators=(",", ":")), encoding="ascii")
        os.replace(temporary, path)
        return True
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False


def _columns(rows: dict[str, Any], limit: int) -> list[list[str] | str]:
    """The names with slashes between, then a column for each field of the rows; without times from `limit` on."""
    names = [name for name, row in rows.items() if _EARLIEST_NS <= row[1] < limit]
    columns = zip(*(rows[name] for name in names))
    return ["/".join(names), *(_packed(column) if isinstance(column[0], int) else list(column) for column in columns)]


def _rows(columns: list[Any], types: tuple[type, ...]) -> dict[str, Any]:
    """Name -> row. Raises ValueError, TypeError or struct.error when the columns hold or are something else."""
    joined, *values = columns
    if not isinstance(joined, str):
        raise TypeError("the names are not text")
    if not joined:
        return {}
    names = joined.split("/")
    if len(values) != len(types):
        raise ValueError("a column is missing")
    count = len(names)
    pairs = zip(values, types)
    fields = [_unpacked(column, count) if wanted is int else _texts(column, count) for column, wanted in pairs]
    return dict(zip(names, zip(*fields)))


def _packed(numbers: Sequence[int]) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}q", *numbers)).decode("ascii")


def _unpacked(column: str, count: int) -> Iterable[int]:
    return struct.unpack(f"<{count}q", base64.b64decode(column))


def _texts(column: list[str], count: int) -> Iterable[str]:
    if len(column) != count or set(map(type, column)) != {str}:
        raise ValueError("a column is too short or not all text")
    return column
