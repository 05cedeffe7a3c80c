# SPDX-License-Identifier: Apache-2.0
"""Whole or not there: real processes that are killed, disks that are full, two writers at once."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from library.io.atomic import (
    SaveError,
    atomic_folder,
    atomic_write,
    clean_leftovers,
    read_temp_name,
    remove_folder,
    temp_name,
)

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name == "nt", reason="signals and resource limits of POSIX")

# A file is whole when its last 64 characters are the sha256 of what stands before them.
WRITER = """
import hashlib, os, sys
from pathlib import Path
from library.io.atomic import atomic_folder, atomic_write

folder, rounds = Path(sys.argv[1]), int(sys.argv[2])

def sealed(number):
    body = (f"{os.getpid()} {number} " * 20000).encode()
    return body + hashlib.sha256(body).hexdigest().encode()

print("ready", flush=True)
for number in range(rounds):
    data = sealed(number)
    atomic_write(folder / "name.bin", lambda temp: temp.write_bytes(data), size=len(data))
    with atomic_folder(folder / "name-state") as temp:
        (temp / "a.bin").write_bytes(data)
        (temp / "inner").mkdir()
        (temp / "inner" / "b.bin").write_bytes(data)
"""


def is_whole(path: Path) -> bool:
    data = path.read_bytes()
    return hashlib.sha256(data[:-64]).hexdigest().encode() == data[-64:]


def start_writer(folder: Path, rounds: int) -> subprocess.Popen[str]:
    code = textwrap.dedent(WRITER)
    command = [sys.executable, "-c", code, str(folder), str(rounds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def assert_all_whole(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["name-state", "name.bin"]
    assert is_whole(folder / "name.bin")
    state = folder / "name-state"
    assert sorted(str(p.relative_to(state)) for p in state.rglob("*.bin")) == ["a.bin", str(Path("inner/b.bin"))]
    assert is_whole(state / "a.bin") and is_whole(state / "inner" / "b.bin")
    assert (state / "a.bin").read_bytes() == (state / "inner" / "b.bin").read_bytes()


@posix
def test_killed_at_random_moments_leaves_whole_files(tmp_path: Path) -> None:
    start_writer(tmp_path, 1).wait()
    moments = random.Random(5)
    left_something = 0
    for _ in range(12):
        writer = start_writer(tmp_path, 10**6)
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0, 0.08))
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        assert is_whole(tmp_path / "name.bin")  # at every instant, without any cleaning
        left_something += bool(clean_leftovers(tmp_path))
        assert_all_whole(tmp_path)
    assert left_something > 0, "no kill came while a temporary file was there: the test proves nothing"


def test_two_processes_write_the_same_names(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path, 40) for _ in range(2)]
    assert [w.wait() for w in writers] == [0, 0]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.close()
    assert_all_whole(tmp_path)


# ---- after a kill at each step of the swap ------------------------------------------------------------------------


def dead(path: Path, stage: str) -> Path:
    """A temporary name of a process that is gone."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    mine = temp_name(path, stage)
    return path.with_name(mine.name.replace(f"~{os.getpid()}~", f"~{child.pid}~"))


@posix
@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ((), "in place"),
        (("tmp",), "in place"),
        (("new",), "in place"),
        (("new", "old"), "new"),
        (("old",), "old"),
    ],
)
def test_every_step_of_a_folder_swap_can_be_the_last(tmp_path: Path, stages: tuple[str, ...], expected: str) -> None:
    final = tmp_path / "name-state"
    if "old" not in stages:
        final.mkdir()
        (final / "a").write_text("in place")
    for stage in stages:
        folder = dead(final, stage)
        folder.mkdir()
        (folder / "a").write_text(stage)
    assert clean_leftovers(tmp_path) == (["name-state"] if stages else [])
    assert [p.name for p in tmp_path.iterdir()] == ["name-state"]
    assert (final / "a").read_text() == expected


