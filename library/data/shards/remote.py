# SPDX-License-Identifier: Apache-2.0
"""Shards at URLs, read through fsspec: listing, detecting changes, downloading."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from library.data.caches.store_index import no_space
from library.data.shards.patterns import expand
from library.errors import UserError

CHUNK_BYTES = 1 << 22
CHANGES = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "Last-Modified")  # by file system


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Turn any error of a file system into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{url} does not exist") from None
    except ImportError as error:
        raise UserError(f"{url}: reading it needs another package: {error}") from None
    except Exception as error:  # each file system has its own kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{url}: cannot be read ({reason})") from None


def _opened(url: str) -> tuple[Any, str]:
    """(file system, path in it). Raises UserError."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise UserError(f"{url}: reading it needs the package fsspec: pip install fsspec") from None
    with _told(url):
        return url_to_fs(url)


def remote_files(pattern: str) -> list[str]:
    """The URLs of a pattern. Raises UserError if a `*` matches nothing or the server does not answer."""
    found: dict[str, None] = {}
    for url in expand(pattern):
        if "*" not in url:
            found[url] = None
            continue
        files, path = _opened(url)
        with _told(url):
            names = [files.unstrip_protocol(name) for name in sorted(files.glob(path))]
        if not names:
            raise UserError(f"{url} finds no file")
        found |= dict.fromkeys(names)
    return list(found)


def remote_state(url: str) -> tuple[int, int]:
    """(size, a number that changes with the file), without reading it. Raises UserError."""
    files, path = _opened(url)
    with _told(url):
        facts = files.info(path)
        size = facts["size"]
    if facts.get("type") == "directory":
        raise UserError(f"{url}: is a folder; a file is needed")
    if size is None:
        raise UserError(f"{url}: its server does not say how large it is, which is needed")
    changes = repr([facts.get(name) for name in CHANGES])
    return int(size), int.from_bytes(hashlib.blake2b(changes.encode(), digest_size=7).digest(), "little")


def download(url: str, target: str, size: int) -> None:
    """Download `url` to `target`, completely or not at all. Raises UserError."""
    folder = Path(target).parent
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < size:
        raise no_space(folder, size, f"the copy of {url}")
    files, path = _opened(url)
    part = f"{target}.{uuid.uuid4().hex[:8]}.part"
    try:
        with _told(url), files.open(path, "rb") as source, open(part, "wb") as file:
            shutil.copyfileobj(source, file, CHUNK_BYTES)
        os.replace(part, target)
    finally:
        if os.path.exists(part):
            os.unlink(part)
