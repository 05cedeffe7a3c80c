# SPDX-License-Identifier: Apache-2.0
"""Hashes of weights: they tell every change, and are remembered so that a restart reads headers only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.weights import fingerprints
from library.weights.fingerprints import hash_weights, memory_file, weights_fingerprint
from library.weights.loading import Part
from library.weights.weight_files import open_weights

ROOT = Path(__file__).parents[2]
OLD_NS = 1_700_000_000_000_000_000


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def weights(path: Path, value: float = 1.0, *, settled: bool = True) -> Path:
    save_file({"a.x": torch.full((4,), value), "b.x": torch.zeros(2)}, path)
    if settled:
        os.utime(path, ns=(OLD_NS, OLD_NS))
    return path


def fingerprint(path: Path, prefix: str = "", settings: str = "") -> str:
    return weights_fingerprint(open_weights(path), prefix, settings)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read as a whole."""
    found: list[Path] = []

    def hash_and_note(path: Path, prefix: str, settings: str) -> str:
        found.append(path)
        return hash_weights(path, prefix, settings)

    monkeypatch.setattr(fingerprints, "hash_weights", hash_and_note)
    return found


def test_a_second_time_nothing_is_read(tmp_path: Path, read: list[Path]) -> None:
    path = weights(tmp_path / "m.safetensors")
    first = fingerprint(path)
    assert read == [path] and memory_file().is_relative_to(tmp_path)
    assert fingerprint(path) == first == hash_weights(path, "", "") and read == [path]


def test_what_is_hashed(tmp_path: Path) -> None:
    one = hash_weights(weights(tmp_path / "1.safetensors"), "", "")
    assert hash_weights(weights(tmp_path / "2.safetensors"), "", "") == one  # where it lies does not matter
    assert hash_weights(weights(tmp_path / "3.safetensors", 2.0), "", "") != one
    assert hash_weights(tmp_path / "1.safetensors", "", "s") != one
    of_a, of_b = (hash_weights(tmp_path / "1.safetensors", prefix, "") for prefix in ("a.", "b."))
    assert len({one, of_a, of_b}) == 3
    assert hash_weights(tmp_path / "3.safetensors", "b.", "") == of_b  # only a.x has changed


def test_parts_and_settings_are_remembered_apart(tmp_path: Path, read: list[Path]) -> None:
    path = weights(tmp_path / "m.safetensors")
    kinds = [("", ""), ("a.", ""), ("b.", ""), ("a.", "s")]
    first = [fingerprint(path, *kind) for kind in kinds]
    assert len(set(first)) == len(read) == 4
    assert [fingerprint(path, *kind) for kind in kinds] == first and len(read) == 4


def test_a_part_of_a_model_remembers(tmp_path: Path, read: list[Path]) -> None:
    path = weights(tmp_path / "m.safetensors")
    part = lambda: Part("x", open_weights(path), "a.", torch.nn.Identity, lambda module: (), "settings")
    assert part().fingerprint() == part().fingerprint() == hash_weights(path, "a.", "settings")
    assert read == [path]


@pytest.mark.parametrize("change", ["time", "content"])
def test_a_changed_file_is_read_again(change: str, tmp_path: Path, read: list[Path]) -> None:
    path = weights(tmp_path / "m.safetensors")
    first = fingerprint(path)
    if change == "content":
        weights(path, 2.0, settled=False)
    os.utime(path, ns=(OLD_NS + 1, OLD_NS + 1))
    assert (fingerprint(path) == first) == (change == "time") and len(read) == 2


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path, read: list[Path]) -> None:
    path = weights(tmp_path / "m.safetensors", settled=False)
    assert fingerprint(path) == fingerprint(path) and len(read) == 2
    assert not memory_file().exists()


def test_every_part_of_a_split_file_counts(tmp_path: Path, read: list[Path]) -> None:
    names = [f"m-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        save_file({f"x{i}": torch.ones(2)}, tmp_path / name)
        os.utime(tmp_path / name, ns=(OLD_NS, OLD_NS))
    first = fingerprint(tmp_path / names[0])
    assert fingerprint(tmp_path / names[0]) == first and len(read) == 1
    save_file({"x1": torch.zeros(2)}, tmp_path / names[1])
    os.utime(tmp_path / names[1], ns=(OLD_NS + 1, OLD_NS))
    os.utime(tmp_path / names[1], ns=(OLD_NS, OLD_NS + 9))
    assert fingerprint(tmp_path / names[0]) != first


# ---- the memory may be damaged, foreign or missing -------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"x": 3}', b"\xff\xfe\x00", b"null"])
def test_a_damaged_memory(content: bytes, tmp_path: Path, read: list[Path]) -> None:
    path = weights(tmp_path / "m.safetensors")
    memory_file().parent.mkdir(parents=True)
    memory_file().write_bytes(content)
    first = fingerprint(path)
    assert fingerprint(path) == first == hash_weights(path, "", "") and len(read) == 1


def test_a_home_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights(tmp_path / "m.safetensors")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fingerprint(path) == hash_weights(path, "", "")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(os, "replace", refuse)
    assert fingerprint(path) == hash_weights(path, "", "")
    assert [*memory_file().parent.iterdir()] == []  # nothing is left behind


def test_without_xdg_it_is_below_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert memory_file() == tmp_path / ".cache" / "trainyard" / "fingerprints.json"


def test_the_oldest_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "MOST_ENTRIES", 2)
    paths = [weights(tmp_path / f"{i}.safetensors") for i in range(3)]
    for path in paths:
        fingerprint(path)
    kept = json.loads(memory_file().read_text())
    assert [json.loads(key)[3][0] for key in kept] == [str(path) for path in paths[1:]]


MANY = """
import sys
import time
from pathlib import Path
from library.weights.fingerprints import weights_fingerprint
from library.weights.weight_files import open_weights
for path in sys.argv[1:]:
    print(weights_fingerprint(open_weights(Path(path)), "", ""))
"""


def test_two_processes_at_once(tmp_path: Path) -> None:
    paths = [weights(tmp_path / f"{i}.safetensors", float(i)) for i in range(40)]
    command = [sys.executable, "-c", MANY, *map(str, paths)]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    expected = [hash_weights(path, "", "") for path in paths]
    rounds = 0
    while other.poll() is None or not rounds:  # until the other process has done all of its own
        memory_file().unlink(missing_ok=True)
        assert [fingerprint(path) for path in paths[::-1]] == expected[::-1]
        rounds += 1
        time.sleep(0.05)
    assert other.communicate()[0].split() == expected and other.returncode == 0
    kept = json.loads(memory_file().read_text())
    assert set(kept.values()) <= set(expected) and len(kept) >= len(paths) // 2
    assert [path.name for path in memory_file().parent.iterdir()] == ["fingerprints.json"]
