# SPDX-License-Identifier: Apache-2.0
"""From the pattern of a subset to the indexes of its shards. Each index is made in one pass and then stored."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from library.data.headers import header_of
from library.data.manifest import FOLDER
from library.data.records import SubsetConfig
from library.data.shards.index import IndexBuilder, PictureRow, ShardIndex, read_index
from library.data.shards.parquet import Picture, copied_rows
from library.data.shards.patterns import is_url, local_files
from library.data.shards.reading import digest_of, local_copy, parquet_file
from library.data.shards.remote import remote_files, remote_state
from library.data.shards.shard import PARQUET, TAR, Columns, Shard
from library.data.shards.tars import checked_caption, index_tar
from library.errors import UserError, first_names
from library.log import process_count, process_number, progress

WORKERS = 8


def shards_of(config: SubsetConfig, cache_dir: str | None) -> list[Shard]:
    """The shards of a subset, in the order of its pattern. Raises UserError if one does not exist."""
    assert config.shard_pattern is not None
    key, pattern = config.shard_pattern
    columns = Columns(config.image_column, config.caption_column, config.mask_column, config.reference_column)
    kind = TAR if key == "shards" else PARQUET
    if is_url(pattern):
        if cache_dir is None:
            raise UserError(f"{pattern}: give --cache_dir, a folder for the copies of what lies at a URL")
        with ThreadPoolExecutor(WORKERS) as pool:
            urls = remote_files(pattern)
            states = list(pool.map(remote_state, urls))
        folder = os.path.join(os.path.abspath(cache_dir), key)
        return [Shard(url, kind, folder, columns, *state) for url, state in zip(urls, states)]
    paths, missing = local_files(pattern)
    if missing:
        raise UserError(f"{key}: there is no file {first_names(missing)}")
    found = []
    for path in paths:
        status = os.stat(path)
        folder = os.path.join(os.path.abspath(cache_dir or os.path.join(os.path.dirname(path), FOLDER)), key)
        found.append(Shard(path, kind, folder, columns, status.st_size, status.st_mtime_ns))
    return found


def open_shards(shards: Sequence[Shard]) -> tuple[list[ShardIndex], list[str]]:
    """(indexes of the shards that are whole, problems of the others).

    Processes that start together begin at different shards, and each reuses the indexes that another has finished.
    """
    found = {shard: read_index(shard) for shard in shards}
    todo = [shard for shard, index in found.items() if index is None]
    first = len(todo) * process_number() // process_count()
    todo = todo[first:] + todo[:first]
    problems: dict[Shard, list[str]] = {}
    if todo:
        with ThreadPoolExecutor(WORKERS) as pool, progress(len(todo), "indexing shards", "shards") as bar:
            for shard, result in zip(todo, pool.map(_index, todo)):
                if isinstance(result, ShardIndex):
                    found[shard] = result
                else:
                    problems[shard] = result
                bar.advance()
    return [index for index in found.values() if index is not None], [
        line for s in shards for line in problems.get(s, ())
    ]


def _index(shard: Shard) -> ShardIndex | list[str]:
    """The index of one shard, unless another process has just made it; or the problems of the shard."""
    if (known := read_index(shard)) is not None:
        return known
    try:
        built = _index_parquet(shard) if shard.kind == PARQUET else _index_tar(shard)
    except UserError as error:
        return error.problems
    except OSError as error:
        return [f"{shard.path}: cannot be read ({error.strerror or error})"]
    return built.problems or built.finish()


def _index_tar(shard: Shard) -> IndexBuilder:
    if shard.copy_path is not None:
        with contextlib.suppress(FileNotFoundError):  # there is none, or another process has just removed it
            os.unlink(shard.copy_path)  # of what was at that URL before
    return index_tar(shard, local_copy(shard))


def _index_parquet(shard: Shard) -> IndexBuilder:
    """Index a parquet file and copy its pictures. Raises UserError and OSError."""
    found = IndexBuilder(shard)
    assert shard.copy_path is not None

    def number(row: int, picture: Picture | None, role: str) -> int:
        if picture is None:
            return -1
        name = f"{row}{role}{picture.suffix}"
        width, height, flags, problem = header_of(f"{shard.path}/{name}", picture.data)
        if problem:
            found.problems.append(f"{shard.path}/{name}: {problem}")
        size, digest = len(picture.data), digest_of(picture.data)
        return found.picture(PictureRow(name, picture.start, size, width, height, flags, digest))

    empty: list[str] = []
    with parquet_file(shard) as source:
        for row in copied_rows(shard, source, shard.copy_path):
            if row.picture is None:
                empty.append(str(row.number))
                continue
            picture, mask = number(row.number, row.picture, ""), number(row.number, row.mask, ".mask")
            references = [number(row.number, each, f".reference_{k}") for k, each in enumerate(row.references)]
            try:
                caption = None if row.caption is None else checked_caption(row.caption)
            except ValueError as error:
                found.problems.append(f"{shard.path}/{row.number}: {error}")
                continue
            found.sample(picture, mask, mask, references, caption)
    if empty:
        found.problems.append(f"{shard.path}: {len(empty)} rows have no picture: {first_names(empty)}")
    return found
