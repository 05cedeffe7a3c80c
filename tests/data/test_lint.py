# SPDX-License-Identifier: Apache-2.0
"""What stops a run, what is only said, and how."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from PIL import Image

from library.data.dataset import TrainingData
from library.data.lint import (
    Report,
    bucket_warnings,
    check,
    choices_never_trained,
    idle_bucket_options,
    longer_than_limit,
    smaller_than_bucket,
    split_warnings,
)
from library.data.records import BucketRules, CaptionRules, DatasetConfig, ImageRules, Sample, SubsetConfig
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


def test_what_is_counted_is_what_is_trained() -> None:
    """Marks are no tokens, of {a|b} one is read, and a line that is never chosen is never read."""
    marks = {"keep_tokens_separator": "|||", "secondary_separator": " ; ", "caption_separator": ","}
    samples = [
        sample("/marks.png", "one ||| two ||| three ; four", **marks),
        sample("/choice.png", "{one|two|three} {four|five six}", enable_wildcard=True),
        sample("/first.png", "one\ntwo three four five"),
        sample("/dropped.png", "one two three four", caption_dropout_rate=1.0),
    ]

    def words(texts: list[str]) -> list[int]:
        return [len(re.findall(r"\w+|\|", text)) for text in texts]

    assert longer_than_limit(samples, words, 3) == (
        "1 caption is longer than 3 tokens and will be cut (see --max_token_length): /marks.png (4 tokens)"
    )
    assert (longer_than_limit(samples, words, 2) or "").startswith("2 captions")


def test_choices_that_are_never_trained() -> None:
    few = sample("/few.png", "{a|b|c}\nd, e, f, g", enable_wildcard=True)
    many = sample("/many.png", "{" + "|".join("abcdefghij") + "}", enable_wildcard=True)
    assert choices_never_trained([few, many], 10) is None
    assert (choices_never_trained([few, many], 8) or "").endswith("(see --caption_variants): /many.png (10 choices)")
    crowd = [dataclasses.replace(many, path=f"/{n}.png") for n in range(15)]
    assert (choices_never_trained(crowd, 3) or "").endswith("/9.png (10 choices) and 5 more")
    assert choices_never_trained([sample("/x.png", "{a|b|c}")], 1) is None  # no wildcard


# ---- splits and buckets


def warnings(samples: list[Sample], rules: BucketRules, *more: list[Sample], **values) -> list[str]:
    groups = [samples, *more]
    config = DatasetConfig(tuple(group[0].subset for group in groups), rules, **values)
    data = TrainingData([(config, [sample for group in groups for sample in group])], seed=1)
    (stats,) = data.stats()
    return [*split_warnings("d", config, stats), *bucket_warnings("d", rules, stats)]


def folder_of(name: str, count: int, size: tuple[int, int] = (64, 64)) -> list[Sample]:
    config = SubsetConfig(f"/{name}")
    return [Sample(f"/{name}/{n}.png", size, "x", config, 0, 0) for n in range(count)]


def test_a_split_that_holds_out_none_or_all() -> None:
    rules = BucketRules((64, 64))
    assert warnings(folder_of("a", 4), rules, validation_split=0.1) == [
        "d: validation_split 0.1 holds out no picture of /a (4), so that there is no validation: each subset is split "
        "by itself; 0.25 would hold out one of 4"
    ]
    (line,) = warnings(folder_of("a", 20), rules, folder_of("b", 3), validation_split=0.1)
    assert line.startswith("d: validation_split 0.1 holds out no picture of /b (3): each") and "0.33" in line
    (line,) = warnings(folder_of("a", 20), rules, folder_of("b", 1), validation_split=0.6)
    assert line == "d: validation_split 0.6 holds out every picture of /b"
    (line,) = warnings(folder_of("a", 40), rules, *[folder_of(f"f{n}", 2) for n in range(12)], validation_split=0.1)
    assert "/f9 (2) and 2 more: each subset" in line
    (line,) = warnings(folder_of("a", 20), rules, folder_of("a", 10), validation_split=0.2)
    assert "not trained, as another subset or dataset holds out the same for validation: /a/" in line
    for count, split in ((4, 0.25), (3, 0.34), (1, 0.0), (20, 0.1)):
        assert warnings(folder_of("a", count), rules, validation_split=split) == []


PHOTOS = {"4:3": (4000, 3000), "3:2": (3000, 2000), "16:9": (1920, 1080), "square": (2000, 2000), "wide": (3000, 400)}
SHAPES: dict[str, tuple[BucketRules, dict[str, str]]] = {
    "1024": (BucketRules((1024, 1024), True), {"4:3": "area", "3:2": "area", "16:9": "area", "wide": "area crop"}),
    "2048": (BucketRules((1024, 1024), True, max_bucket_reso=2048), {"wide": "area"}),
    "512": (BucketRules((512, 512), True), {"wide": "crop"}),
    "no buckets": (BucketRules((512, 512)), {"4:3": "crop", "3:2": "crop", "16:9": "crop", "wide": "crop"}),
    "no upscale": (BucketRules((1024, 1024), True, bucket_no_upscale=True), {}),
    "one size": (
        BucketRules((512, 512), True, 512, 512),
        {"4:3": "one crop", "3:2": "one crop", "16:9": "one crop", "wide": "one crop", "square": "one"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", PHOTOS)
@pytest.mark.parametrize("name", SHAPES)
def test_what_buckets_take_from_a_picture(name: str, shape: str) -> None:
    rules, expected = SHAPES[name]
    marks = {"area": "of the area to max_bucket_reso", "crop": "to the crop", "one": "enable_bucket: no effect"}
    lines = warnings(folder_of("a", 1, PHOTOS[shape]), rules)
    found = {mark for mark, text in marks.items() if any(text in line for line in lines)}
    assert found == set(expected.get(shape, "").split()), lines
    assert len(lines) == len(found)


def test_pictures_of_a_warning_are_ten_and_a_number() -> None:
    (line,) = warnings(folder_of("a", 14, (4000, 3000)), BucketRules((1024, 1024), True))
    assert line.startswith(
        "d: 14 pictures lose more than 10% of the area to max_bucket_reso = 1024: /a/0.png (1024x768 "
    )
    assert line.count(".png") == 10 and line.endswith(" and 4 more")
    (line,) = warnings(folder_of("a", 1, (3000, 400)), BucketRules((512, 512), True))
    assert line.startswith("d: 1 picture loses more than 20% to the crop") and "3000x400 to 1024x256: 47%" in line


def test_a_crop_that_moves_takes_nothing() -> None:
    moving = SubsetConfig("/a", images=ImageRules(random_crop=True))
    samples = [dataclasses.replace(sample, subset=moving) for sample in folder_of("a", 1, (3000, 400))]
    assert warnings(samples, BucketRules((512, 512), True)) == []


def test_settings_of_buckets_without_buckets() -> None:
    def said(*rules: BucketRules) -> list[str]:
        return list(idle_bucket_options([DatasetConfig((), rule) for rule in rules]))

    size = (512, 512)
    assert said(BucketRules(size), BucketRules(size, True, max_bucket_reso=2048)) == []
    without = (BucketRules(size, max_bucket_reso=2048, bucket_no_upscale=True), BucketRules(size, bucket_reso_steps=32))
    assert said(*without) == ["max_bucket_reso, bucket_no_upscale, bucket_reso_steps: no effect without enable_bucket"]
    assert said(BucketRules(size, True, min_bucket_reso=128, bucket_no_upscale=True)) == [
        "min_bucket_reso: no effect with bucket_no_upscale"
    ]


@pytest.mark.parametrize("name", ["straße 日本.png", "spaces and 'quotes'.png"])
def test_names_are_shown_as_they_are(tmp_path: Path, name: str) -> None:
    pictures(tmp_path, "a.png", caption="x")
    (tmp_path / name).write_bytes(b"")
    assert lint(subset(tmp_path)).problems == (f"{tmp_path}/{name}: is empty (0 bytes)",)
