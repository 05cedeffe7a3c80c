# SPDX-License-Identifier: Apache-2.0
"""Parquet files whose rows are pictures with captions.

A single row of a parquet file cannot be read: pictures are stored in compressed pages of many rows. They are therefore
copied once, one after the other, into a file in the cache folder, from which each can be read separately.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from library.data.caches.store_index import no_space
from library.data.shards.shard import Shard
from library.errors import UserError, unknown

ROWS = 32  # that are in memory at once
IMAGE_NAMES = ("image", "jpg", "png", "webp", "img", "image_bytes")
CAPTION_NAMES = ("caption", "text", "prompt", "txt")
OLDEST = 15  # of pyarrow; versions before 14.0.1 run code that a file contains
NO_PYARROW = "reading parquet files needs the package pyarrow: pip install pyarrow"


class Picture(NamedTuple):
    """The bytes of a picture and their offset in the copy. suffix: of its file name, if the row has one."""

    data: bytes
    start: int
    suffix: str


class Row(NamedTuple):
    """A row of a file. picture: None if the row has none."""

    number: int
    picture: Picture | None
    caption: str | None
    mask: Picture | None
    references: tuple[Picture, ...]


class _Names(NamedTuple):
    """The columns that are read; None: no such column."""

    image: str
    caption: str | None
    mask: str | None
    reference: str | None


def copied_rows(shard: Shard, source: str, target: str) -> Iterator[Row]:
    """Yield the rows of the file `source` in order and copy their pictures to `target`, which exists after the last.

    Raises UserError naming the file if it is damaged, lacks a column, or there is no space for the copy.
    """
    folder = Path(target).parent
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < shard.size:
        raise no_space(folder, shard.size, f"the pictures of {shard.path}")
    part = f"{target}.{uuid.uuid4().hex[:8]}.part"
    try:
        with open(part, "wb") as file:
            start = 0

            def place(value: Any) -> Picture | None:
                nonlocal start
                data, suffix = _bytes_of(value)
                if data is None:
                    return None
                file.write(data)
                start += len(data)
                return Picture(data, start - len(data), suffix)

            for number, (image, caption, mask, references) in enumerate(_values(shard, source)):
                several = references if isinstance(references, list) else [references]
                placed = (place(each) for each in several)
                yield Row(number, place(image), caption, place(mask), tuple(p for p in placed if p is not None))
        os.replace(part, target)
    finally:
        if os.path.exists(part):
            os.unlink(part)


def _values(shard: Shard, source: str) -> Iterator[tuple[Any, str | None, Any, Any]]:
    """(image, caption, mask, references) of each row, as the file has them."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{shard.path}: {NO_PYARROW}") from None
    if int(pyarrow.__version__.partition(".")[0]) < OLDEST:
        raise UserError(f"{shard.path}: pyarrow {pyarrow.__version__} is too old to be safe: pip install -U pyarrow")
    with _told(shard), pyarrow.parquet.ParquetFile(source) as file:
        names = _chosen(shard, file.schema_arrow)
        columns = [name for name in names if name is not None]
        for batch in file.iter_batches(batch_size=ROWS, columns=columns):
            found = {name: batch.column(name).to_pylist() for name in dict.fromkeys(columns)}
            nothing = [None] * batch.num_rows
            yield from zip(*(nothing if name is None else found[name] for name in names))


@contextmanager
def _told(shard: Shard) -> Iterator[None]:
    """Turn what pyarrow raises for damaged files into a UserError of one line."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{shard.path}: is damaged or no parquet file ({reason})") from None


def _chosen(shard: Shard, schema: Any) -> _Names:
    """The columns of the file that are read. Raises UserError if one is missing or has the wrong type."""
    import pyarrow.types as kinds

    def column(key: str, given: str | None, usual: Sequence[str]) -> str | None:
        if given is not None and given not in schema.names:
            raise UserError(unknown(f"{shard.path}: {key}", given, schema.names, kind="column"))
        return given or next((name for name in usual if name in schema.names), None)

    own = shard.columns
    image = column("image_column", own.image, IMAGE_NAMES)
    if image is None:
        names = ", ".join(schema.names)
        raise UserError(f"{shard.path}: no column of pictures is known; name one of {names} with image_column")
    found = _Names(
        image,
        column("caption_column", own.caption, CAPTION_NAMES),
        column("mask_column", own.mask, ()),
        column("reference_column", own.reference, ()),
    )
    for name, key in ((found.image, "image"), (found.mask, "mask"), (found.reference, "reference")):
        if name is None:
            continue
        kind = schema.field(name).type
        if key == "reference" and (kinds.is_list(kind) or kinds.is_large_list(kind)):
            kind = kind.value_type
        inner = kind.field("bytes").type if kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not (kinds.is_binary(inner) or kinds.is_large_binary(inner)):
            raise UserError(f"{shard.path}: {key}_column {name} holds {kind}; needed are the bytes of picture files")
    kind = None if found.caption is None else schema.field(found.caption).type
    if kind is not None and not (kinds.is_string(kind) or kinds.is_large_string(kind)):
        raise UserError(f"{shard.path}: caption_column {found.caption} holds {kind}; a text is needed")
    return found


def _bytes_of(value: Any) -> tuple[bytes | None, str]:
    """(bytes, suffix of the file name): of bytes, or of a record with `bytes` and perhaps `path`, as `datasets` has."""
    if not isinstance(value, dict):
        return value or None, ""
    name = value.get("path")
    return value["bytes"] or None, os.path.splitext(name)[1].lower() if isinstance(name, str) else ""
