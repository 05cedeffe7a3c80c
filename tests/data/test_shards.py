# SPDX-License-Identifier: Apache-2.0
"""Tar shards and parquet files: what is found in them, what is remembered, and what is said of mistakes."""

from __future__ import annotations

import gc
import os
import pickle
import re
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from library.data.caches.latent_cache import member_state, sample_state
from library.data.dataset import TrainingData
from library.data.encoding import LatentJob
from library.data.file_hashes import hash_file
from library.data.images import load_image
from library.data.inventory import find_duplicates
from library.data.joined import Joined
from library.data.lint import check, folder_lines
from library.data.records import BucketRules, CaptionRules, DatasetConfig, ImageRules, Sample, SubsetConfig
from library.data.scan import Scan, SubsetScan, scan
from library.data.shards import indexing
from library.data.shards.index import IndexBuilder, PictureRow, read_index
from library.data.shards.patterns import expand, local_files
from library.errors import UserError
from tests.damage import damaged_copies
from tests.shard_files import OLD, parquet_of, png, write_parquet, write_tar
from tests.trainers.helpers import make_pictures


def scan_of(subset: SubsetConfig, **options: Any) -> Scan:
    return scan((DatasetConfig((subset,), BucketRules((64, 64))),), **options)


def scanned(pattern: object, **fields: Any) -> SubsetScan:
    return scan_of(SubsetConfig(None, shards=str(pattern), **fields)).subsets[0]


