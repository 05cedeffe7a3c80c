# SPDX-License-Identifier: Apache-2.0
"""Read the bytes of a picture from its shard."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from library.data.file_hashes import DIGEST_BYTES
from library.data.shards.parquet import copied_rows
from library.data.shards.patterns import is_url
from library.data.shards.remote import download
from library.data.shards.shard import PARQUET, Member, Shard
from library.errors import UserError


def digest_of(data: bytes) -> bytes:
    """Digest of the content of a picture, the same that `file_hashes` computes for a file."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def read_member(path: str, member: Member) -> bytes:
    """The bytes of the picture `path`. Raises UserError if they have changed since the shard was indexed."""
    try:
        with open(local_copy(member.shard), "rb") as opened:
            opened.seek(member.start)
            data = opened.read(member.length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if digest_of(data) != member.digest:
        reason = "the shard was changed since it was indexed, or is damaged: start again"
        raise UserError(f"{path}: {reason}, after deleting {member.shard.index_path} where that does not help")
    return data


def local_copy(shard: Shard) -> str:
    """The local file that holds the bytes of the shard's pictures; made if it is missing. Raises UserError."""
    copy = shard.copy_path
    if copy is None:
        return shard.path
    if not os.path.exists(copy):
        if shard.kind == PARQUET:
            with parquet_file(shard) as source:
                deque(copied_rows(shard, source, copy), maxlen=0)
        else:
            download(shard.path, copy, shard.size)
    return copy


@contextmanager
def parquet_file(shard: Shard) -> Iterator[str]:
    """A parquet shard as a local file. A downloaded one is removed at the end: its pictures have been copied."""
    if not is_url(shard.path):
        yield shard.path
        return
    source = f"{shard.copy_path}.{uuid.uuid4().hex[:8]}.parquet"
    try:
        download(shard.path, source, shard.size)
        yield source
    finally:
        if os.path.exists(source):
            os.unlink(source)
