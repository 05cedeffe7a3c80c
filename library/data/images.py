# SPDX-License-Identifier: Apache-2.0
"""Pictures: a file becomes RGB pixels of its bucket's size. PIL and numpy only; draws come from an explicit generator.

What happens to unusual files, on purpose: EXIF orientation is applied; palette, grey and bilevel become RGB; 16 bit per
channel is scaled (not cut) to 8; CMYK goes through its colour profile where it has one; transparent pixels are
composited on white, except where the alpha channel is wanted as a mask: there the colours stay as they are under it. Of
an animation the first frame is used.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import random
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, ImageOps

from library.data.buckets import Bucket, Size, center_crop, crop_ltrb
from library.data.records import ImageRules, Sample
from library.data.shards.reading import read_member
from library.data.shards.shard import Member
from library.errors import UserError

# What PIL and its readers raise for damaged files
DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    RuntimeError,  # the plug-in for jxl
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# Modules that teach PIL a format which it may not read by itself, and how to install one
READERS: dict[str, tuple[tuple[str, ...], str]] = {
    ".avif": (("pillow_avif",), "pip install -U pillow (11.3 or newer) or pip install pillow-avif-plugin"),
    ".jxl": (("pillow_jxl", "jxlpy.JXLImagePlugin"), "pip install pillow-jxl-plugin"),
}

FILTERS: dict[str, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
}

ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")

COLOR_AUG_RATE = 0.33  # of pictures; half of them get a hue shift, half a gamma
HUE_SHIFT_DEGREES = 16.0  # at most, to either side
GAMMA_RANGE = (0.95, 1.05)


# ---- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """Pixels of a file. rgb: H W 3 uint8; alpha: H W uint8 (255 = opaque), None when not asked for or not there."""

    rgb: np.ndarray
    alpha: np.ndarray | None = None


def load_image(path: str, *, alpha: bool, member: Member | None = None) -> Picture:
    """The picture in `path`. With `alpha` the alpha channel comes too and the colours under it are left as they are.

    member: where it is inside a shard. Raises UserError, naming the file, when it is missing, damaged or of a format
    that nothing here reads.
    """
    register_reader(path)
    try:
        with Image.open(path if member is None else io.BytesIO(read_member(path, member))) as image:
            image.load()
            return _to_picture(_upright(image), alpha)
    except DAMAGED as error:
        raise UserError(f"{path}: cannot be read as a picture ({_reason(error)})") from error


def register_reader(path: str) -> None:
    """Load the plug-in with which PIL reads the format of `path`. Raises UserError saying how to install it."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in READERS or suffix in Image.registered_extensions():
        return
    modules, install = READERS[suffix]
    for module in modules:
        try:
            importlib.import_module(module)
            return
        except ImportError:
            continue
    raise UserError(f"{path}: no reader for {suffix} files is installed: {install}")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not in a picture format, or empty"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    """The picture with its EXIF orientation applied. A damaged EXIF block is ignored."""
    try:
        return ImageOps.exif_transpose(image)
    except DAMAGED:
        return image


def _to_picture(image: Image.Image, alpha: bool) -> Picture:
    """A picture of any PIL mode as 8-bit RGB, with its alpha channel where that is wanted."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.mode == "CMYK":
        image = _cmyk_to_rgb(image)
    if image.mode not in ALPHA_MODES and "transparency" not in image.info:
        return Picture(np.asarray(image.convert("RGB")))
    rgba = image.convert("RGBA")
    if alpha:
        pixels = np.asarray(rgba)
        return Picture(np.ascontiguousarray(pixels[..., :3]), np.ascontiguousarray(pixels[..., 3]))
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Picture(np.asarray(Image.alpha_composite(white, rgba).convert("RGB")))


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bit (I;16, I;16B and, from older PIL versions, I) scaled to 8 bit: 65535 becomes 255."""
    values = np.asarray(image).astype(np.float64)
    return Image.fromarray(np.clip(np.rint(values / 257.0), 0, 255).astype(np.uint8))


def _cmyk_to_rgb(image: Image.Image) -> Image.Image:
    """CMYK converted to sRGB by its embedded colour profile, or by PIL's formula where there is no readable one."""
    profile = image.info.get("icc_profile")
    converted = None
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image.convert("RGB") if converted is None else converted


