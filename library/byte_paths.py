# SPDX-License-Identifier: Apache-2.0
"""Paths whose names are not UTF-8, for libraries that know such names only."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def plain_path(path: str | Path) -> Iterator[str]:
    """`path`, or where its name is not UTF-8 a link to it that has a plain one, as long as the context lasts."""
    text = os.path.abspath(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = os.path.join(folder, "link" + os.path.splitext(os.fsencode(text))[1].decode("ascii", "ignore"))
            os.symlink(text, link)
            yield link
    else:
        yield str(path)
