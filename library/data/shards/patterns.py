# SPDX-License-Identifier: Apache-2.0
"""Expand patterns of a dataset file: `pictures/{000..019}.tar`, `pictures/*.tar`, `s3://bucket/{a,b}.tar`."""

from __future__ import annotations

import glob
import itertools
import os
import re

from library.errors import UserError

MOST_FILES = 100_000
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def is_url(pattern: str) -> bool:
    """Whether fsspec reads it: `s3://...`, `https://...`, and chains of file systems such as `zip::s3://...`."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:(:|//)", pattern) is not None


def expand(pattern: str) -> list[str]:
    """The pattern without braces, in order: `{000..019}` are numbers with leading zeros, `{a,b}` words.

    Raises UserError for more than MOST_FILES names.
    """
    pieces: list[list[str]] = []
    end, count = 0, 1
    for found in BRACES.finditer(pattern):
        first, last, words = found.groups()
        choices = words.split(",") if words is not None else _numbers(pattern, first, last)
        count *= len(choices)
        _limit(pattern, count)
        pieces += [[pattern[end : found.start()]], choices]
        end = found.end()
    return list(dict.fromkeys(map("".join, itertools.product(*pieces, [pattern[end:]]))))


def _numbers(pattern: str, first: str, last: str) -> list[str]:
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
    low, high = sorted((int(first), int(last)))
    _limit(pattern, high - low + 1)
    return [f"{number:0{width}d}" for number in range(low, high + 1)]


def _limit(pattern: str, count: int) -> None:
    if count > MOST_FILES:
        raise UserError(f"{pattern} means {count:,} files; at most {MOST_FILES:,} are possible")


def local_files(pattern: str) -> tuple[list[str], list[str]]:
    """(absolute paths of the files that exist, names and patterns without a file), both in the order of the pattern."""
    found: dict[str, None] = {}
    missing = []
    for name in expand(pattern):
        names = [name] if os.path.isfile(name) or not glob.has_magic(name) else sorted(glob.glob(name, recursive=True))
        files = [os.path.abspath(each) for each in names if os.path.isfile(each)]
        if not files:
            missing.append(name)
        found |= dict.fromkeys(files)
    return list(found), missing
