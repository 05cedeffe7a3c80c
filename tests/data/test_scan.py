# SPDX-License-Identifier: Apache-2.0
"""Headers against PIL, captions, metadata, masks, today's npz files, and what the manifest remembers."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import struct
import threading
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageOps, PngImagePlugin, features

from library.data import folder as folder_module
from library.data.folder import Folder, read_all
from library.data.headers import ALPHA, TURNED, Header, read_header
from library.data.manifest import Manifest, manifest_path, read_manifest, write_manifest
from library.data.records import BucketRules, CaptionRules, DatasetConfig, Sample, SubsetConfig
from library.data.scan import SubsetScan, caption_of, join_tags, scan

OLD = 1_600_000_000  # seconds; the manifest does not trust files of the last two seconds


def age(folder: Path, seconds: int = OLD) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (seconds, seconds))


def make(path: Path, size: tuple[int, int] = (32, 24), mode: str = "RGB", **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 1).save(path, **save)
    return path


def config(*subsets: SubsetConfig) -> tuple[DatasetConfig, ...]:
    return (DatasetConfig(subsets, BucketRules((64, 64))),)


def scan_one(subset: SubsetConfig, **options) -> SubsetScan:
    return scan(config(subset), **options).subsets[0]


def by_name(found: SubsetScan) -> dict[str, Sample]:
    return {Path(sample.path).name: sample for sample in found.samples}


# ---- headers ------------------------------------------------------------------------------------------------------


def header_of(path: Path) -> Header:
    with path.open("rb", buffering=0) as file:
        return read_header(str(path), file.fileno(), path.stat().st_size)


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    block[0x010F] = "maker"
    return block.tobytes()


def xmp(orientation: int) -> bytes:
    return b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation


ODD_IMAGES = {
    "rgb.png": ("RGB", {}),
    "rgba.png": ("RGBA", {}),
    "grey.png": ("L", {}),
    "grey_alpha.png": ("LA", {}),
    "palette.png": ("P", {}),
    "palette_transparent.png": ("P", {"transparency": 1}),
    "rgb_transparent.png": ("RGB", {"transparency": (1, 1, 1)}),
    "bilevel.png": ("1", {}),
    "deep.png": ("I;16", {}),
    "turned.png": ("RGB", {"exif": exif(6)}),
    "interlaced_text.png": ("RGB", {"pnginfo": "text"}),
    "baseline.jpg": ("RGB", {}),
    "progressive.jpg": ("RGB", {"progressive": True}),
    "grey.jpg": ("L", {}),
    "cmyk.jpg": ("CMYK", {}),
    "turned.jpg": ("RGB", {"exif": exif(8)}),
    "mirrored.jpg": ("RGB", {"exif": exif(2)}),
    "turned_xmp.jpg": ("RGB", {"xmp": xmp(6)}),
    "both.jpg": ("RGB", {"exif": exif(1), "xmp": xmp(6)}),
    "big_profile.jpg": ("RGB", {"icc_profile": bytes(100_000)}),
    "jpeg_inside.png": ("RGB", {"format": "JPEG"}),
    "lossy.webp": ("RGB", {}),
    "lossy_alpha.webp": ("RGBA", {}),
    "lossless.webp": ("RGB", {"lossless": True}),
    "lossless_alpha.webp": ("RGBA", {"lossless": True}),
    "turned.webp": ("RGB", {"exif": exif(5)}),
    "turned_xmp.webp": ("RGB", {"xmp": xmp(7)}),
    "rgb.bmp": ("RGB", {}),
    "palette.bmp": ("P", {}),
    "bilevel.bmp": ("1", {}),
    "tiff_inside.jpg": ("RGB", {"format": "TIFF"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_header_equals_pil(tmp_path: Path, name: str) -> None:
    mode, save = ODD_IMAGES[name]
    if save.get("pnginfo"):
        text = PngImagePlugin.PngInfo()
        text.add_text("workflow", "x" * 20_000)  # longer than what is read at first
        save = {"pnginfo": text}
    path = tmp_path / name
    picture = Image.effect_noise((37, 21), 50) if mode in ("RGB", "L", "CMYK") else Image.new("L", (37, 21))
    if mode == "I;16":
        picture = Image.new("I;16", (37, 21), 4000)
    elif mode == "RGBA":
        picture = Image.merge("RGBA", [Image.effect_noise((37, 21), 50)] * 4)
    else:
        picture = picture.convert(mode)
    picture.save(path, **save)
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        orientation = image.getexif().get(0x0112, 1)
        alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    flags = (ALPHA if alpha else 0) | (TURNED if orientation != 1 else 0)
    assert header_of(path) == (*upright.size, flags, "")


@pytest.mark.skipif(not features.check("avif"), reason="this PIL has no AVIF")
def test_avif(tmp_path: Path) -> None:
    path = make(tmp_path / "a.avif", (40, 24))
    assert header_of(path)[:2] == (40, 24)
    path.write_bytes(path.read_bytes()[:-10])
    assert header_of(path).problem


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations(tmp_path: Path, orientation: int) -> None:
    path = make(tmp_path / "a.jpg", (40, 24), exif=exif(orientation))
    expected = (24, 40) if orientation >= 5 else (40, 24)
    assert header_of(path)[:2] == expected


def test_png_with_a_trailer_and_late_exif(tmp_path: Path) -> None:
    path = make(tmp_path / "a.png", (40, 24))
    path.write_bytes(path.read_bytes() + b"some program's notes")
    assert header_of(path) == (40, 24, 0, "")
    chunk = b"eXIf" + exif(6).removeprefix(b"Exif\0\0")
    data = make(tmp_path / "b.png", (40, 24)).read_bytes()
    late = data[:-12] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[-12:]
    (tmp_path / "b.png").write_bytes(late)
    assert header_of(tmp_path / "b.png")[:2] == (24, 40)


def test_jpeg_with_a_trailer(tmp_path: Path) -> None:
    path = make(tmp_path / "a.jpg", (40, 24))
    path.write_bytes(path.read_bytes() + bytes(100))
    assert header_of(path) == (40, 24, 0, "")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "b.webp", "a.bmp"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.98])
def test_truncated_files_are_found(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    picture = Image.merge("RGB", [Image.effect_noise((200, 120), 80)] * 3)
    picture.save(path, **({"lossless": True} if name == "b.webp" else {}))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert header_of(path).problem


def test_fake_and_empty_files(tmp_path: Path) -> None:
    cases = {
        "empty.png": (b"", "is empty (0 bytes)"),
        "text.png": (b"hello, this is no picture", "is not a picture (it begins with b'hello, this ')"),
        "page.jpg": (b"<!DOCTYPE html><html>", "is not a picture (it begins with b'<!DOCTYPE ht')"),
        "pointer.png": (b"version https://git-lfs.g", "is a Git LFS pointer, not the picture: run git lfs pull"),
        "short.jpg": (b"\xff\xd8", "is not a picture (it begins with b'\\xff\\xd8')"),
        "looks.bmp": (b"BM", "is not a picture (it begins with b'BM')"),
    }  # fmt: skip
    for name, (data, problem) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        assert header_of(path).problem == problem


def test_absurd_sizes(tmp_path: Path) -> None:
    data = bytearray(make(tmp_path / "a.png").read_bytes())
    for width, height in ((65536, 1), (1, 70000), (20000, 20000)):
        data[16:24] = struct.pack(">II", width, height)
        (tmp_path / "a.png").write_bytes(data)
        problem = header_of(tmp_path / "a.png").problem
        assert problem == f"is {width}x{height} pixels: more than 65,535 on a side or 178,956,970 in all"


# ---- captions -----------------------------------------------------------------------------------------------------


def test_caption_rules() -> None:
    text = "\ufefffirst , line \r\n\r\n  second\rthird\n".removeprefix("\ufeff")
    assert caption_of(text, enable_wildcard=False) == "first , line"
    assert caption_of(text, enable_wildcard=True) == "first , line\nsecond\nthird"
    assert caption_of("", enable_wildcard=False) == caption_of(" \n", enable_wildcard=True) == ""
    assert join_tags("a cat", "red, big", separator=", ", enable_wildcard=False) == "a cat, red, big"
    assert join_tags("", "red", separator=",", enable_wildcard=False) == "red"
    assert join_tags("a\n\nb", "x\ny", separator=",", enable_wildcard=True) == "a,x,y\nb,x,y"


def test_caption_files(tmp_path: Path) -> None:
    texts = {
        "a.txt": "exact", "face.txt": "by face name", "x_1_2_3_4.txt": "own", "x.txt": "other",
        "bom.txt": "\ufeffwith mark\nmore", "empty.txt": "\n", "a.caption": "another suffix",
    }  # fmt: skip
    for name in ("a", "face_1_2_3_4", "x_1_2_3_4", "bom", "empty", "none", "日本 ü"):
        make(tmp_path / f"{name}.jpg")
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "日本 ü.txt").write_text("絵 🙂", encoding="utf-8")
    found = scan_one(SubsetConfig(str(tmp_path), caption_extension=".txt"))
    captions = {name: sample.caption for name, sample in by_name(found).items()}
    assert captions == {
        "a.jpg": "exact", "face_1_2_3_4.jpg": "by face name", "x_1_2_3_4.jpg": "own", "bom.jpg": "with mark",
        "empty.jpg": "", "none.jpg": "", "日本 ü.jpg": "絵 🙂",
    }  # fmt: skip
    assert (found.without_caption, found.empty_caption) == (("none.jpg",), ("empty.jpg",))
    with_class = scan_one(SubsetConfig(str(tmp_path), caption_extension=".txt", class_tokens="a thing"))
    assert [by_name(with_class)[name].caption for name in ("none.jpg", "empty.jpg", "a.jpg")] == [
        "a thing",
        "a thing",
        "exact",
    ]
    assert (with_class.without_caption, with_class.empty_caption) == ((), ())
    wild = SubsetConfig(str(tmp_path), caption_extension=".txt", captions=CaptionRules(enable_wildcard=True))
    assert by_name(scan_one(wild))["bom.jpg"].caption == "with mark\nmore"


def test_samples_are_sorted_and_complete(tmp_path: Path) -> None:
    for name in ("b.png", "B.PNG", "a10.jpg", "a2.JPEG", "c.webp"):
        make(tmp_path / name, (32, 24), format="PNG" if name.lower().endswith("png") else None)
    for name in (".hidden.png", "._b.png", "notes.md", "movie.gif"):
        (tmp_path / name).write_bytes(b"x")
    make(tmp_path / "inner" / "deep.png")
    make(tmp_path / "alpha.png", mode="RGBA")
    age(tmp_path)
    found = scan_one(SubsetConfig(str(tmp_path)))
    assert [Path(s.path).name for s in found.samples] == ["B.PNG", "a10.jpg", "a2.JPEG", "alpha.png", "b.png", "c.webp"]
    sample = by_name(found)["alpha.png"]
    assert sample.has_alpha and not by_name(found)["b.png"].has_alpha
    assert (sample.size, sample.mtime_ns) == ((32, 24), OLD * 10**9)
    assert sample.file_size == (tmp_path / "alpha.png").stat().st_size
    assert vars(sample) == vars(Sample(**vars(sample)))  # no field is forgotten
    assert os.path.isabs(sample.path) and sample.subset.image_dir == str(tmp_path)
    assert found.problems == ()


def test_shared_stems_and_contents(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "b.png"):
        make(tmp_path / name)
    assert scan_one(SubsetConfig(str(tmp_path))).shared_stems == (("a.jpg", "a.png"),)
    empty = tmp_path / "empty"
    (empty / "sub").mkdir(parents=True)
    for name in ("x.txt", "y.txt", "z.gif"):
        (empty / name).write_text("")
    assert scan_one(SubsetConfig(str(empty))).contents == "2 .txt, 1 .gif, 1 folders"


def test_bad_files_are_all_named(tmp_path: Path) -> None:
    make(tmp_path / "good.png")
    (tmp_path / "bad1.png").write_bytes(b"")
    (tmp_path / "bad2.jpg").write_bytes(b"text")
    (tmp_path / "good.txt").write_bytes("grün".encode("latin-1"))
    (tmp_path / "bad1.txt").write_bytes("häßlich".encode("utf-16"))
    os.symlink(tmp_path / "nowhere.png", tmp_path / "link.png")
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "unused.txt").write_bytes(b"\xff")
    found = scan_one(SubsetConfig(str(tmp_path), caption_extension=".txt"))
    assert found.problems == (
        f"{tmp_path}/bad1.png: is empty (0 bytes)",
        f"{tmp_path}/bad1.txt: is not UTF-8 text (byte 0; it looks like UTF-16): save it as UTF-8",
        f"{tmp_path}/bad2.jpg: is not a picture (it begins with b'text')",
        f"{tmp_path}/dir.png: cannot be read (Is a directory)",
        f"{tmp_path}/good.txt: is not UTF-8 text (byte 2): save it as UTF-8",
        f"{tmp_path}/link.png: cannot be read (No such file or directory)",
    )
    assert [Path(s.path).name for s in found.samples] == ["good.png"]


# ---- metadata files -----------------------------------------------------------------------------------------------


def test_metadata_json_and_jsonl(tmp_path: Path) -> None:
    pics = tmp_path / "pics"
    for name in ("b.png", "a.jpg", "sub/c.png", "unlisted.png"):
        make(pics / name)
    outside = make(tmp_path / "other" / "d.png")
    entries = {
        "b.png": {"caption": "bee", "tags": "x, y", "image_size": [9, 9]},
        "a": {"tags": "only tags"},  # a name without suffix
        "sub/c.png": {"caption": "deep"},
        str(outside): {"caption": None, "tags": ""},
        "gone.png": {"caption": "x"},
    }
    (tmp_path / "m.json").write_text(json.dumps(entries), encoding="utf-8")
    (tmp_path / "m.jsonl").write_text(
        "\n".join(json.dumps({"image_path": k, **v}) for k, v in entries.items()) + "\n\n"
    )
    for name in ("m.json", "m.jsonl"):
        found = scan_one(SubsetConfig(str(pics), metadata_file=str(tmp_path / name)))
        captions = [(s.path, s.caption, s.size) for s in found.samples]
        assert captions == [
            (str(outside), "", (32, 24)), (str(pics / "a.jpg"), "only tags", (32, 24)),
            (str(pics / "b.png"), "bee,x, y", (32, 24)), (str(pics / "sub/c.png"), "deep", (32, 24)),
        ]  # fmt: skip
        assert found.empty_caption == (str(outside),)
        assert found.problems == (f"{tmp_path / name}: 1 pictures are not there: gone.png (image_dir: {pics})",)


def test_bad_metadata(tmp_path: Path) -> None:
    make(tmp_path / "a.png")
    file = tmp_path / "m.json"
    cases = {
        '{"a.png": {"caption": 3}}': f"{file}: entry 'a.png' expects a text as caption, got 3",
        '{"a.png": "cat"}': f"{file}: entry 'a.png' expects an object with caption or tags, got 'cat'",
        "[1]": f"{file}: expects an object of picture names, got a list",
        '{"a.png":\n{"caption" 3}}': f"{file}, line 2 is not valid JSON: Expecting ':' delimiter",
    }
    for text, problem in cases.items():
        file.write_text(text)
        assert scan_one(SubsetConfig(str(tmp_path), metadata_file=str(file))).problems == (problem,)
    file.write_bytes(b'{"a": "\xff"}')
    assert "not UTF-8" in scan_one(SubsetConfig(str(tmp_path), metadata_file=str(file))).problems[0]
    lines = tmp_path / "m.jsonl"
    lines.write_text('{"image_path": "a.png", "caption": "x"}\nnonsense\n{"caption": "y"}\n')
    assert scan_one(SubsetConfig(str(tmp_path), metadata_file=str(lines))).problems == (
        f"{lines}, line 2 is not valid JSON: Expecting value",
        f"{lines}: line 3 has no image_path",
    )


# ---- masks and today's caches -------------------------------------------------------------------------------------


def test_masks_by_stem(tmp_path: Path) -> None:
    for name in ("pics/a.jpg", "pics/b.jpg", "pics/c.jpg", "masks/a.png", "masks/extra.png"):
        make(tmp_path / name)
    (tmp_path / "masks/c.png").write_bytes(b"")
    found = scan_one(SubsetConfig(str(tmp_path / "pics"), conditioning_data_dir=str(tmp_path / "masks")))
    assert by_name(found)["a.jpg"].mask_path == str(tmp_path / "masks/a.png")
    assert found.problems == (
        f"{tmp_path}/masks/c.png: is empty (0 bytes)",
        f"{tmp_path}/masks: no mask of the same name for 1 pictures: b.jpg",
    )
    assert found.unused_masks == ("extra.png",)


def test_todays_npz_needs_the_exact_stem(tmp_path: Path) -> None:
    """`a_b_0100x0300_sd.npz` once gave `a.png` the size of the other picture."""
    make(tmp_path / "a.png", (300, 100))
    make(tmp_path / "a_b.png", (100, 300))
    make(tmp_path / "turned.jpg", (64, 64), exif=exif(3))
    make(tmp_path / "new.png", (64, 64))
    for name in ("a_b_0100x0300_sd", "turned_0064x0064_sd", "new_0064x0064_sd", "a_0300x0100_sdxl"):
        (tmp_path / f"{name}.npz").write_bytes(b"x")
    age(tmp_path)
    os.utime(tmp_path / "new.png", (OLD + 5, OLD + 5))  # changed after it was cached
    found = by_name(scan_one(SubsetConfig(str(tmp_path)), npz_suffix="_sd.npz"))
    assert {name: s.legacy_latents for name, s in found.items()} == {
        "a.png": None, "a_b.png": str(tmp_path / "a_b_0100x0300_sd.npz"), "turned.jpg": None, "new.png": None,
    }  # fmt: skip
    assert found["a.png"].size == (300, 100)
    (tmp_path / "a.npz").write_bytes(b"x")
    assert by_name(scan_one(SubsetConfig(str(tmp_path)), npz_suffix="_sd.npz"))["a.png"].legacy_latents is None
    plain = by_name(scan_one(SubsetConfig(str(tmp_path)), npz_suffix="_sd.npz", plain_npz=True))
    assert plain["a.png"].legacy_latents == str(tmp_path / "a.npz")
    assert all(s.legacy_latents is None for s in scan_one(SubsetConfig(str(tmp_path))).samples)


# ---- the manifest -------------------------------------------------------------------------------------------------


def filled(folder: Path) -> SubsetConfig:
    for name in ("a", "b", "c"):
        make(folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text(f"caption of {name}")
    age(folder)
    return SubsetConfig(str(folder), caption_extension=".txt")


def test_restart_equals_first_start_and_opens_nothing(tmp_path: Path) -> None:
    subset = filled(tmp_path)
    first = scan_one(subset)
    remembered = read_manifest(manifest_path(str(tmp_path), None))
    assert remembered.images["a.jpg"] == ((tmp_path / "a.jpg").stat().st_size, OLD * 10**9, 32, 24, 0)
    assert remembered.texts["b.txt"] == (12, OLD * 10**9, "caption of b")
    (tmp_path / "a.jpg").write_bytes(
        bytes((tmp_path / "a.jpg").stat().st_size)
    )  # rubbish that only a look inside shows
    (tmp_path / "a.txt").write_bytes(b"\xff" * 12)
    age(tmp_path)
    assert scan_one(subset) == first


def test_manifest_notices_changes(tmp_path: Path) -> None:
    subset = filled(tmp_path)
    scan_one(subset)
    make(tmp_path / "a.jpg", (48, 16))
    (tmp_path / "b.txt").write_text("caption OF b")  # as long as before, only the time differs
    (tmp_path / "c.jpg").unlink()
    make(tmp_path / "d.jpg", (8, 8))
    found = by_name(scan_one(subset))
    assert {n: (s.size, s.caption) for n, s in found.items()} == {
        "a.jpg": ((48, 16), "caption of a"), "b.jpg": ((32, 24), "caption OF b"), "d.jpg": ((8, 8), ""),
    }  # fmt: skip
    age(tmp_path, OLD + 9)
    scan_one(subset)
    remembered = read_manifest(manifest_path(str(tmp_path), None))
    assert sorted(remembered.images) == ["a.jpg", "b.jpg", "d.jpg"]
    (tmp_path / "a.jpg").write_bytes(b"")
    assert scan_one(subset).problems == (f"{tmp_path}/a.jpg: is empty (0 bytes)",)
    assert scan_one(subset).problems == (f"{tmp_path}/a.jpg: is empty (0 bytes)",)  # never remembered as good


def test_files_of_this_moment_are_not_trusted_next_time(tmp_path: Path) -> None:
    make(tmp_path / "now.png")
    scan_one(SubsetConfig(str(tmp_path)))
    assert read_manifest(manifest_path(str(tmp_path), None)).images == {}


def test_manifest_keeps_every_number_it_can(tmp_path: Path) -> None:
    now = time.time_ns()
    images = {"a": (2**62, -(2**63), 1, 2, 3), "b": (0, now - 10**10, 65535, 1, 0)}
    unfit = {"year 1601": (5, -11_644_473_600 * 10**9, 1, 1, 0), "just now": (5, now, 1, 1, 0)}
    texts = {"a\n.txt": (3, 5, 'ü\n"\ud800')}
    assert write_manifest(tmp_path / "m.json", Manifest({**images, **unfit}, texts))
    assert read_manifest(tmp_path / "m.json") == Manifest(images, texts)


def test_cache_dir_holds_the_manifests(tmp_path: Path) -> None:
    first, second = filled(tmp_path / "one"), filled(tmp_path / "two")
    cache = tmp_path / "cache"
    scan(config(first, second), cache_dir=str(cache))
    assert len(list(cache.iterdir())) == 2
    assert not (tmp_path / "one" / ".trainyard").exists()
    remembered = read_manifest(manifest_path(str(tmp_path / "two"), str(cache)))
    assert sorted(remembered.images) == ["a.jpg", "b.jpg", "c.jpg"]


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    subset = filled(tmp_path)
    (tmp_path / ".trainyard").write_text("a file where the folder should be")
    first = scan_one(subset)
    assert len(first.samples) == 3 and first.problems == ()
    assert scan_one(subset) == first
    assert not Folder(str(tmp_path), None).manifest.images


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    subset = filled(tmp_path)
    tmp_path.chmod(0o555)
    try:
        assert len(scan_one(subset).samples) == 3
        assert not (tmp_path / ".trainyard").exists()
    finally:
        tmp_path.chmod(0o755)


ONE, TWO = (base64.b64encode(struct.pack(f"<{n}q", *range(n))).decode() for n in (1, 2))


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"\xff\xfe", {"version": 0},
               {"version": 2, "images": ["a.jpg", ONE], "texts": [""]},
               {"version": 2, "images": ["a.jpg", ONE, ONE, ONE, ONE, TWO], "texts": [""]},
               {"version": 2, "images": ["a.jpg", ONE, ONE, ONE, ONE, "x"], "texts": [""]},
               {"version": 2, "images": ["a.jpg", ONE, ONE, ONE, ONE, [1]], "texts": [""]},
               {"version": 2, "images": ["a/b", ONE, ONE, ONE, ONE, ONE], "texts": [""]},
               {"version": 2, "images": [1, ONE, ONE, ONE, ONE, ONE], "texts": [""]},
               {"version": 2, "images": [""], "texts": ["a.txt", ONE, ONE, [3]]},
               {"version": 2, "images": [""], "texts": ["a.txt", ONE, ONE, ["a", "b"]]}]
)  # fmt: skip
def test_damaged_manifest_is_made_again(tmp_path: Path, damage: bytes | dict) -> None:
    subset = filled(tmp_path)
    first = scan_one(subset)
    path = manifest_path(str(tmp_path), None)
    whole = path.read_bytes()
    path.write_bytes(damage if isinstance(damage, bytes) else json.dumps(damage).encode())
    assert read_manifest(path) == Manifest()
    assert scan_one(subset) == first
    assert path.read_bytes() == whole


def _scan_in_a_process(folder: str) -> int:
    return sum(len(scan_one(SubsetConfig(folder, caption_extension=".txt")).samples) for _ in range(20))


def test_two_processes_at_once(tmp_path: Path) -> None:
    filled(tmp_path)
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        assert pool.map(_scan_in_a_process, [str(tmp_path)] * 4) == [60] * 4
    assert len(read_manifest(manifest_path(str(tmp_path), None)).images) == 3
    assert [p.name for p in (tmp_path / ".trainyard").iterdir()] == ["files.json"]


def test_subsets_share_a_folder(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "a.cap").write_text("other")
    text, cap = (SubsetConfig(str(tmp_path), caption_extension=extension) for extension in (".txt", ".cap"))
    found = scan((*config(text, cap), *config(text)))
    assert [s.samples[0].caption for s in found.subsets] == ["caption of a", "other", "caption of a"]
    assert tuple(found.datasets[1].samples) == found.subsets[0].samples


def test_slow_storage_is_read_by_threads_in_order() -> None:
    threads = set()

    def slow(path: str) -> int:
        threads.add(threading.get_ident())
        time.sleep(0.0005)
        return int(path)

    count = (folder_module._SLOW_CHUNKS + 1) * folder_module._CHUNK + 7
    assert read_all(slow, [str(number) for number in range(count)], "reading") == list(range(count))
    assert len(threads) > 1


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        make(tmp_path / "x.png").rename(tmp_path / name)
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    age(tmp_path)
    for _ in range(2):
        assert [s.path for s in scan_one(SubsetConfig(str(tmp_path))).samples] == [str(tmp_path / name)]
    assert name in read_manifest(manifest_path(str(tmp_path), None)).images
