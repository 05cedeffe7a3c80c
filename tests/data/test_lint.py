# SPDX-License-Identifier: Apache-2.0
"""What stops a run, what is only said, and how."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from library.data.lint import Report, check, longer_than_limit, smaller_than_bucket
from library.data.records import BucketRules, CaptionRules, DatasetConfig, Sample, SubsetConfig
from library.data.scan import scan


def pictures(folder: Path, *names: str, caption: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (32, 24)).save(folder / name)
        if caption is not None:
            (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder


def subset(folder: Path, **values) -> SubsetConfig:
    return SubsetConfig(str(folder), caption_extension=".txt", **values)


def lint(*subsets: SubsetConfig) -> Report:
    return check(scan([DatasetConfig((s,), BucketRules((64, 64))) for s in subsets]))


def test_nothing_to_say(tmp_path: Path) -> None:
    assert lint(subset(pictures(tmp_path, "a.png", "b.png", caption="x"))) == Report((), ())
    assert lint(subset(pictures(tmp_path / "c", "a.png"), class_tokens="dog")) == Report((), ())


def test_every_bad_file_is_listed_once(tmp_path: Path) -> None:
    folder = pictures(tmp_path, "good.png", caption="x")
    for number in range(7):
        (folder / f"bad{number}.png").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:50])
    (folder / "good.txt").write_bytes(b"\xe9t\xe9")
    report = lint(subset(folder), subset(folder))  # two datasets at two sizes may use one folder
    assert report.problems[:7] == tuple(f"{folder}/bad{n}.png: is empty (0 bytes)" for n in range(7))
    assert report.problems[7].startswith(f"{folder}/cut.png: is truncated or damaged (")
    assert report.problems[8:] == (f"{folder}/good.txt: is not UTF-8 text (byte 0): save it as UTF-8",)


def test_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "empty" / "a.gif").write_bytes(b"x")
    report = lint(subset(pictures(tmp_path / "full", "a.png", caption="x")), subset(tmp_path / "empty"))
    assert report.problems == (
        f"{tmp_path}/empty: no picture found (png, jpg, webp, bmp, avif, jxl); it holds 1 .gif, 1 folders",
    )


def test_folder_that_went_away(tmp_path: Path) -> None:
    assert lint(subset(tmp_path / "gone")).problems == (f"{tmp_path}/gone: cannot be read (No such file or directory)",)


def test_missing_and_empty_captions(tmp_path: Path) -> None:
    folder = pictures(tmp_path, "a.png", caption="x")
    pictures(folder, *(f"m{number}.png" for number in range(5)))
    pictures(folder, "e.png", caption=" \n")
    report = lint(subset(folder))
    assert report.problems == ()
    assert report.warnings == (
        f"{folder}: 5 pictures have no caption (.txt) and no class_tokens: they get an empty one: "
        "m0.png, m1.png, m2.png and 2 more",
        f"{folder}: 1 picture has an empty caption and no class_tokens: e.png",
    )
    assert lint(subset(folder, class_tokens="thing")) == Report((), ())
    assert lint(subset(folder, captions=CaptionRules(caption_prefix="sks"))) == Report((), ())


def test_no_caption_anywhere(tmp_path: Path) -> None:
    bare = subset(pictures(tmp_path / "bare", "a.png", "b.png"))
    assert lint(bare).problems == (
        "none of the 2 pictures has a caption: "
        "add caption files (.txt is looked for; see caption_extension) or class_tokens",
    )
    good = subset(pictures(tmp_path / "good", "a.png", caption="x"))
    assert lint(bare, good).problems == ()  # only when every picture of the run lacks one


def test_shared_stems(tmp_path: Path) -> None:
    folder = pictures(tmp_path, "a.png", "a.jpg", "b.png", "b.webp", "c.png", caption="x")
    assert lint(subset(folder)).warnings == (
        f"{folder}: pictures of one stem share a caption (2 times): a.jpg + a.png, b.png + b.webp",
    )


def test_masks(tmp_path: Path) -> None:
    folder, masks = pictures(tmp_path / "p", "a.png", caption="x"), pictures(tmp_path / "m", "a.png", "z.png")
    report = lint(subset(folder, conditioning_data_dir=str(masks)))
    assert report == Report((), (f"{masks}: 1 mask has no picture of the same name: z.png",))
    report = lint(subset(masks, class_tokens="x", conditioning_data_dir=str(folder)))
    assert report.problems == (f"{folder}: no mask of the same name for 1 pictures: z.png",)


def test_folder_in_two_subsets_of_a_dataset(tmp_path: Path) -> None:
    twice = subset(pictures(tmp_path, "a.png", caption="x"))
    report = check(scan([DatasetConfig((twice, twice), BucketRules((64, 64)))]))
    assert report.warnings == (f"datasets[0]: {tmp_path} stands in 2 subsets: its pictures are used by each of them",)


def sample(path: str, caption: str = "", size: tuple[int, int] = (64, 64), **rules) -> Sample:
    return Sample(path, size, caption, SubsetConfig("x", captions=CaptionRules(**rules)), 0, 0)


def test_smaller_than_bucket() -> None:
    enlarged = ["/b.png (63x90 to 64x64)", "/c.png (10x20 to 64x128)"]
    assert smaller_than_bucket([]) is None
    assert smaller_than_bucket(enlarged) == (
        "2 pictures are smaller than their bucket and will be enlarged (see bucket_no_upscale): "
        "/b.png (63x90 to 64x64), /c.png (10x20 to 64x128)"
    )
    assert (smaller_than_bucket(enlarged[:1]) or "").startswith("1 picture is smaller")


def test_longer_than_limit() -> None:
    counted: list[list[str]] = []

    def words(texts: list[str]) -> list[int]:
        counted.append(texts)
        return [len(text.split()) for text in texts]

    samples = [
        sample("/short.png", "a b"),
        sample("/long.png", "one two three four"),
        sample("/same.png", "one two three four"),
        sample("/prefix.png", "one two", caption_prefix="my own"),
        sample("/lines.png", "one\none two three four five\nx", enable_wildcard=True),
        sample("/fits.png", "abcdefg hij klm"),
    ]
    assert longer_than_limit(samples, words, 3) == (
        "4 captions are longer than 3 tokens and will be cut (see --max_token_length): "
        "/long.png (4 tokens), /same.png (4 tokens), /prefix.png (4 tokens) and 1 more"
    )
    assert counted == [["one two three four five", "one two three four", "abcdefg hij klm", "my own one two"]]
    assert longer_than_limit([*samples, *samples], words, 3) == longer_than_limit(samples, words, 3)
    assert longer_than_limit(samples, words, 3, most=1) == (
        "at least 1 caption is longer than 3 tokens and will be cut (the 1 longest were counted; "
        "see --max_token_length): /lines.png (5 tokens)"
    )
    assert longer_than_limit(samples, words, 5) is None
    assert longer_than_limit([], words, 5) is None


@pytest.mark.parametrize("name", ["straße 日本.png", "spaces and 'quotes'.png"])
def test_names_are_shown_as_they_are(tmp_path: Path, name: str) -> None:
    pictures(tmp_path, "a.png", caption="x")
    (tmp_path / name).write_bytes(b"")
    assert lint(subset(tmp_path)).problems == (f"{tmp_path}/{name}: is empty (0 bytes)",)
