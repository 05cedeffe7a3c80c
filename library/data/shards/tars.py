# SPDX-License-Identifier: Apache-2.0
"""Tar shards in the layout of WebDataset: files with the same key (the name up to the first dot) are one sample.

    000123.jpg  000123.txt  000123.mask.png  000123.reference_0.png  000123.reference_1.png

The caption is in `.txt`, `.caption` or `.json`. Other files are counted and left out. A tar is read once, in order.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from library.data.folder import IMAGE_EXTENSIONS
from library.data.headers import header_of
from library.data.shards.index import IndexBuilder, PictureRow
from library.data.shards.parquet import CAPTION_NAMES
from library.data.shards.reading import digest_of
from library.data.shards.shard import Shard
from library.errors import first_names
from library.text_files import parse_json
from library.values import text_problem

BLOCK = 512
MOST_PICTURE = 1 << 30  # bytes
MOST_CAPTION = 1 << 20
TEXT_ENDINGS = ("txt", "caption", "json")  # the first of these that a sample has is its caption
PICTURE_KINDS = re.compile(r"(?:(mask|control|reference(?:_(\d{1,4}))?)\.)?([a-z0-9]+)")
COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZ": "bunzip2", b"\xfd7": "xz -d", b"\x28\xb5": "zstd -d"}


@dataclass
class _Files:
    """The files of one key. pictures: role ("", "mask", "control", "reference", ...) -> row."""

    pictures: dict[str, PictureRow] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)  # by ending


def index_tar(shard: Shard, path: str) -> IndexBuilder:
    """Index the tar file `path`: all its samples, in order, and its problems. Raises OSError."""
    found = IndexBuilder(shard)
    keys: dict[str, _Files] = {}
    with open(path, "rb") as file:
        magic = file.read(2)
        names: set[str] = set()
        twice: dict[str, None] = {}
        try:
            for member in _members(file, path):
                if member.name in names:
                    twice[member.name] = None
                names.add(member.name)
                if member.offset_data + member.size > shard.size:
                    raise tarfile.ReadError(f"{member.name} goes beyond its end")
                _take(found, keys, file, member)
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            line = f"is truncated or damaged, or no tar file ({error})"
            if magic in COMPRESSED and not names:  # the first file's name may begin with BZ
                line = f"is compressed, and single pictures of it cannot be read: unpack it once ({COMPRESSED[magic]})"
            found.problems.append(f"{shard.path}: {line}")
            return found
    if twice:
        found.problems.append(f"{shard.path}: files that are in it twice: {first_names(list(twice))}")
    _samples(found, keys)
    return found


def _members(file: BinaryIO, path: str) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar. Raises tarfile.TarError, also if the end-of-archive blocks are missing."""
    file.seek(0)
    with tarfile.open(path, mode="r:", fileobj=file) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it keeps them all
            if member.isreg() and not member.issparse():
                yield member
        file.seek(tar.offset)
        mark = file.read(BLOCK)
    if len(mark) < BLOCK or any(mark):
        raise tarfile.ReadError("the blocks of zeros at its end are missing")


def _take(found: IndexBuilder, keys: dict[str, _Files], file: BinaryIO, member: tarfile.TarInfo) -> None:
    """Read one file of a tar if it is a picture or a caption, else count it."""
    folder, slash, name = member.name.rpartition("/")
    stem, _, ending = name.partition(".")
    ending = ending.lower()
    kind = PICTURE_KINDS.fullmatch(ending)
    is_picture = kind is not None and kind[3] in IMAGE_EXTENSIONS
    if not stem:
        return  # hidden: macOS keeps "._name.jpg" beside "name.jpg"
    if not is_picture and ending not in TEXT_ENDINGS:
        found.left_out[f".{ending}"] = found.left_out.get(f".{ending}", 0) + 1
        return
    place, most = f"{found.shard.path}/{member.name}", MOST_PICTURE if is_picture else MOST_CAPTION
    if member.size > most:
        found.problems.append(f"{place}: is larger than {most >> 20} MB")
        return
    file.seek(member.offset_data)
    data = file.read(member.size)
    files = keys.setdefault(folder + slash + stem, _Files())
    if is_picture:
        assert kind is not None
        role = kind[1] or ""
        if role in files.pictures:
            found.problems.append(
                f"{place}: a second {role or 'picture'} of its key, beside {files.pictures[role].name}"
            )
            return
        width, height, flags, problem = header_of(place, data)
        problem = problem or text_problem(member.name) or ""
        if problem:
            found.problems.append(f"{place}: {problem}")
        row = PictureRow(member.name, member.offset_data, member.size, width, height, flags, digest_of(data))
        files.pictures[role] = row
        return
    try:
        text = _caption(data, ending, found.shard.columns.caption)
        if text is not None:
            files.captions[ending] = text
    except ValueError as error:
        found.problems.append(f"{place}: {error}")


def _caption(data: bytes, ending: str, key: str | None) -> str | None:
    """The caption in a file; None if a JSON file has none. Raises ValueError."""
    if ending != "json":
        try:
            return checked_caption(data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    document = parse_json(data)
    if not isinstance(document, dict):
        raise ValueError(f"expects an object with a caption, got a {type(document).__name__}")
    name = key or next((name for name in CAPTION_NAMES if name in document), None)
    text = document.get(name) if name else None
    if text is not None and not isinstance(text, str):
        raise ValueError(f"expects a text as {name}, got a {type(text).__name__}")
    return None if text is None else checked_caption(text)


def checked_caption(text: str) -> str:
    """A caption without surrounding whitespace. Raises ValueError if it is not valid text."""
    wrong = text_problem(text)
    if wrong:
        raise ValueError(f"the caption {wrong}")
    return text.strip()


def _samples(found: IndexBuilder, keys: dict[str, _Files]) -> None:
    """Add the samples of all keys."""
    alone = [key for key, files in keys.items() if "" not in files.pictures]
    if alone:
        found.problems.append(f"{found.shard.path}: {len(alone)} keys have no picture: {first_names(alone)}")
    for files in keys.values():
        if "" not in files.pictures:
            continue
        rows, captions = files.pictures, files.captions
        picture, mask, control = (found.picture(rows[n]) if n in rows else -1 for n in ("", "mask", "control"))
        names = sorted((n for n in rows if n.startswith("reference")), key=_number_of)
        references = [found.picture(rows[name]) for name in names]
        caption = next((captions[ending] for ending in TEXT_ENDINGS if ending in captions), None)
        found.sample(picture, mask, control, references, caption)


def _number_of(reference: str) -> int:
    """`reference` comes before `reference_0`."""
    number = reference.partition("_")[2]
    return int(number) if number else -1
