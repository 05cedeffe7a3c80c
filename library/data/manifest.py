# SPDX-License-Identifier: Apache-2.0
"""What a scan learnt about the files of a folder, kept so that the next start need not open them again.

One JSON file per picture folder, written to a temporary name and renamed: two processes may scan at once, the last one
wins, and a reader sees a whole file. An entry counts only while size and modification time of its file are the same. A
folder that cannot be written has no manifest, which costs time and nothing else. Columns instead of rows in JSON: for
100,000 pictures it is parsed in 0.10 and made in 0.18 CPU seconds, where SQLite rows took 0.23 and 0.30.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1
FOLDER = ".trainyard"

# A file that changed this recently could change again without a new modification time (FAT counts in steps of 2 s)
SETTLED_NS = 2_000_000_000


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
        document = json.loads(path.read_bytes())
        if document["version"] != VERSION:
            return Manifest()
        return Manifest(
            _rows(document["images"], (int, int, int, int, int)),
            _rows(document["texts"], (int, int, str)),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return Manifest()


def write_manifest(path: Path, manifest: Manifest) -> bool:
    """Writes the manifest, or returns False where the folder cannot be written."""
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


def _columns(rows: dict[str, Any], limit: int) -> list[list]:
    names = [name for name, row in rows.items() if row[1] < limit]
    return [names, *map(list, zip(*(rows[name] for name in names)))]


def _rows(columns: list[list], types: tuple[type, ...]) -> dict[str, Any]:
    """Name -> row. Raises ValueError when the columns do not fit together or hold something else."""
    names, *values = columns
    if not names:
        return {}
    if len(values) != len(types) or any(len(column) != len(names) for column in values):
        raise ValueError("columns of different length")
    for column, wanted in zip(values, types):
        if set(map(type, column)) != {wanted}:
            raise ValueError(f"a column is not all {wanted.__name__}")
    return dict(zip(names, zip(*values)))