def problems_of(pattern: object, **fields: Any) -> list[str]:
    return list(scanned(pattern, **fields).problems)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are read from here on."""
    found: list[str] = []
    for name in ("_index_tar", "_index_parquet"):
        original = getattr(indexing, name)
        monkeypatch.setattr(
            indexing, name, lambda shard, do=original: (found.append(Path(shard.path).name), do(shard))[1]
        )
    return found


FILES = {
    "a.png": png(10, (40, 30)),
    "a.txt": b"  first line\nsecond line\n",
    "sub/b.x.jpg": b"left out: its ending is x.jpg",
    "sub/b.webp": png(20),  # PNG bytes under another name are read as what they are
    "sub/b.json": b'{"caption": "of b", "width": 3}',
    "sub/b.mask.png": png(255, mode="L"),
    "c.png": png(30, mode="RGBA"),
    "c.cls": b"7",
    "._c.png": b"macOS",
}


def test_samples_of_a_tar(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", FILES)
    found = scanned(tar, class_tokens="sks")
    a, b, c = found.samples
    assert found.problems == () and len(found.samples) == 3
    assert (a.path, a.size, a.caption, a.has_alpha) == (f"{tar}/a.png", (40, 30), "first line", False)
    assert (b.path, b.caption, b.mask_path) == (f"{tar}/sub/b.webp", "of b", f"{tar}/sub/b.mask.png")
    assert (c.caption, c.has_alpha, c.mask_path) == ("sks", True, None)
    assert load_image(c.path, alpha=True, member=c.members[c.path]).rgb[0, 0].tolist() == [30, 225, 15]
    assert b.mask_path is not None
    assert load_image(b.mask_path, alpha=False, member=b.members[b.mask_path]).rgb.min() == 255
    assert list(folder_lines(scan_of(found.config))) == [
        f'{tar}: 3 pictures; captions: 2 from the shards, 1 from class_tokens "sks"; left out: 1 .x.jpg, 1 .cls'
    ]
    wild = scanned(tar, captions=CaptionRules(enable_wildcard=True))
    assert wild.samples[0].caption == "first line\nsecond line"
    assert wild.without_caption == (f"{tar}/c.png",)
    assert check(scan_of(wild.config)).warnings == (
        f"{tar}: 1 picture has no caption and no class_tokens: they get an empty one: {tar}/c.png",
    )


def test_the_first_file_of_a_tar_may_have_any_name(tmp_path: Path) -> None:
    """BZ are also the first bytes of a file that bzip2 made."""
    write_tar(tmp_path / "a.tar", {"BZ1.png": png(1), "BZ1.txt": b"a cat"})
    (sample,) = scanned(str(tmp_path / "a.tar")).samples
    assert sample.caption == "a cat"


def test_digests_are_those_of_files(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", FILES)
    (tmp_path / "a.png").write_bytes(FILES["a.png"])
    (tmp_path / "mask.png").write_bytes(FILES["sub/b.mask.png"])
    a, b, _ = scanned(tar).samples
    assert sample_state(a).digest == hash_file(str(tmp_path / "a.png")).digest
    mask = str(b.mask_path)
    assert member_state(mask, b.members[mask]).digest == hash_file(str(tmp_path / "mask.png")).digest


def test_the_index_is_kept(tmp_path: Path, reads: list[str]) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", {f"{number}.png": png(number), f"{number}.txt": b"x"})
    pattern, state = tmp_path / "{0..2}.tar", OLD + 5
    first = scanned(pattern)
    assert sorted(reads) == ["0.tar", "1.tar", "2.tar"]
    reads.clear()
    assert list(scanned(pattern).samples) == list(first.samples) and reads == []
    os.utime(tmp_path / "1.tar", (state, state))  # another time
    scanned(pattern)
    assert reads == ["1.tar"]
    reads.clear()
    index = next((tmp_path / ".trainyard/shards").glob("2.tar-*.index"))
    whole = index.read_bytes()
    for damaged in (whole[:-1], whole[:90] + bytes([whole[90] ^ 1]) + whole[91:], b"", b"{}\n", whole + b"x"):
        index.write_bytes(damaged)
        assert list(scanned(pattern).samples)[2] == first.samples[2]
    assert reads == ["2.tar"] * 5
    shards = indexing.shards_of(SubsetConfig(None, shards=str(pattern)), None)
    assert all(read_index(shard) is not None for shard in shards)


def test_new_shards_and_unwritable_folders(tmp_path: Path, reads: list[str]) -> None:
    """An index that cannot be kept is made again, and its samples go to other processes all the same."""
    tar = write_tar(tmp_path / "x.tar", FILES)
    os.utime(tar)
    for _ in range(2):
        found = scanned(tar)
        assert pickle.loads(pickle.dumps(found.samples))[1].caption == found.samples[1].caption == "of b"
    assert reads == ["x.tar"] * 2
    os.utime(tar, (OLD, OLD))
    kept = scan_of(SubsetConfig(None, shards=str(tar)), cache_dir=str(tmp_path / "cache")).subsets[0].samples
    assert list((tmp_path / "cache/shards").glob("x.tar-*.index")) != []
    assert list(pickle.loads(pickle.dumps(kept))) == list(kept) and len(pickle.dumps(kept)) < 2500


def test_control_images_and_references(tmp_path: Path) -> None:
    files = {"a.png": png(1, (64, 32)), "a.control.png": png(2, (128, 64)), "b.png": png(3), "b.control.png": png(4)}
    references = {"a.reference_1.png": png(5), "a.reference_0.png": png(6), "b.reference.jpg": png(7)}
    tar = write_tar(tmp_path / "x.tar", {**files, **references})
    subset = SubsetConfig(None, shards=str(tar), class_tokens="x")
    a, b = scan_of(subset, control=True).subsets[0].samples
    assert (a.control_path, a.mask_path) == (f"{tar}/a.control.png", None)
    assert [Path(r.path).name for r in a.references] == ["a.reference_0.png", "a.reference_1.png"]
    (reference,) = b.references
    assert load_image(reference.path, alpha=False, member=reference.members[reference.path]).rgb[0, 0, 0] == 7
    assert hash(reference) and reference.subset.images == ImageRules()
    assert problems_of(tar, images=ImageRules(flip_aug=True)) == []
    cropped = problems_of(tar, images=ImageRules(random_crop=True))
    assert cropped == [f"random_crop would change pictures and not their references: leave it out ({tar})"]
    other = write_tar(tmp_path / "y.tar", {**files, "b.control.png": png(3, (64, 32)), "c.png": png(9), **references})
    assert list(scan_of(SubsetConfig(None, shards=str(other)), control=True).subsets[0].problems) == [
        f"{other}: 1 pictures have no control image in their shard: {other}/c.png",
        f"{other}: 1 control images have another shape than their pictures: {other}/b.png",
        f"{other}: 1 pictures have no reference picture, but others have: {other}/c.png",
    ]


def test_equal_pictures(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", {f"{number}{k}.png": png(max(1, k)) for k in range(3)})
    found = scanned(tmp_path / "*.tar", class_tokens="x")
    assert find_duplicates(found.samples) == [
        ("01.png", "00.png"),
        ("10.png", "00.png"),
        ("11.png", "00.png"),
        ("12.png", "02.png"),
    ]


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_tar(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", FILES).read_bytes()
    member = whole.index(b"sub/b.webp")

    def damaged(name: str, data: bytes) -> list[str]:
        (tmp_path / name).write_bytes(data)
        lines = problems_of(tmp_path / name)
        return [line.replace(f"{tmp_path}/", "") for line in lines]

    wrong = "is truncated or damaged, or no tar file"
    assert damaged("in.tar", whole[: member + 600])[0].startswith(f"in.tar: {wrong} (")
    assert damaged("between.tar", whole[:member]) == [
        f"between.tar: {wrong} (the blocks of zeros at its end are missing)"
    ]
    assert damaged("header.tar", whole[:member] + b"\xff" * 512 + whole[member + 512 :]) == [
        f"header.tar: {wrong} (the blocks of zeros at its end are missing)"
    ]
    assert damaged("empty.tar", b"")[0].startswith(f"empty.tar: {wrong} (")
    assert damaged("text.tar", b"hello" * 500)[0].startswith(f"text.tar: {wrong} (")
    line = "is compressed, and single pictures of it cannot be read: unpack it once (gzip -d)"
    assert damaged("x.tar.gz", b"\x1f\x8b" + whole) == [f"x.tar.gz: {line}"]
    assert list((tmp_path / ".trainyard").glob("*/*")) == []


def test_what_is_wrong_inside(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "x.tar",
        [
            ("a.png", png(1)), ("a.jpg", png(2)), ("a.txt", b"\xff"), ("b.png", png(3)[:60]), ("b.json", b"[]"),
            ("c.txt", b"x"), ("d.json", b'{"text": 3}'), ("d.png", b""), ("e.png", png(5)), ("e.png", png(5)),
            ("f.txt", b"a\0b"), ("f.png", png(6)),
        ],
    )  # fmt: skip
    lines = [line.removeprefix(f"{tar}") for line in problems_of(tar)]
    assert [re.sub(r"\(.*\)", "(...)", line) for line in lines] == [
        "/a.jpg: a second picture of its key, beside a.png",
        "/a.txt: is not UTF-8 text (...): save it as UTF-8",
        "/b.png: is truncated or damaged (...)",
        "/b.json: expects an object with a caption, got a list",
        "/d.json: expects a text as text, got a int",
        "/d.png: is empty (...)",
        "/e.png: a second picture of its key, beside e.png",
        "/f.txt: the caption must not hold the character NUL",
        ": files that are in it twice: e.png",
        ": 1 keys have no picture: c",
    ]


def test_a_shard_that_changes_after_the_scan(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", FILES)
    sample = scanned(tar).samples[0]
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match=r"x.tar/a.png: the shard was changed since it was indexed, or is damaged"):
        load_image(sample.path, alpha=False, member=sample.members[sample.path])
    tar.unlink()
    with pytest.raises(UserError, match=r"x.tar/a.png: cannot be read \(No such file"):
        load_image(sample.path, alpha=False, member=sample.members[sample.path])


def test_patterns(tmp_path: Path) -> None:
    assert expand("x/{008..011}.tar") == [f"x/{n:03d}.tar" for n in (8, 9, 10, 11)]
    assert expand("{a,b}-{9..10}.tar") == ["a-9.tar", "a-10.tar", "b-9.tar", "b-10.tar"]
    assert expand("{x}/{1...3}.tar") == ["{x}/{1...3}.tar"]
    with pytest.raises(UserError, match=r"means 1,000,000,000 files; at most 100,000 are possible"):
        expand("{0..999999999}.tar")
    for name in ("b.tar", "a.tar", "[1].tar"):
        (tmp_path / name).touch()
    names = [str(tmp_path / name) for name in ("[1].tar", "a.tar", "b.tar")]
    assert local_files(f"{tmp_path}/*.tar") == (names, [])
    assert local_files(f"{tmp_path}/[1].tar") == (names[:1], [])
    assert local_files(f"{tmp_path}/{{b,c}}.tar") == ([names[2]], [f"{tmp_path}/c.tar"])


def test_joined_sequences() -> None:
    parts = Joined([(1, 2), (), [3], range(4, 6)])
    assert list(parts) == [parts[k] for k in range(5)] == [1, 2, 3, 4, 5]
    assert parts[-1] == 5 and list(parts[1:4]) == [2, 3, 4] and len(Joined([])) == 0
    with pytest.raises(IndexError):
        parts[5]


# ---- URLs -----------------------------------------------------------------------------------------------------------


def test_shards_at_urls(tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    server, cache = tmp_path / "server", str(tmp_path / "cache")
    for number in range(2):
        write_tar(server / f"{number}.tar", {f"{number}.png": png(number + 1), f"{number}.txt": b"words"})

    def scanned_at(url: str) -> SubsetScan:
        return scan_of(SubsetConfig(None, shards=url), cache_dir=cache).subsets[0]

    url = f"file://{server}/{{0..1}}.tar"
    two = scanned_at(url).samples[1]
    assert two.path == f"file://{server}/1.tar/1.png" and two.folder == f"{cache}/shards"
    copies = sorted(Path(cache, "shards").glob("*.tar"))
    assert len(copies) == 2 and sorted(reads) == ["0.tar", "1.tar"]
    assert scanned_at(f"file://{server}/*.tar").samples[1].caption == "words"
    for copy in copies:  # they are fetched again when they are needed, not before
        copy.unlink()
    assert len(scanned_at(url).samples) == 2 and sorted(reads) == ["0.tar", "1.tar"]
    assert load_image(two.path, alpha=False, member=two.members[two.path]).rgb[0, 0, 0] == 2
    assert copies[1].exists() and not copies[0].exists()
    os.utime(write_tar(server / "0.tar", {"0.png": png(9), "0.txt": b"other words"}), (OLD + 9, OLD + 9))
    assert scanned_at(url).samples[0].caption == "other words"

    assert scanned_at(f"file://{server}/9.tar").problems == (f"file://{server}/9.tar does not exist",)
    assert scanned_at(f"file://{server}/x*.tar").problems == (f"file://{server}/x*.tar finds no file",)
    (line,) = scanned_at("s4://bucket/x.tar").problems
    assert line.startswith("s4://bucket/x.tar: cannot be read (Protocol not known: s4)")
    (line,) = problems_of(url)
    assert line.startswith(url) and "give --cache_dir" in line
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    assert scanned_at(url).problems == (
        f"file://{server}/0.tar: reading it needs the package fsspec: pip install fsspec",
    )


# ---- parquet --------------------------------------------------------------------------------------------------------


def parquet_scan(path: object, **fields: Any) -> SubsetScan:
    return scan_of(SubsetConfig(None, parquet=str(path), **fields)).subsets[0]


def test_parquet(tmp_path: Path, reads: list[str]) -> None:
    pytest.importorskip("pyarrow")
    pictures = make_pictures(tmp_path / "pictures", 5)
    path = parquet_of(pictures, tmp_path / "x.parquet")
    found = parquet_scan(path)
    assert [sample.path for sample in found.samples] == [f"{path}/{number}.png" for number in range(5)]
    for sample, file in zip(found.samples, sorted(pictures.glob("*.png"))):
        assert sample.caption == file.with_suffix(".txt").read_text()
        assert sample_state(sample).digest == hash_file(str(file)).digest
        own = load_image(sample.path, alpha=False, member=sample.members[sample.path]).rgb
        assert np.array_equal(own, load_image(str(file), alpha=False).rgb)
    copy = next((tmp_path / ".trainyard/parquet").glob("*.pictures"))
    copy.unlink()  # it is made again when it is needed, not before
    assert len(parquet_scan(path).samples) == 5 and not copy.exists() and reads == ["x.parquet"]
    sample = found.samples[3]
    assert load_image(sample.path, alpha=False, member=sample.members[sample.path]).rgb.shape == (64, 64, 3)
    assert copy.exists()


def test_columns_of_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    columns = {
        "photo": [png(1), png(2)], "words": [" one\n", None], "cut": [png(255, mode="L"), None],
        "before": [[png(3), png(4)], [png(5)]],
    }  # fmt: skip
    path = write_parquet(tmp_path / "x.parquet", columns)
    names = {"image_column": "photo", "caption_column": "words", "mask_column": "cut", "reference_column": "before"}
    one, two = parquet_scan(path, **names).samples
    assert (one.caption, two.caption, two.mask_path) == ("one", "", None)
    assert one.mask_path == f"{path}/0.mask" and [len(s.references) for s in (one, two)] == [2, 1]
    member = one.references[1].members[f"{path}/0.reference_1"]
    assert load_image(one.references[1].path, alpha=False, member=member).rgb[0, 0, 0] == 4

    def wrong(**given: str) -> str:
        (line,) = parquet_scan(path, **given).problems
        return line.replace(f"{tmp_path}/", "")

    assert (
        wrong() == "x.parquet: no column of pictures is known; name one of photo, words, cut, before with image_column"
    )
    assert wrong(image_column="foto") == "x.parquet: image_column: unknown column 'foto'. Did you mean 'photo'?"
    assert wrong(image_column="words").startswith("x.parquet: image_column words holds string; needed are the bytes")
    assert wrong(image_column="photo", caption_column="cut").startswith("x.parquet: caption_column cut holds binary")
    write_parquet(tmp_path / "y.parquet", {"image": [png(1), None, b"?"], "text": ["a", "b", "c"]})
    assert [line.replace(f"{tmp_path}/", "") for line in parquet_scan(tmp_path / "y.parquet").problems] == [
        "y.parquet/2: is not a picture (it begins with b'?')",
        "y.parquet: 1 rows have no picture: 1",
    ]
    data = path.read_bytes()
    path.write_bytes(data[:-50])
    assert "x.parquet: is damaged or no parquet file (" in wrong(**names)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert list(parquet_scan(tmp_path / "x.parquet").problems) == [
        f"{tmp_path}/x.parquet: reading parquet files needs the package pyarrow: pip install pyarrow"
    ]


# ---- many of them ---------------------------------------------------------------------------------------------------


def made_index(folder: Path, number: int, count: int) -> None:
    """The index of a shard that is not there, of so many samples."""
    path = folder / f"{number:04d}.tar"
    path.touch()
    os.utime(path, (OLD, OLD))
    (shard,) = indexing.shards_of(SubsetConfig(None, shards=str(path)), None)
    builder = IndexBuilder(shard)
    for k in range(count):
        digest = (number * count + k).to_bytes(20, "little")
        row = PictureRow(f"{k:08d}.jpg", 512 * k, 400, 64 + 8 * (k % 9), 64 + 8 * (k % 7), 0, digest)
        builder.sample(builder.picture(row), -1, -1, [], f"a caption of some words, number {k}")
    builder.finish()


def test_samples_of_shards_take_no_memory_each(tmp_path: Path) -> None:
    """What is kept of a sample are some numbers of the plan, in this process and in those that load pictures."""
    shards, each = 4, 10_000
    for number in range(shards):
        made_index(tmp_path, number, each)

    def read(pattern: str) -> tuple[Sequence[Sample], TrainingData, Sequence[LatentJob]]:
        found = scan_of(SubsetConfig(None, shards=f"{tmp_path}/{pattern}")).datasets[0]
        data = TrainingData([(found.config, found.samples)], seed=1)
        return found.samples, data, data.encoding_jobs()

    read("0000.tar")  # what is imported and remembered at the first time does not count
    tracemalloc.start()
    try:
        samples, data, jobs = read("*.tar")
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(samples) == len(jobs) == data.stats()[0].uses == shards * each
    assert size < 80 * shards * each  # bytes, a third of them of the jobs
    assert len(pickle.dumps(samples)) < 1000 * shards
    assert jobs[12_345].sample == samples[12_345] and not jobs[12_345].flipped
    assert samples[12_345].caption == "a caption of some words, number 2345"


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_damaged_files_end_in_lines(kind: str, tmp_path: Path) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
        columns = {"image": [png(k) for k in range(1, 5)], "text": list("abcd")}
        whole = write_parquet(tmp_path / "x", columns).read_bytes()
    else:
        whole = write_tar(tmp_path / "x", FILES).read_bytes()
    good = 0
    for data in damaged_copies(whole, 80, kind):
        (tmp_path / "x").write_bytes(data)
        found = scanned(tmp_path / "x") if kind == "tar" else parquet_scan(tmp_path / "x")
        assert all(line.startswith(str(tmp_path / "x")) and "\n" not in line for line in found.problems)
        good += not found.problems and len(list(found.samples)) > 0
    assert good < 40
