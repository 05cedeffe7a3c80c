# SPDX-License-Identifier: Apache-2.0
"""Curves that cannot be written any more."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from library.log import setup_logging
from library.trainers.options import LoggingOptions
from library.trainers.tracking import open_trackers

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of that kind")


@pytest.mark.parametrize("limit", [0, 20_000])
def test_a_full_disk_ends_the_curves_with_one_line(limit: int, tmp_path: Path) -> None:
    """Full from the start, or later: the training sees nothing of it, and nothing else is printed."""
    output = tmp_path / "output"
    process = os.fork()
    if process == 0:
        import resource

        code = 1
        try:
            sys.stderr = output.open("w", encoding="utf-8")
            setup_logging(level=None, file=None, simple=True)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit or 600,) * 2)
            folder = tmp_path / "logs"
            trackers = open_trackers(LoggingOptions(logging_dir=str(folder)), main_process=True, project="p")
            for step in range(2000):
                trackers.scalars({"loss": 1.0}, step)
                trackers.text("config", "x" * 100)
            trackers.close()
            code = 0 if trackers.trackers == [] else 2
            sys.stderr.flush()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    text = output.read_text(encoding="utf-8")
    assert text.count("no more curves are written, the training goes on") == 1 and "Traceback" not in text, text
    assert "--logging_dir: " in text and "File too large" in text
