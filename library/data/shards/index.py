# SPDX-License-Identifier: Apache-2.0
"""The index of a shard: the result of one pass over it, as columns in a memory-mapped file.

The file holds a line of JSON, a row for each picture, a row for each sample, the text that these rows point into, and a
checksum. All processes of a machine share the pages of the file, and only the pages in use are read.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import time
import uuid
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from library.data.file_hashes import SETTLED_NS
from library.data.shards.patterns import is_url
from library.data.shards.shard import Shard
from library.text_files import parse_json

VERSION = 1
CHUNK_BYTES = 1 << 22
CHECKSUM_BYTES = 4  # CRC-32 of all bytes before them

# Byte offsets and lengths: of names and captions in the text, of pictures in the shard or its local copy
PICTURE = np.dtype(
    [("name", "<u8"), ("name_length", "<u4"), ("start", "<u8"), ("length", "<u8"), ("width", "<u2"), ("height", "<u2"),
     ("flags", "u1"), ("digest", "V20")]
)  # fmt: skip
# Picture numbers; -1: none. The references of a sample are consecutive. caption_length -1: no caption
SAMPLE = np.dtype(
    [("picture", "<i4"), ("mask", "<i4"), ("control", "<i4"), ("reference", "<i4"), ("references", "<i4"),
     ("caption", "<u8"), ("caption_length", "<i4")]
)  # fmt: skip


class PictureRow(NamedTuple):
    """A picture of a shard. flags: see `headers`."""

    name: str
    start: int
    length: int
    width: int
    height: int
    flags: int
    digest: bytes


class SampleRow(NamedTuple):
    """A sample of a shard: picture numbers (-1: none) and the caption (None: none)."""

    picture: int
    mask: int
    control: int
    references: range
    caption: str | None


class ShardIndex:
    """The index of one shard. left_out: ending -> number of files not read. path: of the index; None: in memory."""

    def __init__(self, shard: Shard, data: bytes | mmap.mmap, path: str | None = None) -> None:
        """Raises ValueError, KeyError or TypeError if the data are not an index."""
        self.shard, self.data, self.path = shard, data, path
        line = data[: data.find(b"\n") + 1]
        header = parse_json(line)
        self.left_out: dict[str, int] = header["left_out"]
        self.state = (header["version"], header["size"], header["mtime_ns"])
        second = len(line) + header["pictures"] * PICTURE.itemsize
        self.text = second + header["samples"] * SAMPLE.itemsize
        if len(data) != self.text + header["text"] + CHECKSUM_BYTES:
            raise ValueError("the index has another length than it says")
        self.pictures = np.frombuffer(data, PICTURE, header["pictures"], len(line))
        self.samples = np.frombuffer(data, SAMPLE, header["samples"], second)

    def __len__(self) -> int:
        return len(self.samples)

    def __reduce__(self) -> tuple:
        """Pickle the path: another process maps the same file."""
        return (ShardIndex, (self.shard, self.data)) if self.path is None else (_mapped, (self.shard, self.path))

    @property
    def texts(self) -> memoryview:
        """All names and captions."""
        return memoryview(self.data)[self.text : len(self.data) - CHECKSUM_BYTES]

    def picture(self, number: int) -> PictureRow:
        name, name_length, *rest = self.pictures[number].item()
        return PictureRow(self._text(name, name_length), *rest)

    def sample(self, number: int) -> SampleRow:
        picture, mask, control, reference, references, caption, length = self.samples[number].item()
        text = self._text(caption, length) if length >= 0 else None
        return SampleRow(picture, mask, control, range(reference, reference + references), text)

    def name_of(self, sample: int) -> str:
        """Name of a sample's picture."""
        return self.picture(int(self.samples["picture"][sample])).name

    def _text(self, start: int, length: int) -> str:
        start += self.text
        return self.data[start : start + length].decode("utf-8", errors="surrogateescape")


def _mapped(shard: Shard, path: str) -> ShardIndex:
    """The index in the file `path`. Raises OSError, ValueError, KeyError or TypeError."""
    with open(path, "rb") as file:
        return ShardIndex(shard, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path)


def read_index(shard: Shard) -> ShardIndex | None:
    """The stored index of a shard; None if there is none, or it is damaged or describes another state of the shard."""
    try:
        if not _is_whole(shard.index_path):
            return None
        found = _mapped(shard, shard.index_path)
        return found if found.state == (VERSION, shard.size, shard.mtime_ns) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_whole(path: str) -> bool:
    """Whether a file ends with its checksum. It is read, not mapped: its pages do not count as this process's."""
    total, last = 0, b""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            chunk = last + chunk
            chunk, last = chunk[:-CHECKSUM_BYTES], chunk[-CHECKSUM_BYTES:]
            total = zlib.crc32(chunk, total)
    return last == total.to_bytes(CHECKSUM_BYTES, "little")


class IndexBuilder:
    """Collects the pictures, samples and problems of a shard."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.problems: list[str] = []  # whole lines
        self.left_out: dict[str, int] = {}
        self._pictures: list[tuple] = []
        self._samples: list[tuple] = []
        self._text = bytearray()

    def picture(self, row: PictureRow) -> int:
        """Add a picture; returns its number."""
        name, *rest = row
        self._pictures.append((*self._add(name.encode(errors="surrogateescape")), *rest))
        return len(self._pictures) - 1

    def sample(self, picture: int, mask: int, control: int, references: Sequence[int], caption: str | None) -> None:
        """Add a sample. references: consecutive picture numbers."""
        first = references[0] if references else -1
        place = (0, -1) if caption is None else self._add(caption.encode())
        self._samples.append((picture, mask, control, first, len(references), *place))

    def _add(self, text: bytes) -> tuple[int, int]:
        start = len(self._text)
        self._text += text
        return start, len(text)

    def finish(self) -> ShardIndex:
        """The index; stored if the folder is writable and the shard is old enough for its time to be trusted."""
        body = b"".join(
            (np.array(self._pictures, PICTURE).tobytes(), np.array(self._samples, SAMPLE).tobytes(), bytes(self._text))
        )
        header = {
            "version": VERSION, "size": self.shard.size, "mtime_ns": self.shard.mtime_ns, "left_out": self.left_out,
            "pictures": len(self._pictures), "samples": len(self._samples), "text": len(self._text),
        }  # fmt: skip
        data = json.dumps(header).encode() + b"\n" + body
        data += zlib.crc32(data).to_bytes(CHECKSUM_BYTES, "little")
        settled = is_url(self.shard.path) or time.time_ns() - self.shard.mtime_ns >= SETTLED_NS
        if settled and _write(self.shard.index_path, data):
            return _mapped(self.shard, self.shard.index_path)
        return ShardIndex(self.shard, data)


def _write(path: str, data: bytes) -> bool:
    """Write a file completely or not at all. False if it cannot be written."""
    part = f"{path}.{uuid.uuid4().hex[:8]}.part"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
        os.replace(part, path)
        return True
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(part)
        return False
