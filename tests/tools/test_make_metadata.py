# SPDX-License-Identifier: Apache-2.0
"""tools/make_metadata.py: files beside pictures -> a metadata file that a training reads, merged and cleaned."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.data.config import load_dataset_config
from library.data.options import DataOptions
from library.data.scan import scan
from tools.make_metadata import main
from tools.metadata_rules import clean_caption, clean_tags

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "make_metadata.py"


def pictures(folder: Path, texts: Mapping[str, str | None], *, suffix: str = ".png") -> Path:
    """Pictures, and for `name.ending` -> text a file of that name. None: only the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        stem = name.partition(".")[0]
        Image.new("RGB", (8, 8)).save(folder / f"{stem}{suffix}")
        if text is not None:
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def run(*words: object) -> int:
    return main([str(word) for word in words])


def made(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def trained_on(folder: Path | None, path: Path) -> dict[str, str]:
    """Picture -> caption, as a training with --in_json sees them."""
    options = DataOptions(train_data_dir=str(folder) if folder else None, in_json=str(path), resolution=(64, 64))
    found = scan(load_dataset_config(options, bucket_step=8))
    assert [problem for subset in found.subsets for problem in subset.problems] == []
    return {Path(s.path).name: s.caption for dataset in found.datasets for s in dataset.samples}


# ---- merging --------------------------------------------------------------------------------------------------------


def test_captions_then_tags_then_training(tmp_path: Path) -> None:
    folder = pictures(
        tmp_path / "p", {"a.caption": " ein Mädchen 少女\n", "b.caption": "two\r\nlines", "c.caption": None}
    )
    (folder / "a.txt").write_text("1girl, smile", encoding="utf-8")
    out = tmp_path / "new" / "meta.json"
    assert run("--train_data_dir", folder, "--out_json", out, "--caption_extension", ".caption") == 0
    assert made(out) == {"a": {"caption": "ein Mädchen 少女"}, "b": {"caption": "two\nlines"}}
    assert "少女" in out.read_text(encoding="utf-8")  # readable as it is
    assert run("--train_data_dir", folder, "--out_json", out, "--tags_extension", "txt") == 0
    assert made(out) == {"a": {"caption": "ein Mädchen 少女", "tags": "1girl, smile"}, "b": {"caption": "two\nlines"}}
    both = tmp_path / "both.json"
    words = ("--train_data_dir", folder, "--out_json", both)
    assert run(*words, "--caption_extention", "caption", "--tags_extension", ".txt") == 0
    assert made(both) == made(out)
    assert trained_on(folder, out) == {"a.png": "ein Mädchen 少女,1girl, smile", "b.png": "two\nlines"}


def test_merging_keeps_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pictures(tmp_path / "p", {"a.txt": "new", "b.txt": None, "c.txt": "c"})
    old = {"other": {"caption": "o"}, "b": {"tags": "b"}, "a": {"tags": "old", "train_resolution": [512, 512]},
           "c.png": {"tags": "c"}}  # fmt: skip
    source, out = tmp_path / "old.json", tmp_path / "new.json"
    source.write_text(json.dumps(old), encoding="utf-8")
    before = source.read_bytes()
    assert run("--train_data_dir", folder, "--in_json", source, "--out_json", out, "--tags_extension", ".txt") == 0
    assert made(out) == {**old, "a": {"tags": "new", "train_resolution": [512, 512]}}
    assert [*made(out)] == [*old]
    text = capsys.readouterr().err
    assert "tags: 2 of 3 pictures have a .txt file; 1 old ones replaced" in text
    assert "1 pictures have no .txt file: b.png" in text and "get no entry" not in text
    assert source.read_bytes() == before


def test_pictures_without_any_text_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pictures(tmp_path / "p", {"a.txt": "a", "b.txt": None})
    assert run("--train_data_dir", folder, "--out_json", tmp_path / "m.json", "--tags_extension", ".txt") == 0
    assert made(tmp_path / "m.json") == {"a": {"tags": "a"}}
    assert "1 pictures get no entry and will not be trained on: b.png" in capsys.readouterr().err


def test_several_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole paths as keys, wherever the program is started; hidden folders are left out."""
    root = pictures(tmp_path / "p", {"a.txt": "one"})
    pictures(root / "more", {"a.txt": "two"}, suffix=".JPG")
    pictures(root / ".trainyard", {"a.txt": "no"})
    monkeypatch.chdir(tmp_path)
    words = ("--train_data_dir", "p", "--out_json", "m.json", "--tags_extension", ".txt", "--full_path", "--recursive")
    assert run(*words) == 0
    expected = {str(root / "a.png"): {"tags": "one"}, str(root / "more" / "a.JPG"): {"tags": "two"}}
    assert made(tmp_path / "m.json") == expected
    (root / "a.txt").write_text("three", encoding="utf-8")
    old = {"p/a.png": {"tags": "x"}, str(root / "more" / "a"): {"tags": "y"}}  # the same two pictures, named otherwise
    (tmp_path / "m.json").write_text(json.dumps(old), encoding="utf-8")
    assert run(*words) == 0
    assert made(tmp_path / "m.json") == {"p/a.png": {"tags": "three"}, str(root / "more" / "a"): {"tags": "two"}}


def test_json_lines(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", {"a.txt": "tags of ü"})
    lines, again = tmp_path / "m.jsonl", tmp_path / "again.json"
    lines.write_text('{"image_path": "b", "caption": "c", "more": 1}\n\n', encoding="utf-8")
    assert run("--train_data_dir", folder, "--out_json", lines, "--tags_extension", ".txt") == 0
    assert [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()] == [
        {"image_path": "b", "caption": "c", "more": 1},
        {"image_path": "a", "tags": "tags of ü"},
    ]
    assert run("--in_json", lines, "--out_json", again, "--clean") == 0
    assert made(again) == {"b": {"caption": "c", "more": 1}, "a": {"tags": "tags of ü"}}


# ---- cleaning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("long_hair, ^_^, looking_at_viewer", "long hair, ^_^, looking at viewer"),
        ("1girl, smile, rating:safe", "1girl, smile"),
        ("rating:safe, smile", "rating:safe, smile"),  # only at the end of a list
        ("1girl, blue eyes, red eyes, blonde hair, red hair", "1girl, blue eyes, red eyes, blonde hair, red hair"),
        ("2girls, blue eyes, red eyes, blonde hair, red hair, long hair", "2girls, long hair"),
        ("2girls, long hair, short hair, blonde hair, smile", "2girls, blonde hair, smile"),
        ("multiple boys, bob cut, hime cut, sleeveless, long sleeves, ponytail, hair bun", "multiple boys"),
        ("2girls, blue eyes, ponytail, blonde hair", "2girls, blue eyes, ponytail, blonde hair"),  # one of each
        ("shirt, white shirt, hair ornament, blue hair ornament, dress", "white shirt, blue hair ornament, dress"),
        ("shirt, t-shirt, off-shoulder shirt", "shirt, t-shirt, off-shoulder shirt"),
        ("a,b , ,c", "a, b, c"),
        ("", ""),
    ],
)
def test_tags(before: str, after: str) -> None:
    assert clean_tags(before) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a young woman and two ladies", "a girl and two ladies"),
        ("two women, people, a person", "two girls, girls, a girl"),
        ("anime anime anime characters", "girls"),
        ("a cartoon anime drawing of a cartoon lady", "a drawing of a girl"),
        ("a cartoon image, a cartoon picture, an anime cartoon image", "an image, a picture, an image"),
        ("a woman woman", "a girl"),
        ("a ladybug, personal, youngster", "a ladybug, personal, youngster"),
        ("Women", "Women"),
    ],
)
def test_captions(before: str, after: str) -> None:
    assert clean_caption(before) == after


def test_cleaning_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "a.json", tmp_path / "b.json"
    source.write_text(json.dumps({"x": {"caption": "a woman", "tags": "red_dress"}, "y": {"caption": None}}))
    assert run("--in_json", source, "--out_json", out, "--clean", "--debug") == 0
    assert made(out) == {"x": {"caption": "a girl", "tags": "red dress"}, "y": {"caption": None}}
    assert capsys.readouterr().out.splitlines() == ["x: caption: a woman -> a girl", "x: tags: red_dress -> red dress"]
    assert run("--out_json", out, "--clean") == 0
    assert "cleaning changed 0 captions and tag lists" in capsys.readouterr().err


# ---- the program ----------------------------------------------------------------------------------------------------


def test_as_a_script_from_any_folder(tmp_path: Path) -> None:
    pictures(tmp_path / "p", {"a.txt": "cat"})
    words = ["--train_data_dir", "p", "--out_json", "m.json", "--tags_extension", ".txt", "--debug"]
    done = subprocess.run([sys.executable, "-P", str(SCRIPT), *words], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "a: tags: cat\n")
    assert made(tmp_path / "m.json") == {"a": {"tags": "cat"}}


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pictures(tmp_path / "p", {"a.txt": "a", "b.txt": "b"})
    (tmp_path / "empty").mkdir()
    out = tmp_path / "m.json"
    out.write_text('{"a": {"tags": "precious"}}')
    bad = {"broken": '{"a": ', "list": "[]", "number": '{"a": {"tags": 3}}', "twice": '{"a": {}, "a": {"tags": "x"}}',
           "both": '{"a": {}, "a.png": {}}'}  # fmt: skip
    for name, text in bad.items():
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "twice.jsonl").write_text('{"image_path": "a"}\n{"image_path": "a"}\n')
    base = ("--train_data_dir", folder, "--out_json", out)
    tags = ("--tags_extension", ".txt")
    read = lambda name: (*base, *tags, "--in_json", tmp_path / name)
    cases: list[tuple[tuple[object, ...], str]] = [
        (base, "nothing to read: give --caption_extension .caption, --tags_extension .txt, or both"),
        (("--out_json", out), "--train_data_dir is needed"),
        (("--train_data_dir", folder, *tags), "--out_json is needed"),
        ((*base, *tags, "--out_json", "m.txt"), "--out_json m.txt: the file must end with .json or .jsonl"),
        ((*base, *tags, "--recursive"), "--recursive needs --full_path"),
        ((*base, *tags, "--train_data_dir", tmp_path / "no"), f"--train_data_dir: {tmp_path / 'no'} is no folder"),
        ((*base, *tags, "--train_data_dir", tmp_path / "empty"), "holds no picture"),
        (read("no.json"), "no.json: No such file"),
        (read("broken.json"), "broken.json, line 1 is not valid JSON"),
        (read("list.json"), "expects an object of picture names, got a list"),
        (read("number.json"), "entry 'a' expects a text as tags, got 3"),
        (read("twice.json"), "twice.json has keys that stand there several times: a"),
        (read("twice.jsonl"), "twice.jsonl: pictures with several lines: a"),
        (read("both.json"), "several entries are of this picture, leave one: a.png, a"),
        (("--out_json", tmp_path / "new.json", "--clean"), "there is nothing to clean; give --in_json"),
        ((*base, "--tags_extention", ".txt"), "Unknown option --tags_extention. Did you mean --tags_extension?"),
    ]
    for words, expected in cases:
        assert run(*words) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert any(expected in line for line in lines), (expected, lines)
    (folder / "a.txt").write_bytes(b"\xff\xfe")
    (folder / "b.txt").write_bytes(b"abc\xff")
    assert run(*base, *tags) == 2
    text = capsys.readouterr().err
    assert "a.txt is not UTF-8 text (byte 0)" in text and "b.txt is not UTF-8 text (byte 3)" in text
    Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    assert run(*base, *tags) == 2
    assert "have one key, 'a': rename one, or give --full_path" in capsys.readouterr().err
    assert out.read_text() == '{"a": {"tags": "precious"}}'
    assert {path.name for path in tmp_path.iterdir()} == {
        "p", "empty", "m.json", "twice.jsonl", *(f"{name}.json" for name in bad)
    }  # fmt: skip