# ---- resize, crop, flip, colour -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Face:
    """Centre and size of the face in a picture, in pixels of the file."""

    cx: int
    cy: int
    width: int
    height: int


@dataclass(frozen=True)
class Window:
    """Where the training picture is cut out: the file resized to `resized`, cropped from (left, top).

    `told` is the (top, left) that SDXL is told, and `told_flipped` the same for the mirrored picture.
    """

    resized: Size
    left: int
    top: int
    told: tuple[float, float]
    told_flipped: tuple[float, float]

    @staticmethod
    def at(resized: Size, reso: Size, left: int, top: int) -> Window:
        """A window whose true offset SDXL is told: for random crops."""
        return Window(resized, left, top, (float(top), float(left)), (float(top), float(resized[0] - reso[0] - left)))


@dataclass(frozen=True)
class Prepared:
    """A picture ready for training."""

    rgb: np.ndarray  # H W 3 uint8
    mask: np.ndarray | None  # H W uint8, 255 where the loss counts
    crop_top_left: tuple[float, float]
    control: np.ndarray | None = None  # H W 3 uint8


def face_of(path: str) -> Face | None:
    """The face in names such as `<stem>_<cx>_<cy>_<w>_<h>.png`, as face detection scripts write them; else None."""
    fields = os.path.splitext(os.path.basename(path))[0].split("_")
    if len(fields) < 5 or not all(field.isdecimal() for field in fields[-4:]):
        return None
    face = Face(*(int(field) for field in fields[-4:]))
    return face if face.width > 0 and face.height > 0 else None


def draw_flip(rules: ImageRules, rng: random.Random) -> bool:
    """Whether the sample is mirrored: the first draw of its augmentation, made also where latents are cached."""
    return rules.flip_aug and rng.random() < 0.5


def uncacheable_latents(rules: ImageRules) -> str | None:
    """Why latents cannot be cached under these rules, in one line; None when they can."""
    used = {
        "color_aug": rules.color_aug,
        "random_crop": rules.random_crop,
        "face_crop_aug_range": rules.face_crop_aug_range is not None,
    }
    names = [name for name, on in used.items() if on]
    if not names:
        return None
    return f"{' and '.join(names)} changes the pixels with every step: train without cached latents, or switch it off"


def moves_crop(rules: ImageRules) -> bool:
    """Whether the place of the crop is drawn anew at each use."""
    return rules.random_crop or rules.face_crop_aug_range is not None


def fixed_conditioning(bucket: Bucket, size: Size, *, flipped: bool) -> tuple[float, float]:
    """The (top, left) micro-conditioning of SDXL for a centred crop of a file of `size`."""
    left, top, right, _ = crop_ltrb(bucket.reso, size)
    return (top, bucket.reso[0] - right if flipped else left)


def resize_and_crop(
    picture: np.ndarray,
    bucket: Bucket,
    rules: ImageRules,
    rng: random.Random,
    *,
    mask: np.ndarray | None = None,
    control: np.ndarray | None = None,
    face: Face | None = None,
    flipped: bool = False,
) -> Prepared:
    """Resize, crop (centre, random, around the face), flip, colour. picture: H W 3 uint8; mask: h w uint8, any size.

    control: h w 3 uint8, any size; its colours stay. Draws from `rng`: crop (x, then y), then colour.
    """
    size = (picture.shape[1], picture.shape[0])
    window = choose_window(size, bucket, rules, rng, face)
    pixels = _cut(resize(picture, window.resized, rules.resize_interpolation), bucket.reso, window)
    if mask is not None:
        mask = _cut(_resize_mask(mask, window.resized), bucket.reso, window)
    if control is not None:
        control = cut_control(control, bucket, rules, window, flipped=flipped)
    if flipped:
        pixels = pixels[:, ::-1]
        mask = None if mask is None else mask[:, ::-1]
    if rules.color_aug:
        pixels = color_augmented(pixels, rng)
    return Prepared(
        rgb=np.ascontiguousarray(pixels),
        mask=None if mask is None else np.ascontiguousarray(mask),
        crop_top_left=window.told_flipped if flipped else window.told,
        control=control,
    )


