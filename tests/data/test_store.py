# SPDX-License-Identifier: Apache-2.0
"""The packed store: whole after a kill at any moment, safe for two writers, honest about damage and full disks."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from library.data.caches import store as store_module
from library.data.caches import store_index
from library.data.caches.store import MemoryStore, PackedStore
from library.data.caches.store_index import FileRow
from library.data.caches.tensor_bytes import DTYPES
from library.errors import UserError
from library.rng import python_rng, torch_generator
from tests.damage import damaged_copies

FORK = multiprocessing.get_context("fork")


def key_of(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=20).digest()


def tensors_of(number: int) -> dict[str, torch.Tensor]:
    """Values that only this number gives, of a length of its own."""
    generator = torch_generator("store", number)
    return {
        "latents": torch.randn(4, 5, 3 + number % 7, generator=generator).bfloat16(),
        "mask": torch.rand(1, 5, 3, generator=generator),
    }


def assert_holds(store: PackedStore | MemoryStore, number: int) -> None:
    found = store.get(key_of(number))
    expected = tensors_of(number)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def write(folder: Path, first: int, step: int, count: int, group_bytes: int = 4000) -> None:
    store = PackedStore(folder, group_bytes=group_bytes, shard_bytes=100_000)
    for number in range(first, first + count * step, step):
        store.put(key_of(number), tensors_of(number))
    store.close()


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.bin"))


def test_an_index_is_checked_as_a_whole_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again after it was closed, nor by the processes that load; a file in its place is another one."""
    statements: list[str] = []
    connect = sqlite3.connect

    def traced(*arguments: Any, **named: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **named)
        connection.set_trace_callback(statements.append)
        return connection

    monkeypatch.setattr(sqlite3, "connect", traced)
    checks = lambda: sum("quick_check" in statement for statement in statements)
    write(tmp_path, 0, 1, 3)
    store = PackedStore(tmp_path)
    assert_holds(store, 0)
    before = checks()
    assert before == 2  # of the writer and of this one
    store.close()
    copied = pickle.loads(pickle.dumps(store))
    forked = FORK.Process(target=lambda: os._exit(assert_holds(store, 2) or checks() - before))
    forked.start()
    forked.join()
    assert forked.exitcode == 0
    assert_holds(store, 1)
    assert_holds(copied, 1)
    assert checks() == before
    store.close()
    shutil.copy(tmp_path / "index.sqlite", tmp_path / "another")
    os.replace(tmp_path / "another", tmp_path / "index.sqlite")
    assert_holds(store, 1)
    assert store.check([key_of(2)]).missing == frozenset()
    assert checks() == before + 1


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    values = {name: (torch.arange(6).reshape(2, 3) % 2).to(dtype) for name, dtype in DTYPES.items()}
    values |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "strided": torch.arange(12.0).reshape(3, 4).t()}
    for store in (PackedStore(tmp_path / "packed"), MemoryStore()):
        store.put(b"k", values)
        found = store.get(b"k")
        assert list(found) == list(values)
        for name, value in values.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        with pytest.raises(KeyError):
            store.get(b"other")
        with pytest.raises(ValueError, match="complex64"):
            PackedStore(tmp_path / "other").put(b"k", {"a": torch.zeros(1, dtype=torch.complex64)})


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    store = PackedStore(tmp_path)
    store.put(b"k", {"a": torch.ones(3)})
    store.get(b"k")["a"].zero_()
    assert torch.equal(store.get(b"k")["a"], torch.ones(3))


def test_another_process_reads_after_pickling(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 20)
    store = PackedStore(tmp_path)
    assert_holds(store, 3)
    assert_holds(pickle.loads(pickle.dumps(store)), 3)
    with FORK.Pool(2) as pool:  # forked with open files and an open connection
        pool.starmap(assert_holds, [(store, number) for number in range(20)])
    assert_holds(store, 19)


def test_shards_end_at_their_size(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 400)
    assert len(shards(tmp_path)) >= 2
    assert all(path.stat().st_size < 101_000 for path in shards(tmp_path))
    assert not PackedStore(tmp_path).check(key_of(n) for n in range(400)).missing


def test_a_record_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    store = PackedStore(tmp_path)
    store.put(b"k", {"a": torch.zeros(2)})
    assert torch.equal(store.get(b"k")["a"], torch.zeros(2))
    store.put(b"k", {"a": torch.ones(2)})
    assert torch.equal(store.get(b"k")["a"], torch.ones(2))


