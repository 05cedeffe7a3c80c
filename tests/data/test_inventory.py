# SPDX-License-Identifier: Apache-2.0
"""The plan's line of a folder: where captions come from, what is left out, what is there twice."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from library.data import inventory, lint
from library.data.config_problems import missing_paths
from library.data.records import BucketRules, DatasetConfig, SubsetConfig
from library.data.scan import Scan, scan
from library.rng import python_rng


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", size, python_rng("picture", seed).randbytes(size[0] * size[1] * 3)).save(path)
    return path


def scanned(*subsets: SubsetConfig) -> Scan:
    return scan([DatasetConfig(tuple(subsets), BucketRules((64, 64)))])


def said(*subsets: SubsetConfig) -> tuple[list[str], tuple[str, ...]]:
    """(lines of the plan, warnings)"""
    found = scanned(*subsets)
    return list(lint.folder_lines(found)), lint.check(found).warnings


def test_the_line_of_a_mixed_folder(tmp_path: Path) -> None:
    folder = tmp_path / "10_my dog"
    for number in range(24):
        picture(folder / f"{number:02}.png", number)
        if number < 7:
            (folder / f"{number:02}.txt").write_text(f"caption {number}")
    shutil.copy(folder / "00.png", folder / "05.png")
    shutil.copy(folder / "00.png", folder / "23.png")
    for name in ("IMG_1.HEIC", "clip.MOV", "Thumbs.db", ".DS_Store", "00_0008x0008_sd.npz", "meta.json", "lonely.txt"):
        (folder / name).write_bytes(b"x")
    (folder / "more").mkdir()
    subset = SubsetConfig(str(folder), class_tokens="my dog", caption_extension=".txt")
    lines, warnings = said(subset)
    assert lines == [
        f'{folder}: 24 pictures; captions: 7 from .txt, 17 from the folder\'s name "my dog"; '
        "left out: 1 .HEIC, 1 .MOV, 1 .txt, 1 subfolder; 2 duplicates (05.png = 00.png, 23.png = 00.png)"
    ]
    assert warnings == (
        f"{folder}: 1 picture left out, of formats that are not read: save them as png, jpg or webp to train on them "
        "(IMG_1.HEIC)",
    )
    again, _ = said(replace(subset, class_tokens="a cat"), subset, subset)
    assert '17 from class_tokens "a cat"' in again[0] and again[1:] == lines


def test_captions_that_are_not_read(tmp_path: Path) -> None:
    for name in ("1", "2", "3", "4"):
        picture(tmp_path / f"{name}.png", int(name))
    (tmp_path / "1.txt").write_text("one")
    (tmp_path / "2.TXT").write_text("two")
    (tmp_path / "3.caption").write_text("three")
    (tmp_path / "3.txt").write_text("not missed: there is another one")
    lines, warnings = said(SubsetConfig(str(tmp_path), class_tokens="dog"))
    assert lines == [f'{tmp_path}: 4 pictures; captions: 1 from .caption, 3 from class_tokens "dog"']
    assert len(warnings) == 2
    assert f"{tmp_path}: 1 .txt file beside the pictures is not read as captions" in warnings[0]
    assert warnings[0].endswith("give --caption_extension .txt, or caption_extension in the dataset file (1.txt)")
    lines, warnings = said(SubsetConfig(str(tmp_path), class_tokens="dog", caption_extension=".txt"))
    assert "captions: 2 from .txt, 2 from" in lines[0]
    assert warnings == (
        f"{tmp_path}: 1 .TXT file beside the pictures is not read, for captions end in .txt: rename them (2.TXT)",
    )
    (tmp_path / "3.caption").unlink()
    (line,) = lint.check(scanned(SubsetConfig(str(tmp_path)))).problems
    assert "none of the 4 pictures has a caption" in line and "beside them lie .TXT, .txt files" in line


def test_a_metadata_file_and_what_it_does_not_name(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name)
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"a.png": {"caption": "x"}, "b.png": {"caption": ""}}))
    lines, _ = said(SubsetConfig(str(tmp_path), metadata_file=str(meta)))
    assert lines == [
        f"{meta}: 2 pictures; captions: 1 from meta.json, 1 without; left out: 1 not in meta.json; "
        "1 duplicate (b.png = a.png)"
    ]


def test_a_folder_of_masks_inside_is_not_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "masks" / "a.png")
    lines, _ = said(SubsetConfig(str(tmp_path), class_tokens="x", conditioning_data_dir=str(tmp_path / "masks")))
    assert "left out" not in lines[0]


def test_many_folders_are_counted(tmp_path: Path) -> None:
    subsets = [SubsetConfig(str(tmp_path / str(n)), class_tokens="x") for n in range(lint.MOST_FOLDERS + 5)]
    for subset in subsets:
        picture(Path(subset.image_dir or "") / "a.png")
    lines, _ = said(*subsets)
    assert len(lines) == lint.MOST_FOLDERS + 1 and lines[-1] == "and 5 more folders"


def test_equal_sizes_are_compared_by_content_and_not_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        picture(tmp_path / f"{number}.bmp", number % 4, (160, 150))  # above what is read first
    data = bytearray((tmp_path / "2.bmp").read_bytes())
    data[-1] ^= 1
    (tmp_path / "6.bmp").write_bytes(data)  # equal but for its last byte
    subset = SubsetConfig(str(tmp_path), class_tokens="x")
    assert "; 2 duplicates (4.bmp = 0.bmp, 5.bmp = 1.bmp)" in said(subset)[0][0]
    monkeypatch.setattr(inventory, "MOST_COMPARED", 6)
    assert said(subset)[0][0].endswith("duplicates not looked for, too many files have the same size")


# ---- what is no file ------------------------------------------------------------------------------------------------


def make_socket(path: Path) -> None:
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(path.name)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "is a named pipe": os.mkfifo,
    "is a device": lambda path: os.symlink("/dev/zero", path),
    "is a socket": make_socket,
    "cannot be read (Is a directory)": os.mkdir,
    "cannot be read (No such file or directory)": lambda path: os.symlink("gone", path),
}


@pytest.mark.skipif(os.name == "nt", reason="kinds of files of POSIX")
@pytest.mark.parametrize("place", ["q.png", "a.txt", "masks/a.png", "q.jxl"])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_named_and_never_waited_for(
    tmp_path: Path, kind: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    (tmp_path / "masks").mkdir()
    path = tmp_path / place
    NO_FILES[kind](path)
    masks = str(tmp_path / "masks") if "masks" in place else None
    subset = SubsetConfig(str(tmp_path), caption_extension=".txt", class_tokens="x", conditioning_data_dir=masks)
    problems = lint.check(scanned(subset)).problems
    assert len(problems) == 1 and problems[0].startswith(f"{path}: {kind}")


@pytest.mark.skipif(os.name == "nt", reason="kinds of files of POSIX")
@pytest.mark.parametrize("kind", [*NO_FILES][:3])
def test_a_manifest_and_metadata_that_are_no_files(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    (tmp_path / ".trainyard").mkdir()
    NO_FILES[kind](tmp_path / ".trainyard" / "files.json")
    NO_FILES[kind](tmp_path / "meta.json")
    found = scanned(SubsetConfig(str(tmp_path), class_tokens="x"))
    assert len(found.subsets[0].samples) == 1
    lines = list(missing_paths(SubsetConfig(str(tmp_path), metadata_file="meta.json")))
    assert lines == ["metadata_file meta.json is neither a file nor a folder"]