def cut_control(control: np.ndarray, bucket: Bucket, rules: ImageRules, window: Window, *, flipped: bool) -> np.ndarray:
    """The control image (h w 3 uint8) stretched over its picture, and what lies in the picture's window of it."""
    pixels = _cut(resize(control, window.resized, rules.resize_interpolation), bucket.reso, window)
    return np.ascontiguousarray(pixels[:, ::-1] if flipped else pixels)


def resize(picture: np.ndarray, size: Size, interpolation: str | None = None) -> np.ndarray:
    """H W (3) uint8 resized to (width, height). By default: area when both sides shrink or stay, else Lanczos."""
    height, width = picture.shape[:2]
    if (width, height) == size:
        return picture
    if interpolation is None:
        interpolation = "area" if size[0] <= width and size[1] <= height else "lanczos"
    return np.asarray(Image.fromarray(picture).resize(size, FILTERS[interpolation]))


def choose_window(size: Size, bucket: Bucket, rules: ImageRules, rng: random.Random, face: Face | None) -> Window:
    """Where to cut a file of `size`. The file covers the bucket, so the window is always inside of it."""
    if rules.face_crop_aug_range is not None and face is not None:
        return _face_window(size, bucket.reso, rules, rng, face)
    if not rules.random_crop:
        left, top = center_crop(bucket)
        told, told_flipped = (fixed_conditioning(bucket, size, flipped=flipped) for flipped in (False, True))
        return Window(bucket.resized, left, top, told, told_flipped)
    rooms = (full - part for full, part in zip(bucket.resized, bucket.reso))
    left, top = (rng.randint(0, room) if room > 0 else 0 for room in rooms)
    return Window.at(bucket.resized, bucket.reso, left, top)


