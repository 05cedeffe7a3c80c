# SPDX-License-Identifier: Apache-2.0
"""The packed store: whole after a kill at any moment, safe for two writers, honest about damage and full disks."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import resource
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from library.data import store
from library.data.store import MemoryStore, PackedStore
from library.data.store_index import FileRow
from library.data.tensor_bytes import DTYPES
from library.errors import UserError
from library.rng import python_rng, torch_generator

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


@pytest.mark.parametrize("limit", [store.CHECKED_BYTES, 0])
def test_damage_that_leaves_size_and_time_alone(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start reads what is needed where that is not much; of more it looks at size and time, and `get` finds it."""
    monkeypatch.setattr(store, "CHECKED_BYTES", limit)
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
