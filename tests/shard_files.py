# SPDX-License-Identifier: Apache-2.0
"""Writes shards for tests: tars in the layout of WebDataset, and parquet files."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

OLD = 1_600_000_000  # seconds; the index of a file of the last two seconds is not kept


def png(colour: int, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> bytes:
    """A picture of one colour as the bytes of a file."""
    buffer = io.BytesIO()
    Image.new(mode, size, (colour, 255 - colour, colour // 2, 200)[: len(mode)] if len(mode) > 1 else colour).save(
        buffer, "png"
    )
    return buffer.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes] | Sequence[tuple[str, bytes]]) -> Path:
    """A tar with these files, old enough to be trusted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items() if isinstance(files, Mapping) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    os.utime(path, (OLD, OLD))
    return path


def tars_of(folder: Path, target: Path, *, per_shard: int = 2) -> str:
    """The pictures and captions of a folder in tars of so many pictures; returns the pattern of their names."""
    pictures = sorted(folder.glob("*.png"))
    for first in range(0, len(pictures), per_shard):
        files = [file for p in pictures[first : first + per_shard] for file in (p, p.with_suffix(".txt"))]
        write_tar(target / f"{first // per_shard:03d}.tar", [(file.name, file.read_bytes()) for file in files])
    return str(target / f"{{000..{(len(pictures) - 1) // per_shard:03d}}}.tar")


def write_parquet(path: Path, columns: Mapping[str, Sequence[object]], *, row_group_size: int = 2) -> Path:
    """A parquet file with these columns."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), path, row_group_size=row_group_size)
    os.utime(path, (OLD, OLD))
    return path


def parquet_of(folder: Path, path: Path) -> Path:
    """The pictures and captions of a folder as the library `datasets` writes them: a picture is bytes and a name."""
    pictures = sorted(folder.glob("*.png"))
    images = [{"bytes": picture.read_bytes(), "path": picture.name} for picture in pictures]
    return write_parquet(
        path, {"image": images, "text": [picture.with_suffix(".txt").read_text() for picture in pictures]}
    )