def _face_window(size: Size, reso: Size, rules: ImageRules, rng: random.Random, face: Face) -> Window:
    """A window around the face, `face_crop_aug_range` times as large on its short side, moved a little.

    The file is enlarged only as far as it must be to cover `reso`.
    """
    assert rules.face_crop_aug_range is not None
    near, far = rules.face_crop_aug_range
    face_size, short = max(face.width, face.height), min(reso)
    cover = max(reso[0] / size[0], reso[1] / size[1])
    low = max(cover, min(1.0, short / (face_size * far)))
    high = max(low, min(1.0, short / (face_size * near)))
    scale = rng.uniform(low, high) if low < high else low
    resized = (max(reso[0], int(size[0] * scale + 0.5)), max(reso[1], int(size[1] * scale + 0.5)))

    def start(full: int, part: int, centre: float) -> int:
        middle = int(centre * scale + 0.5)
        offset = middle - part // 2
        if rules.random_crop:  # the sum of two draws: most often near the face, sometimes far away
            reach = max(full - middle, middle)
            offset += rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif near != far and face_size >= 40 and face_size > short // 10:
            offset += rng.randint(-(face_size // 20), face_size // 20)
        return max(0, min(offset, full - part))

    left = start(resized[0], reso[0], face.cx)
    top = start(resized[1], reso[1], face.cy)
    return Window.at(resized, reso, left, top)


def _cut(pixels: np.ndarray, reso: Size, window: Window) -> np.ndarray:
    return pixels[window.top : window.top + reso[1], window.left : window.left + reso[0]]


def _resize_mask(mask: np.ndarray, size: Size) -> np.ndarray:
    """The mask resized by area or linearly: Lanczos would overshoot at its edges."""
    shrinks = size[0] <= mask.shape[1] and size[1] <= mask.shape[0]
    return resize(mask, size, "area" if shrinks else "linear")


def color_augmented(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """The pixels (H W 3 uint8), one picture in three with a small hue shift or a small gamma."""
    if rng.random() > COLOR_AUG_RATE:
        return pixels
    if rng.random() > 0.5:
        return shift_hue(pixels, rng.uniform(-HUE_SHIFT_DEGREES, HUE_SHIFT_DEGREES))
    curve = (np.arange(256) / 255.0) ** rng.uniform(*GAMMA_RANGE) * 255.0
    return np.rint(curve).astype(np.uint8)[pixels]


def shift_hue(pixels: np.ndarray, degrees: float) -> np.ndarray:
    """The hue (HSV) of H W 3 uint8 pixels turned by `degrees`; value and saturation stay."""
    rgb = pixels.astype(np.float32)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    value = rgb.max(-1)
    chroma = value - rgb.min(-1)
    safe = np.where(chroma > 0, chroma, 1)
    sector = np.select(  # hue in sixths of a turn
        [value == red, value == green], [(green - blue) / safe, 2 + (blue - red) / safe], 4 + (red - green) / safe
    )
    sector = sector + degrees / 60.0
    out = np.empty_like(rgb)
    for channel, shift in enumerate((5, 3, 1)):  # HSV to RGB: f(n) = V - C max(0, min(k, 4 - k, 1)), k = n + H/60 mod 6
        k = (shift + sector) % 6
        out[..., channel] = value - chroma * np.clip(np.minimum(k, 4 - k), 0, 1)
    return np.rint(out).astype(np.uint8)


# ---- one sample ---------------------------------------------------------------------------------------------------


def wants_mask(sample: Sample, *, masked_loss: bool) -> bool:
    """True when a mask is read for this sample: its mask picture (masked_loss) or its alpha channel (alpha_mask)."""
    return sample.subset.images.alpha_mask or (masked_loss and sample.mask_path is not None)


def prepare(
    sample: Sample,
    bucket: Bucket,
    rng: random.Random,
    *,
    flipped: bool,
    masked_loss: bool,
    rules: ImageRules | None = None,
    with_control: bool = False,
) -> Prepared:
    """A sample's picture (and mask) read from its file and prepared by its subset's rules, or the given ones.

    The mask picture (its first channel) outranks the alpha channel. with_control: the control image is read too.
    Raises UserError naming the file.
    """
    rules = rules or sample.subset.images
    member_of = sample.members.get
    picture = load_image(sample.path, alpha=rules.alpha_mask, member=member_of(sample.path))
    mask = picture.alpha
    if masked_loss and sample.mask_path is not None:
        mask = load_image(sample.mask_path, alpha=True, member=member_of(sample.mask_path)).rgb[..., 0]
    face = face_of(sample.path) if rules.face_crop_aug_range is not None else None
    control = None
    if with_control and sample.control_path is not None:
        control = load_control(sample.control_path, member_of(sample.control_path))
    return resize_and_crop(picture.rgb, bucket, rules, rng, mask=mask, control=control, face=face, flipped=flipped)


def load_control(path: str, member: Member | None = None) -> np.ndarray:
    """A control image, h w 3 uint8. Colours under transparency stay as they are. Raises UserError naming the file."""
    return load_image(path, alpha=True, member=member).rgb


def prepare_control(sample: Sample, bucket: Bucket, *, flipped: bool) -> np.ndarray | None:
    """The control image (H W 3 uint8) of a sample whose latents are cached, so that nothing is drawn."""
    if sample.control_path is None:
        return None
    rules = sample.subset.images
    window = choose_window(sample.size, bucket, rules, random.Random(0), None)
    control = load_control(sample.control_path, sample.members.get(sample.control_path))
    return cut_control(control, bucket, rules, window, flipped=flipped)
