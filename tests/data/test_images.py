# SPDX-License-Identifier: Apache-2.0
"""Pictures: every kind of file, resize and crop against plain numpy, masks, flips, faces, colour."""

from __future__ import annotations

import colorsys
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from library.data import images
from library.data.buckets import Bucket
from library.data.images import Face, load_image, resize_and_crop
from library.data.records import ImageRules, Sample, SubsetConfig
from library.errors import UserError

PLAIN = ImageRules()


def pattern(width: int, height: int) -> np.ndarray:
    """H W 3 uint8: red grows to the right, green downwards, blue is their checker."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + y) % 2 * 255], -1).astype(
        np.uint8
    )


def smooth(width: int, height: int) -> np.ndarray:
    picture = pattern(width, height)
    picture[..., 2] = 128
    return picture


# ---- reading


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
def test_lossless_formats(tmp_path: Path, suffix: str) -> None:
    pixels = pattern(20, 12)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", lossless=True)  # others ignore the option
    loaded = load_image(str(tmp_path / f"a.{suffix}"), alpha=True)
    assert loaded.alpha is None and np.array_equal(loaded.rgb, pixels)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "avif"])
def test_lossy_formats(tmp_path: Path, suffix: str) -> None:
    if suffix == "avif" and ".avif" not in Image.registered_extensions():
        pytest.skip("this PIL reads no avif")
    pixels = smooth(64, 48)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", quality=95)
    loaded = load_image(str(tmp_path / f"a.{suffix}"), alpha=False)
    assert loaded.rgb.shape == (48, 64, 3) and np.abs(loaded.rgb.astype(int) - pixels).mean() < 3


def test_jxl_is_read_or_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "a.jxl").write_bytes(b"\xff\x0a not a picture")
    with pytest.raises(UserError) as caught:
        load_image(str(tmp_path / "a.jxl"), alpha=False)
    known = ".jxl" in Image.registered_extensions()
    assert ("cannot be read" if known else "pip install pillow-jxl-plugin") in caught.value.problems[0]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(pattern(20, 12)).save(tmp_path / "a.png", exif=exif)
    loaded = load_image(str(tmp_path / "a.png"), alpha=False)
    assert np.array_equal(loaded.rgb, np.rot90(pattern(20, 12), -1))


def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    Image.fromarray(smooth(20, 12)).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00no TIFF header")
    assert load_image(str(tmp_path / "a.jpg"), alpha=False).rgb.shape == (12, 20, 3)


def test_grey_palette_and_bilevel(tmp_path: Path) -> None:
    grey = np.arange(240, dtype=np.uint8).reshape(12, 20)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(load_image(str(tmp_path / "grey.png"), alpha=False).rgb, np.stack([grey] * 3, -1))

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([1, 0])
    palette.save(tmp_path / "palette.png")
    loaded = load_image(str(tmp_path / "palette.png"), alpha=True)
    assert loaded.rgb.tolist() == [[[200, 100, 50], [10, 20, 30]]] and loaded.alpha is None

    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bilevel.png")
    assert load_image(str(tmp_path / "bilevel.png"), alpha=False).rgb.tolist() == [[[255] * 3, [0] * 3]]


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768, 65535, 300]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert load_image(str(tmp_path / "a.png"), alpha=False).rgb[0, :, 0].tolist() == [0, 1, 128, 255, 1]


def test_16_bit_rgb(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    row = b"\x00" + struct.pack(">6H", 65535, 0, 32896, 257, 514, 65535)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    )
    assert load_image(str(tmp_path / "a.png"), alpha=False).rgb.tolist() == [[[255, 0, 128], [1, 2, 255]]]


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(load_image(str(tmp_path / "a.jpg"), alpha=False).rgb.astype(int) - [255, 0, 0]).max() <= 2


def test_cmyk_with_a_broken_profile_is_converted_plainly(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # not for CMYK
    for name, profile in (("a.jpg", b"no profile"), ("b.jpg", srgb)):
        Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / name, quality=100, icc_profile=profile)
        assert np.abs(load_image(str(tmp_path / name), alpha=False).rgb.astype(int) - [255, 0, 0]).max() <= 2


RGBA = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 128]]], dtype=np.uint8)


def test_transparent_pixels_are_composited_on_white(tmp_path: Path) -> None:
    Image.fromarray(RGBA).save(tmp_path / "a.png")
    half = [round((c * 128 + 255 * 127) / 255) for c in (200, 100, 0)]
    loaded = load_image(str(tmp_path / "a.png"), alpha=False)
    assert loaded.alpha is None
    assert np.abs(loaded.rgb[0].astype(int) - [[200, 100, 0], [255, 255, 255], half]).max() <= 1


def test_alpha_as_mask_keeps_the_colours_under_it(tmp_path: Path) -> None:
    Image.fromarray(RGBA).save(tmp_path / "a.png")
    loaded = load_image(str(tmp_path / "a.png"), alpha=True)
    assert loaded.alpha is not None and loaded.alpha.tolist() == [[255, 0, 128]]
    assert loaded.rgb.tolist() == [[[200, 100, 0]] * 3]


def test_grey_alpha_and_transparent_palette(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[90, 255], [90, 0]]], dtype=np.uint8)).save(tmp_path / "la.png")
    assert load_image(str(tmp_path / "la.png"), alpha=False).rgb.tolist() == [[[90] * 3, [255] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([1, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    assert load_image(str(tmp_path / "p.png"), alpha=False).rgb.tolist() == [[[200, 100, 50], [255] * 3]]


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 250)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert load_image(str(tmp_path / "a.webp"), alpha=False).rgb.max() == 10


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_truncated_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bad.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(UserError) as caught:
        load_image(str(path), alpha=False)
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(
        f"{path}: cannot be read as a picture ("
    )


@pytest.mark.parametrize("content", [b"", b"this is text"])
def test_empty_and_fake_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not in a picture format, or empty"):
        load_image(str(path), alpha=False)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.png: .*there is no such file"):
        load_image(str(tmp_path / "a.png"), alpha=False)


# ---- resize


def test_shrinking_averages_areas() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    means = picture.reshape(8, 3, 12, 3, 3).mean((1, 3))
    assert np.abs(images.resize(picture, (12, 8)) - means).max() <= 1.0
    assert np.array_equal(images.resize(picture, (12, 8)), images.resize(picture, (12, 8), "area"))


def test_enlarging_one_side_uses_lanczos() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(picture).resize((40, 20), Image.Resampling.LANCZOS))
    assert np.array_equal(images.resize(picture, (40, 20)), expected)
    assert not np.array_equal(images.resize(picture, (40, 20), "area"), expected)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("lanczos", Image.Resampling.LANCZOS),
        ("nearest", Image.Resampling.NEAREST),
        ("bilinear", Image.Resampling.BILINEAR),
        ("linear", Image.Resampling.BILINEAR),
        ("bicubic", Image.Resampling.BICUBIC),
        ("cubic", Image.Resampling.BICUBIC),
        ("area", Image.Resampling.BOX),
    ],
)
def test_interpolation_by_name(name: str, method: Image.Resampling) -> None:
    picture = pattern(36, 24)
    expected = np.asarray(Image.fromarray(picture).resize((18, 12), method))
    rules = ImageRules(resize_interpolation=name)
    prepared = resize_and_crop(picture, Bucket((18, 12), (18, 12)), rules, random.Random(0))
    assert np.array_equal(prepared.rgb, expected)


# ---- crop and flip


def test_center_crop_and_flip() -> None:
    picture, bucket = pattern(30, 20), Bucket((16, 20), (30, 20))
    prepared = resize_and_crop(picture, bucket, PLAIN, random.Random(0))
    assert np.array_equal(prepared.rgb, picture[:, 7:23])
    # a 30x20 file fitted into 16x20 is 16 wide and 10.67 high: (20 - 10.67) // 2 = 4 from the top
    assert prepared.crop_top_left == (4.0, 0.0)
    mirrored = resize_and_crop(picture, bucket, PLAIN, random.Random(0), flipped=True)
    assert np.array_equal(mirrored.rgb, prepared.rgb[:, ::-1])


def test_flipped_conditioning_is_measured_from_the_other_side() -> None:
    picture, bucket = pattern(21, 30), Bucket((20, 16), (21, 30))
    # fitted into 20x16 the file is 11.2 wide: left = 8.8 // 2 = 4, right = 15.2
    assert resize_and_crop(picture, bucket, PLAIN, random.Random(0)).crop_top_left == pytest.approx((0.0, 4.0))
    flipped = resize_and_crop(picture, bucket, PLAIN, random.Random(0), flipped=True)
    assert flipped.crop_top_left == pytest.approx((0.0, 4.8))


def test_random_crop_draws_x_then_y_and_tells_where() -> None:
    picture, bucket = pattern(30, 28), Bucket((16, 20), (30, 28))
    rules, offsets = ImageRules(random_crop=True), set()
    for seed in range(300):
        expected = random.Random(seed)
        x, y = expected.randint(0, 14), expected.randint(0, 8)
        prepared = resize_and_crop(picture, bucket, rules, random.Random(seed))
        assert np.array_equal(prepared.rgb, picture[y : y + 20, x : x + 16])
        assert prepared.crop_top_left == (y, x)
        flipped = resize_and_crop(picture, bucket, rules, random.Random(seed), flipped=True)
        assert flipped.crop_top_left == (y, 14 - x)
        offsets.add((x, y))
    assert len({x for x, _ in offsets}) == 15 and len({y for _, y in offsets}) == 9


def test_mask_follows_the_picture() -> None:
    picture, bucket = smooth(60, 40), Bucket((16, 20), (30, 20))
    mask = np.zeros((80, 120), np.uint8)  # twice the file's size
    mask[:, 60:] = 255
    for rules in (PLAIN, ImageRules(random_crop=True)):
        for flipped in (False, True):
            prepared = resize_and_crop(picture, bucket, rules, random.Random(3), mask=mask, flipped=flipped)
            assert prepared.mask is not None and prepared.mask.shape == (20, 16)
            assert np.array_equal(prepared.mask > 128, prepared.rgb[..., 0] > 127)


def test_flip_is_drawn_first_and_only_when_asked() -> None:
    assert [images.draw_flip(ImageRules(flip_aug=True), random.Random(s)) for s in range(9)] == [
        random.Random(s).random() < 0.5 for s in range(9)
    ]
    rng = random.Random(1)
    state = rng.getstate()
    assert not images.draw_flip(PLAIN, rng) and rng.getstate() == state


# ---- faces


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("a_10_20_30_40.png", Face(10, 20, 30, 40)),
        ("dir_1_2_3_4/my_photo_100_200_50_60.jpg", Face(100, 200, 50, 60)),
        ("a_10_20_30.png", None),
        ("a_10_20_30_x.png", None),
        ("a_10_20_0_40.png", None),
        ("10_20_30_40.png", None),
    ],
)
def test_face_of(name: str, face: Face | None) -> None:
    assert images.face_of(name) == face


def test_face_crop_is_centred_on_the_face() -> None:
    """Range (2, 2): the short side of the crop is twice the face, so a face of 100 in 64 pixels is scaled by 0.32."""
    rules, face = ImageRules(face_crop_aug_range=(2.0, 2.0)), Face(300, 200, 100, 80)
    window = images.choose_window((600, 400), Bucket((64, 64), (96, 64)), rules, random.Random(0), face)
    assert window.resized == (192, 128)
    assert (window.left, window.top) == (96 - 32, 64 - 32)
    assert window.told == (32.0, 64.0)


@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize("size", [(600, 400), (90, 70), (50, 40)])
def test_face_crop_stays_inside_and_covers(size: tuple[int, int], random_crop: bool) -> None:
    rules = ImageRules(face_crop_aug_range=(1.5, 4.0), random_crop=random_crop)
    face, picture, seen = Face(size[0] - 5, 5, 60, 50), smooth(*size), set()
    for seed in range(40):
        window = images.choose_window(size, Bucket((64, 48), size), rules, random.Random(seed), face)
        assert 0 <= window.left <= window.resized[0] - 64 and 0 <= window.top <= window.resized[1] - 48
        seen.add((window.resized, window.left, window.top))
    prepared = resize_and_crop(picture, Bucket((64, 48), size), rules, random.Random(0), face=face)
    assert prepared.rgb.shape == (48, 64, 3)
    assert size != (600, 400) or len(seen) > 5


# ---- colour


def test_hue_shift_equals_colorsys() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    picture[0, 0] = 77  # grey has no hue
    shifted = images.shift_hue(picture, 15.0)
    for pixel, result in zip(picture.reshape(-1, 3), shifted.reshape(-1, 3)):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255.0))
        expected = np.array(colorsys.hsv_to_rgb(hue + 15 / 360, saturation, value)) * 255
        assert np.abs(result - expected).max() <= 0.51


def test_colour_augmentation_is_small_and_as_frequent_as_today() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    hue = gamma = 0
    for seed in range(2000):
        result = images.color_augmented(picture, random.Random(seed)).astype(int)
        if np.array_equal(result, picture):
            continue
        if np.array_equal(result.max(-1), picture.max(-1)):  # a turn of the hue keeps the value
            hue += 1
        else:
            gamma += 1
            # |255 x^g - 255 x| for g in 0.95 .. 1.05 is at most 4.8
            assert np.abs(result - picture).max() <= 5
    assert 0.13 < hue / 2000 < 0.20 and 0.13 < gamma / 2000 < 0.20


def test_colour_rule_is_applied_after_the_crop() -> None:
    picture, bucket = smooth(30, 20), Bucket((16, 20), (30, 20))
    plain = resize_and_crop(picture, bucket, PLAIN, random.Random(0)).rgb
    for seed in range(10):
        augmented = resize_and_crop(picture, bucket, ImageRules(color_aug=True), random.Random(seed)).rgb
        assert np.array_equal(augmented, images.color_augmented(plain, random.Random(seed)))


def test_uncacheable_latents() -> None:
    assert images.uncacheable_latents(ImageRules(flip_aug=True, alpha_mask=True)) is None
    for rules in (ImageRules(color_aug=True), ImageRules(random_crop=True), ImageRules(face_crop_aug_range=(1.0, 2.0))):
        reason = images.uncacheable_latents(rules)
        assert reason is not None and "train without cached latents" in reason


# ---- one sample


def make_sample(path: Path, rules: ImageRules, mask: Path | None = None) -> Sample:
    with Image.open(path) as image:
        size = image.size
    subset = SubsetConfig(image_dir=str(path.parent), images=rules)
    return Sample(str(path), size, "", subset, 0, 0, mask_path=str(mask) if mask else None)


def test_mask_picture_outranks_alpha_and_only_counts_with_masked_loss(tmp_path: Path) -> None:
    rgba = np.dstack([smooth(16, 16), np.full((16, 16), 100, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    Image.fromarray(np.full((16, 16, 3), (40, 200, 200), np.uint8)).save(tmp_path / "mask.png")
    bucket = Bucket((16, 16), (16, 16))

    def mask(rules: ImageRules, masked_loss: bool) -> int | None:
        sample = make_sample(tmp_path / "a.png", rules, tmp_path / "mask.png")
        found = images.prepare(sample, bucket, random.Random(0), flipped=False, masked_loss=masked_loss).mask
        assert (found is not None) == images.wants_mask(sample, masked_loss=masked_loss)
        return None if found is None else int(np.unique(found).item())

    assert mask(ImageRules(), masked_loss=False) is None
    assert mask(ImageRules(), masked_loss=True) == 40  # first channel
    assert mask(ImageRules(alpha_mask=True), masked_loss=False) == 100
    assert mask(ImageRules(alpha_mask=True), masked_loss=True) == 40


def test_unreadable_mask_is_named(tmp_path: Path) -> None:
    Image.fromarray(smooth(16, 16)).save(tmp_path / "a.png")
    (tmp_path / "mask.png").write_bytes(b"no")
    sample = make_sample(tmp_path / "a.png", PLAIN, tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask\.png: cannot be read"):
        images.prepare(sample, Bucket((16, 16), (16, 16)), random.Random(0), flipped=False, masked_loss=True)