@posix
def test_cleaning_leaves_what_is_alive_or_not_ours(tmp_path: Path) -> None:
    alive = temp_name(tmp_path / "a.safetensors", "tmp")
    foreign_host = alive.name.replace(f"~{alive.name.split('~')[2]}~", "~00000000~")
    keep = [alive.name, foreign_host, "a.safetensors", ".hidden", ".a~tmp~x.safetensors", "b~tmp~1.tmp"]
    for name in keep:
        (tmp_path / name).write_text("x")
    gone = dead(tmp_path / "b.safetensors", "tmp")
    gone.write_text("x")
    same_pid_before = tmp_path / alive.name.replace(f"~{alive.name.split('~')[4][:8]}", "~00000000")
    same_pid_before.write_text("x")  # in a container every run may have the same process id
    assert clean_leftovers(tmp_path) == ["a.safetensors", "b.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(keep)
    two_days_ago = time.time() - 2 * 86400
    os.utime(tmp_path / foreign_host, (two_days_ago, two_days_ago))
    clean_leftovers(tmp_path)
    assert not (tmp_path / foreign_host).exists()


def test_temporary_names_keep_the_ending_and_tell_their_final_name() -> None:
    for name in ("a.safetensors", "模型 ß.v1.pt", "name-000001-state", "v1.5-state"):
        temp = temp_name(Path("x") / name, "new")
        assert temp.parent == Path("x") and temp.suffix == Path(name).suffix and temp.name.startswith(".")
        parts = read_temp_name(temp.name)
        assert parts is not None and (parts.final, parts.stage, parts.pid) == (name, "new", os.getpid())
    assert read_temp_name("name.safetensors") is None


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_failing_write_or_check_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def refuse(temp: Path) -> None:
        assert temp.read_bytes() == b"new"
        raise SaveError("does not read back")

    with pytest.raises(SaveError, match="does not read back"):
        atomic_write(path, lambda temp: temp.write_bytes(b"new"), refuse)
    with pytest.raises(ZeroDivisionError):
        atomic_write(path, lambda temp: 1 // 0)
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "s") as temp:
        (temp / "x").write_bytes(b"x")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"] and path.read_bytes() == b"old"


@posix
def test_written_files_get_the_usual_rights(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    expected = (tmp_path / "plain").stat().st_mode

    def closed(temp: Path) -> None:
        temp.unlink()
        os.close(os.open(temp, os.O_CREAT | os.O_WRONLY, 0o600))  # as the safetensors package does

    atomic_write(tmp_path / "a", closed)
    assert (tmp_path / "a").stat().st_mode == expected


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SaveError) as caught:
        atomic_write(tmp_path / "gone" / "a.bin", lambda temp: temp.write_bytes(b"x"))
    assert len(caught.value.problems) == 1 and str(tmp_path / "gone") in caught.value.problems[0]


FULL = """
import resource, sys
from pathlib import Path
import torch
from library.errors import UserError
from library.io.checkpoint import save_tensors
from library.io.state import StateParts, save_state

folder = Path(sys.argv[1])
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
tensors = {"w": torch.ones(500_000)}
for name in ("a.safetensors", "a.pt"):
    try:
        save_tensors(folder / name, tensors, {})
    except UserError as error:
        print(error)
try:
    parts = StateParts({"w": torch.ones(10)}, 1, 0, 1, {}, optimizer={"state": {0: tensors}})
    save_state(folder / "a-state", parts)
except UserError as error:
    print(error)
"""


def run_full(folder: Path, *limit: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", FULL, str(folder), *limit], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def check_full(folder: Path, lines: list[str]) -> None:
    assert len(lines) == 3, lines
    for line, name, size in zip(lines, ("a.safetensors", "a.pt", "a-state"), (2_000_000, 2_000_000, 2_000_040)):
        assert line.startswith(f"{folder}: no room left for {name}: {size:,} bytes are needed, "), line
    assert sorted(p.name for p in folder.iterdir()) == ["a-state", "a.pt", "a.safetensors"]
    assert (folder / "a.pt").read_text() == (folder / "a.safetensors").read_text() == "old"
    assert (folder / "a-state" / "old").read_text() == "old"


def old_ones(folder: Path) -> None:
    for name in ("a.safetensors", "a.pt"):
        (folder / name).write_text("old")
    (folder / "a-state").mkdir()
    (folder / "a-state" / "old").write_text("old")


@posix
def test_no_room_is_one_line_and_the_old_files_stay(tmp_path: Path) -> None:
    old_ones(tmp_path)
    check_full(tmp_path, run_full(tmp_path, "limit"))


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs the right to mount")
def test_a_full_disk_is_one_line_and_the_old_files_stay(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        old_ones(tmp_path)
        check_full(tmp_path, run_full(tmp_path))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_removing_a_folder_takes_its_name_first(tmp_path: Path) -> None:
    folder = tmp_path / "a-state"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "x").write_text("x")
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []
