# SPDX-License-Identifier: Apache-2.0
"""Access to paths that are not UTF-8 for libraries that accept UTF-8 paths only."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def plain_path(path: str | Path) -> Iterator[str]:
    """Yield `path` or, if it is not UTF-8, a temporary link to it with a UTF-8 name."""
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
