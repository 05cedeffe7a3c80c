# SPDX-License-Identifier: Apache-2.0
"""Messages and progress bars do not write over each other, on a terminal and in a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from library.log import progress

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 60
MESSAGES = 5
RUN = f"""
from library.log import get_logger, progress, setup_logging
setup_logging(level=None, file=None, simple=True)
with progress({MESSAGES}, "steps", "step") as bar:
    for step in range({MESSAGES}):
        bar.mininterval = 0  # draw it each time
        bar.advance(note=f"loss {{step / 10}} " + "long " * 20)
        get_logger().info(f"message {{step}}")
"""


def run(stderr: int) -> None:
    done = subprocess.run([sys.executable, "-c", RUN], cwd=ROOT, stderr=stderr)
    assert done.returncode == 0


def screen(written: str) -> list[str]:
    """The lines that a terminal shows of what was written to it."""
    lines = []
    for text in written.split("\n"):
        shown: list[str] = []
        column = 0
        for letter in text:
            column = 0 if letter == "\r" else column
            if letter != "\r":
                shown[column : column + 1] = [letter]
                column += 1
        assert len(shown) <= COLUMNS, "a bar that is longer than a line is not redrawn but repeated"
        lines.append("".join(shown).rstrip())
    return lines


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_messages_stand_above_the_bar_on_a_terminal() -> None:
    import fcntl
    import pty
    import struct
    import termios

    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    run(writer)
    written = os.read(reader, 1 << 20).decode().replace("\r\n", "\n")
    os.close(writer)
    os.close(reader)
    lines = screen(written)
    assert lines[:MESSAGES] == [f"message {step}" for step in range(MESSAGES)]
    bar, after = lines[MESSAGES:]
    assert bar.startswith("steps: 100%|") and f"{MESSAGES}/{MESSAGES} [" in bar and "loss 0.4" in bar and after == ""
    assert "\x1b" not in written, "old consoles of Windows show such sequences as they are"


def test_lines_of_messages_and_bar_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        run(file.fileno())
    text = path.read_text(encoding="utf-8")
    assert text.isprintable() or set(text) - set(filter(str.isprintable, text)) == {"\n"}
    lines = text.splitlines()
    assert [line for line in lines if not line.startswith("steps: ")] == [f"message {n}" for n in range(MESSAGES)]
    assert lines[-1].startswith("steps: 100%|##########| 5/5 [00:00<00:00, ") and "step/s, loss 0.4" in lines[-1]


def test_a_bar_goes_on_where_a_run_was_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(10, "steps", "step", start=4) as bar:
        bar.advance(2, note="loss 0.1")
    assert " 6/10 [00:00<00:00, " in capsys.readouterr().err


def test_only_the_main_process_shows_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress(10, "steps") as bar:
        bar.advance(10, note="loss 0.1")
    assert capsys.readouterr().err == ""
