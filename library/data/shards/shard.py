# SPDX-License-Identifier: Apache-2.0
"""Shards: tar or parquet files that hold many pictures, and the location of a picture inside one."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import NamedTuple

from library.data.shards.patterns import is_url

TAR, PARQUET = "tar", "parquet"


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a parquet file, and of the caption in a `.json` of a tar; None: the usual ones."""

    image: str | None = None
    caption: str | None = None
    mask: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Shard:
    """A shard as the scan saw it. path: absolute, or a URL. folder: of its index and its local copy."""

    path: str
    kind: str  # TAR or PARQUET
    folder: str
    columns: Columns
    size: int
    mtime_ns: int  # of a URL: a number that changes with the file

    @property
    def home(self) -> str:
        """The folder of the shard; for a URL, that of its copy."""
        return self.folder if is_url(self.path) else os.path.dirname(self.path)

    @property
    def index_path(self) -> str:
        return f"{self._kept}.index"

    @property
    def copy_path(self) -> str | None:
        """The local file with the bytes of its pictures; None if they are read from `path` itself."""
        if self.kind == PARQUET:
            return f"{self._kept}.pictures"
        return f"{self._kept}.tar" if is_url(self.path) else None

    @property
    def _kept(self) -> str:
        """Common prefix of the paths of its index and its copy."""
        identity = repr((self.path, self.kind, self.columns)).encode(errors="surrogatepass")
        name = os.path.basename(self.path).partition("?")[0][:100]
        return os.path.join(self.folder, f"{name}-{hashlib.blake2b(identity, digest_size=8).hexdigest()}")


class Member(NamedTuple):
    """A picture inside a shard: `length` bytes from `start`."""

    shard: Shard
    start: int
    length: int
    digest: bytes