def test_sigkill_at_random_moments_leaves_a_whole_store(tmp_path: Path) -> None:
    rng = python_rng("kill")
    done = turn = 0
    while turn < 12 or done < 100:
        turn += 1
        process = FORK.Process(target=write, args=(tmp_path, done, 1, 1_000_000))
        process.start()
        time.sleep(rng.uniform(0.02, 0.25))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        store = PackedStore(tmp_path)
        found = store.check(key_of(n) for n in range(done, done + 20_000))
        assert not found.damaged, f"turn {turn}"
        present = [n for n in range(done, done + 20_000) if key_of(n) not in found.missing]
        assert present == list(range(done, done + len(present)))  # all up to the last commit, in order
        for number in present[-50:]:
            assert_holds(store, number)
        done += len(present)
        store.close()
    everything = PackedStore(tmp_path)
    assert not everything.check(key_of(n) for n in range(done)).missing


def test_two_writers_at_once(tmp_path: Path) -> None:
    writers = [FORK.Process(target=write, args=(tmp_path, first, 2, 300)) for first in (0, 1)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
        assert process.exitcode == 0
    store = PackedStore(tmp_path)
    for number in range(600):
        assert_holds(store, number)


def test_a_forked_process_writes_to_a_shard_of_its_own(tmp_path: Path) -> None:
    store = PackedStore(tmp_path)

    def write_in_child() -> None:
        for number in range(1, 100, 2):
            store.put(key_of(number), tensors_of(number))
        store.close()

    store.put(key_of(0), tensors_of(0))
    process = FORK.Process(target=write_in_child)
    process.start()
    for number in range(2, 100, 2):
        store.put(key_of(number), tensors_of(number))
    process.join()
    store.close()
    assert len(shards(tmp_path)) == 2
    for number in range(100):
        assert_holds(store, number)


def test_two_writers_of_the_same_keys(tmp_path: Path) -> None:
    writers = [FORK.Process(target=write, args=(tmp_path, 0, 1, 200)) for _ in range(2)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    store = PackedStore(tmp_path)
    for number in range(200):
        assert_holds(store, number)


def test_a_truncated_shard_loses_only_its_end(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 50)
    (shard,) = shards(tmp_path)
    os.truncate(shard, shard.stat().st_size // 2)
    store = PackedStore(tmp_path)
    keys = [key_of(n) for n in range(50)]
    found = store.check(keys)
    assert found.missing == found.damaged and 20 <= len(found.missing) <= 30
    again = store.check(keys)  # said once
    assert again.missing == found.missing and not again.damaged
    for number in range(50):
        if key_of(number) in found.missing:
            with pytest.raises(KeyError):
                store.get(key_of(number))
            store.put(key_of(number), tensors_of(number))
        assert_holds(store, number)
    assert not PackedStore(tmp_path).check(keys).missing


def test_flipped_bytes_are_found_by_check_and_by_get(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 50)
    (shard,) = shards(tmp_path)
    with open(shard, "r+b") as file:
        file.seek(5)  # in the first record
        byte = file.read(1)
        file.seek(5)
        file.write(bytes([byte[0] ^ 1]))
    assert PackedStore(tmp_path).check([key_of(0), key_of(1)], quick=True).missing == frozenset()
    with pytest.raises(KeyError):
        PackedStore(tmp_path).get(key_of(0))
    assert PackedStore(tmp_path).check([key_of(0), key_of(1)], quick=True).missing == {key_of(0)}  # `get` dropped it
    with open(shard, "r+b") as file:
        file.write(b"\x55" * shard.stat().st_size)
    assert PackedStore(tmp_path).check([key_of(0), key_of(1)]).damaged == {key_of(1)}
    assert PackedStore(tmp_path).check([key_of(1)], quick=True).missing == {key_of(1)}


def test_a_deleted_shard_is_missing(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 10)
    shards(tmp_path)[0].unlink()
    assert len(PackedStore(tmp_path).check(key_of(n) for n in range(10)).missing) == 10


@pytest.mark.parametrize("limit", [store_module.CHECKED_BYTES, 0])
def test_damage_that_leaves_size_and_time_alone(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start reads what is needed where that is not much; of more it looks at size and time, and `get` finds it."""
    monkeypatch.setattr(store_module, "CHECKED_BYTES", limit)
    write(tmp_path, 0, 1, 10)
    (shard,) = shards(tmp_path)
    stat = shard.stat()
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    keys = [key_of(n) for n in range(10)]
    assert PackedStore(tmp_path).check(keys).damaged == (frozenset() if limit == 0 else {keys[0]})
    with pytest.raises(KeyError):
        PackedStore(tmp_path).get(keys[0])
    again = PackedStore(tmp_path)
    assert again.check(keys).missing == {keys[0]}
    again.put(keys[0], tensors_of(0))
    assert not again.check(keys).missing
    assert_holds(again, 0)


def test_damage_while_a_store_is_open_is_found(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 10)
    opened = PackedStore(tmp_path)
    assert_holds(opened, 0)
    (shard,) = shards(tmp_path)
    with open(shard, "r+b") as file:
        file.write(b"\x55")
    with pytest.raises(KeyError):
        opened.get(key_of(0))


@pytest.mark.parametrize("content", [b"this is not a database" * 100, None])
def test_a_damaged_index_is_said_and_replaced(
    tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 0, 1, 200)
    index = tmp_path / "index.sqlite"
    data = bytearray(index.read_bytes())
    data[4096:-4096] = b"\x77" * (len(data) - 8192)
    index.write_bytes(content or data)
    store = PackedStore(tmp_path)
    assert len(store.check(key_of(n) for n in range(200)).missing) == 200
    assert "index.sqlite is damaged" in caplog.text
    store.put(key_of(0), tensors_of(0))
    store.flush()
    assert_holds(PackedStore(tmp_path), 0)


def edited(folder: Path, *statements: str) -> None:
    """The index after SQL of somebody else."""
    with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder where nothing waits for a disk, if there is one."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


WRONG_ROWS = {
    "length": ["-1", "0", "1000000000000000", "'text'", "NULL", "1.5", "x'00'", "9223372036854775807"],
    "start": ["-1", "1000000000000000", "'text'", "NULL", "64"],
    "checksum": ["0", "-1", "'text'", "NULL"],
    "shard": ["'other.bin'", "'../index.sqlite'", "'/dev/zero'", "''", "NULL", "7", "CAST(x'FF' AS TEXT)"],
    "layout": [
        "''", "NULL", "'[]'", "'{}'",
        "'[1]'", "'[[\"latents\", \"fp99\", [4]]]'", "'[[\"latents\", \"bf16\", [-4, 5]]]'",
        "'[[\"latents\", \"bf16\", [5, 4, 3]], [\"mask\", \"fp32\", [1, 5, 3]]]'",  # as many bytes, another shape
        "'[[\"latents\", \"bf16\", [4000000000, 4000000000]]]'", "replace(hex(zeroblob(50000)), '00', '[')",
    ],
}  # fmt: skip


@pytest.mark.parametrize("limit", [store_module.CHECKED_BYTES, 0])
@pytest.mark.parametrize("column", WRONG_ROWS)
def test_rows_that_no_writer_makes(in_memory: Path, column: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by `check` or, of much data, by `get`; dropped, and written again."""
    monkeypatch.setattr(store_module, "CHECKED_BYTES", limit)
    write(in_memory, 0, 1, 3)
    keys = [key_of(n) for n in range(3)]
    for value in WRONG_ROWS[column]:
        edited(in_memory, f"UPDATE records SET {column} = {value} WHERE key = x'{keys[0].hex()}'")
        opened = PackedStore(in_memory)
        found = opened.check(keys)
        if limit:
            assert found.damaged == {keys[0]}, value
        with pytest.raises(KeyError):
            opened.get(keys[0])
        assert PackedStore(in_memory).check(keys).missing == {keys[0]}, value
        assert opened.prune(abandoned_s=0) >= 0
        opened.put(keys[0], tensors_of(0))
        for number in range(3):
            assert_holds(opened, number)
        opened.close()


def test_exchanged_records_and_shards(tmp_path: Path) -> None:
    """Bytes that are whole, but another record's."""
    for number in (0, 7):  # of one layout
        write(tmp_path, number, 1, 1)
    keys = [key_of(0), key_of(7)]
    a, b = (key.hex() for key in keys)
    moves = ((a, "00"), (b, a), ("00", b))
    edited(tmp_path, *(f"UPDATE records SET key = x'{new}' WHERE key = x'{old}'" for old, new in moves))
    for number in (0, 7):
        with pytest.raises(KeyError):
            PackedStore(tmp_path).get(key_of(number))
    for number in (0, 7):
        write(tmp_path, number, 1, 1)
    assert not PackedStore(tmp_path).check(keys).missing
    new = sorted(shards(tmp_path), key=lambda path: path.stat().st_mtime_ns)[-2:]
    os.rename(new[0], tmp_path / "x")
    os.rename(new[1], new[0])
    os.rename(tmp_path / "x", new[1])
    assert PackedStore(tmp_path).check(keys).damaged == set(keys)


NO_SHARDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "device": lambda path: os.symlink("/dev/zero", path),
    "dangling link": lambda path: os.symlink("gone", path),
}


@pytest.mark.parametrize("kind", NO_SHARDS)
def test_what_is_no_shard(tmp_path: Path, kind: str) -> None:
    write(tmp_path, 0, 1, 2)
    (shard,) = shards(tmp_path)
    shard.unlink()
    NO_SHARDS[kind](shard)
    opened = PackedStore(tmp_path)
    assert opened.check([key_of(0)]).damaged == {key_of(0)} and opened.prune(abandoned_s=0) == 0
    with pytest.raises(KeyError):
        opened.get(key_of(1))


FOREIGN = {
    "a table is missing": ["DROP TABLE files"],
    "a column is missing": ["ALTER TABLE records DROP COLUMN owner"],
    "an older program's": ["PRAGMA user_version = 0", "DROP TABLE retired"],
    "another program's": ["DROP TABLE records", "DROP TABLE shards", "PRAGMA user_version = 0"],
    "a trigger": ["CREATE TRIGGER t AFTER INSERT ON records BEGIN DELETE FROM records; END"],
    "a view": ["DROP TABLE files", "CREATE VIEW files AS SELECT 1 AS path, 2, 3, 4"],
    "absurd version": ["PRAGMA user_version = -7"],
    "no file but a folder": [],
    "no file but a pipe": [],
    "a dangling link": [],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_an_index_that_is_none_of_ours(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 0, 1, 5)
    index = tmp_path / "index.sqlite"
    if FOREIGN[kind]:
        edited(tmp_path, *FOREIGN[kind])
    else:
        index.unlink()
        {"folder": os.mkdir, "pipe": os.mkfifo, "link": lambda path: os.symlink("/gone/x", path)}[kind.split()[-1]](
            index
        )
    opened = PackedStore(tmp_path)
    assert len(opened.check(key_of(n) for n in range(5)).missing) == 5
    assert len(caplog.records) == 1 and "everything is encoded again" in caplog.text
    opened.put(key_of(0), tensors_of(0))
    opened.close()
    assert_holds(PackedStore(tmp_path), 0)
    assert any(path.name.endswith(".damaged") for path in tmp_path.iterdir())


def test_an_index_that_is_damaged_while_it_is_open(tmp_path: Path) -> None:
    opened, other = PackedStore(tmp_path), PackedStore(tmp_path)
    for number in range(200):
        opened.put(key_of(number), tensors_of(number))
    opened.flush()
    assert_holds(other, 3)
    index = tmp_path / "index.sqlite"
    index.write_bytes(b"this is not a database" * 1000)
    for user in (opened, other):
        with contextlib.suppress(KeyError):
            user.get(key_of(150))
        user.put(key_of(1), tensors_of(1))
        user.flush()
        assert_holds(user, 1)


def test_a_locked_index_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_index, "BUSY_SECONDS", 0.05)
    write(tmp_path, 0, 1, 5)
    with contextlib.closing(sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match=r"index\.sqlite: another program has locked it .* give another folder"):
            PackedStore(tmp_path).check([key_of(0)])
    assert_holds(PackedStore(tmp_path), 0)


@pytest.mark.parametrize("what", ["index.sqlite", "shard", "index.sqlite-journal"])
def test_damaged_files_of_a_store(tmp_path: Path, what: str, in_memory: Path) -> None:
    """200 of each kind: a record is what was written or is missing, and can be written again."""
    write(tmp_path / "whole", 0, 1, 3)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    name = what if "index" in what else shards(tmp_path / "whole")[0].name
    folder = in_memory / "cache"
    for data in damaged_copies(whole.get(name, whole["index.sqlite"]), 200, what):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file, content in (whole | {name: data}).items():
            (folder / file).write_bytes(content)
        opened = PackedStore(folder)
        try:
            missing = opened.check(key_of(n) for n in range(3)).missing
        except UserError as error:
            assert len(error.problems) == 1 and "index.sqlite has format" in str(error)
            continue
        for number in (n for n in range(3) if key_of(n) in missing):
            opened.put(key_of(number), tensors_of(number))
        for number in range(3):
            assert_holds(opened, number)
        opened.close()


def test_an_index_of_another_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 1)
    with sqlite3.connect(tmp_path / "index.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="format 99"):
        PackedStore(tmp_path).get(b"k")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(small_disk: Path) -> None:
    store = PackedStore(small_disk, group_bytes=100_000)
    with pytest.raises(UserError, match=r"--cache_dir: no space for the cache in .*disk .*MB more needed") as caught:
        for number in range(10_000):
            store.put(key_of(number), {"a": torch.full((5000,), float(number))})
    assert len(caught.value.problems) == 1
    store.close()
    again = PackedStore(small_disk)
    found = again.check(key_of(n) for n in range(number + 1))
    assert not found.damaged
    present = [n for n in range(number + 1) if key_of(n) not in found.missing]
    assert len(present) >= 30
    assert all(again.get(key_of(n))["a"][0] == n for n in present)
    with pytest.raises(UserError, match="no space for the cache"):
        again.require_space(10**9)


def test_read_only_disk(small_disk: Path) -> None:
    write(small_disk, 0, 1, 5)
    os.truncate(shards(small_disk)[0], 100)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    store = PackedStore(small_disk)
    assert len(store.check(key_of(n) for n in range(5)).damaged) == 5
    with pytest.raises(UserError, match=r"cannot be written .*give another folder with --cache_dir"):
        store.put(key_of(9), tensors_of(9))


def _write_with_file_limit(folder: Path, answer: multiprocessing.connection.Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    try:
        write(folder, 0, 1, 100_000, group_bytes=50_000_000)
    except UserError as error:
        answer.send(str(error))


def test_file_size_limit(tmp_path: Path) -> None:
    """The index fails here as well as the shard would: both give one line."""
    ours, theirs = FORK.Pipe()
    store = PackedStore(tmp_path)
    process = FORK.Process(target=_write_with_file_limit, args=(tmp_path, theirs))
    process.start()
    process.join(60)
    assert process.exitcode == 0 and ours.poll()
    assert "--cache_dir" in ours.recv()
    assert not store.check(key_of(n) for n in range(100)).damaged


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    store = PackedStore(tmp_path / "file" / "cache")
    assert store.check([b"k"]).missing == {b"k"}
    with pytest.raises(UserError, match="give another folder with --cache_dir"):
        store.put(b"k", {"a": torch.zeros(1)})


def test_prune_keeps_what_is_alive(tmp_path: Path) -> None:
    store = PackedStore(tmp_path)
    for number in range(10):
        store.put(key_of(number), tensors_of(number), owner=str(number).encode())
    store.put(b"text", tensors_of(100))
    store.set_file_rows([FileRow(f"{n}.png", 1, 1, str(n).encode()) for n in range(10)])
    size = sum(path.stat().st_size for path in shards(tmp_path))
    assert store.prune(abandoned_s=0) == 0
    store.set_file_rows([FileRow(f"{n}.png", 1, 2, b"edited") for n in range(3)])
    assert store.prune(abandoned_s=0) == 0  # a third is dead
    store.set_file_rows([FileRow(f"{n}.png", 1, 2, b"edited") for n in range(8)])
    assert store.prune() == 0  # the shard is new: another process might be writing to it
    freed = store.prune(abandoned_s=0)
    assert freed > size / 2 and sum(path.stat().st_size for path in shards(tmp_path)) == size - freed
    for opened in (store, PackedStore(tmp_path)):
        assert opened.check(key_of(n) for n in range(10)).missing == {key_of(n) for n in range(8)}
        assert_holds(opened, 8)
        assert_holds(opened, 9)
        assert torch.equal(opened.get(b"text")["mask"], tensors_of(100)["mask"])


def test_prune_under_an_open_reader(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 10)
    reader = PackedStore(tmp_path)
    assert_holds(reader, 0)
    (old,) = shards(tmp_path)
    with open(old, "ab") as file:
        file.write(bytes(2 * old.stat().st_size))  # a killed writer left this
    assert PackedStore(tmp_path).prune(abandoned_s=0) > 0
    reader.close()
    assert not old.exists()
    for number in range(10):
        assert_holds(reader, number)


def test_files_are_remembered(tmp_path: Path) -> None:
    row = FileRow("/a/ü.png", 3, 4, b"digest")
    for store in (PackedStore(tmp_path), MemoryStore()):
        store.set_file_rows([row])
        assert store.file_rows(["/a/ü.png", "/b"]) == {"/a/ü.png": row}
        assert store.is_empty()
        store.put(b"k", {})
        assert not store.is_empty()
