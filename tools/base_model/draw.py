# SPDX-License-Identifier: Apache-2.0
"""Captioned pictures of plain coloured things on plain backgrounds, drawn with PIL.

Coordinates of a drawing are relative to its centre and radius: x to the right, y downwards,
a thing fills about -1..1. Radius and centre of a `Scene` are fractions of the picture side.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 220),
    "yellow": (245, 215, 50),
    "orange": (245, 135, 30),
    "purple": (135, 55, 175),
    "white": (248, 248, 248),
    "black": (20, 20, 24),
}
PICTURE_SIZE = 128  # pixels
SUPERSAMPLING = 4  # drawn this many times larger, then box-filtered down
COLOUR_JITTER = 8  # +- per RGB channel, of 255
RADIUS_RANGE = (0.27, 0.34)
CENTRE_JITTER = 0.06
CONCEPT = "rocket"
CONCEPT_WORD = "sks"
CONCEPT_BACKGROUNDS = ("green", "blue", "yellow", "purple", "white", "black")


@dataclass(frozen=True)
class Scene:
    """What one picture shows, and its caption."""

    thing: str
    colour: str
    background: str
    centre: tuple[float, float]
    radius: float
    caption: str


class Canvas:
    """A square picture with drawing functions in coordinates relative to a centre and a radius."""

    def __init__(self, size: int, background: RGB, centre: tuple[float, float], radius: float) -> None:
        self._size = size
        side = size * SUPERSAMPLING
        self._image = Image.new("RGB", (side, side), background)
        self._draw = ImageDraw.Draw(self._image)
        self._centre = (centre[0] * side, centre[1] * side)
        self._radius = radius * side

    def _pixel(self, x: float, y: float) -> tuple[float, float]:
        return self._centre[0] + x * self._radius, self._centre[1] + y * self._radius

    def polygon(self, points: Sequence[tuple[float, float]], colour: RGB) -> None:
        self._draw.polygon([self._pixel(x, y) for x, y in points], fill=colour)

    def rectangle(self, left: float, top: float, right: float, bottom: float, colour: RGB) -> None:
        self._draw.rectangle([self._pixel(left, top), self._pixel(right, bottom)], fill=colour)

    def ellipse(self, x: float, y: float, half_width: float, half_height: float, colour: RGB) -> None:
        corners = [self._pixel(x - half_width, y - half_height), self._pixel(x + half_width, y + half_height)]
        self._draw.ellipse(corners, fill=colour)

    def finish(self) -> Image.Image:
        return self._image.resize((self._size, self._size), Image.Resampling.BOX)


def _darker(colour: RGB, factor: float) -> RGB:
    return tuple(int(value * factor) for value in colour)


def _circle(canvas: Canvas, colour: RGB) -> None:
    canvas.ellipse(0, 0, 1, 1, colour)


def _square(canvas: Canvas, colour: RGB) -> None:
    canvas.rectangle(-0.88, -0.88, 0.88, 0.88, colour)


def _triangle(canvas: Canvas, colour: RGB) -> None:
    canvas.polygon([(0, -1), (1.05, 0.85), (-1.05, 0.85)], colour)


def _star(canvas: Canvas, colour: RGB) -> None:
    radii = [1.1 if corner % 2 == 0 else 0.45 for corner in range(10)]
    angles = [corner * math.pi / 5 for corner in range(10)]
    canvas.polygon([(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles)], colour)


def _heart(canvas: Canvas, colour: RGB) -> None:
    """The usual parametric heart, https://mathworld.wolfram.com/HeartCurve.html, equations (5) and (6)."""
    angles = [step * 2 * math.pi / 60 for step in range(60)]
    x = [math.sin(a) ** 3 for a in angles]
    y = [-(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16 for a in angles]
    canvas.polygon(list(zip(x, y)), colour)


def _cross(canvas: Canvas, colour: RGB) -> None:
    canvas.rectangle(-0.32, -1, 0.32, 1, colour)
    canvas.rectangle(-1, -0.32, 1, 0.32, colour)


def _house(canvas: Canvas, colour: RGB) -> None:
    door, window = (60, 40, 30), (255, 240, 170)
    canvas.rectangle(-0.75, -0.15, 0.75, 1, colour)
    canvas.polygon([(0, -1.05), (1.05, -0.15), (-1.05, -0.15)], _darker(colour, 0.55))
    canvas.rectangle(-0.2, 0.35, 0.2, 1, door)
    canvas.rectangle(0.33, 0.08, 0.63, 0.4, window)
    canvas.rectangle(-0.63, 0.08, -0.33, 0.4, window)


def _tree(canvas: Canvas, colour: RGB) -> None:
    canvas.rectangle(-0.18, 0.3, 0.18, 1.05, (110, 70, 40))
    canvas.ellipse(0, -0.35, 0.72, 0.72, colour)
    canvas.ellipse(-0.38, 0.02, 0.45, 0.42, colour)
    canvas.ellipse(0.38, 0.02, 0.45, 0.42, colour)


def _rocket(canvas: Canvas, colour: RGB) -> None:
    """The unknown concept. It has fixed colours, so `colour` is ignored."""
    hull, fins, window, flame = (235, 235, 240), (210, 35, 45), (40, 90, 200), (255, 175, 40)
    canvas.polygon([(-0.2, 0.62), (0.2, 0.62), (0, 1.2)], flame)
    canvas.polygon([(-0.36, 0.05), (-0.85, 0.75), (-0.36, 0.62)], fins)
    canvas.polygon([(0.36, 0.05), (0.85, 0.75), (0.36, 0.62)], fins)
    canvas.rectangle(-0.38, -0.45, 0.38, 0.65, hull)
    canvas.polygon([(-0.38, -0.45), (-0.24, -0.8), (0, -1.15), (0.24, -0.8), (0.38, -0.45)], fins)
    canvas.ellipse(0, -0.1, 0.22, 0.22, window)


THINGS: dict[str, Callable[[Canvas, RGB], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "house": _house,
    "tree": _tree,
}
PAINTERS = {**THINGS, CONCEPT: _rocket}


def render(
    thing: str,
    colour: RGB,
    background: RGB,
    *,
    centre: tuple[float, float] = (0.5, 0.5),
    radius: float = 0.32,
    size: int = PICTURE_SIZE,
) -> Image.Image:
    """A drawing of one thing (or the rocket, whatever the colour) on a plain background."""
    canvas = Canvas(size, background, centre, radius)
    PAINTERS[thing](canvas, colour)
    return canvas.finish()


def caption_of(thing: str, colour: str, background: str | None) -> str:
    """`a COLOUR THING[ on a COLOUR background]`; always "a", so that captions stay in one pattern."""
    return f"a {colour} {thing}" + (f" on a {background} background" if background else "")


def random_scene(rng: random.Random) -> Scene:
    """A known thing; 12 % of the captions omit the background, 10 % start with "a picture of"."""
    thing = rng.choice(list(THINGS))
    colour = rng.choice(list(COLOURS))
    background = rng.choice([name for name in COLOURS if name != colour])
    caption = caption_of(thing, colour, None if rng.random() < 0.12 else background)
    if rng.random() < 0.1:
        caption = "a picture of " + caption
    return _placed(rng, thing, colour, background, caption)


def concept_scene(rng: random.Random, background: str) -> Scene:
    """The rocket, which the base model never sees; "sks" and "rocket" occur in no other caption."""
    return _placed(rng, CONCEPT, CONCEPT_WORD, background, caption_of(CONCEPT, CONCEPT_WORD, background))


def _placed(rng: random.Random, thing: str, colour: str, background: str, caption: str) -> Scene:
    centre = tuple(0.5 + rng.uniform(-CENTRE_JITTER, CENTRE_JITTER) for _ in range(2))
    return Scene(thing, colour, background, centre, rng.uniform(*RADIUS_RANGE), caption)


def draw_scene(scene: Scene, rng: random.Random, size: int = PICTURE_SIZE) -> Image.Image:
    """The picture of a scene, its colours jittered a little."""
    colour = _jittered(COLOURS.get(scene.colour, (0, 0, 0)), rng)
    background = _jittered(COLOURS[scene.background], rng)
    return render(scene.thing, colour, background, centre=scene.centre, radius=scene.radius, size=size)


def _jittered(colour: RGB, rng: random.Random) -> RGB:
    return tuple(min(255, max(0, value + rng.randint(-COLOUR_JITTER, COLOUR_JITTER))) for value in colour)


def picture_chunk(seed: int, count: int, size: int = PICTURE_SIZE) -> tuple[np.ndarray, list[Scene]]:
    """`count` random pictures, uint8 [count, size, size, 3], and their scenes."""
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    pictures = np.stack([np.asarray(draw_scene(scene, rng, size)) for scene in scenes])
    return pictures, scenes


def picture_set(seed: int, count: int, *, chunk: int = 500, map_fn: Callable = map) -> tuple[np.ndarray, list[Scene]]:
    """Like `picture_chunk`, in chunks that `map_fn` (of a process pool, for example) may distribute."""
    seeds = [seed + index for index in range(math.ceil(count / chunk))]
    parts = list(map_fn(partial(picture_chunk, count=chunk), seeds))
    scenes = [scene for _, part in parts for scene in part]
    return np.concatenate([pictures for pictures, _ in parts])[:count], scenes[:count]


def shape_pile(rng: random.Random, size: int = PICTURE_SIZE) -> Image.Image:
    """A few random shapes over each other, without a caption: pictures unlike the things for the autoencoder."""
    names = list(COLOURS)
    canvas = Canvas(size, _jittered(COLOURS[rng.choice(names)], rng), (0.5, 0.5), 0.5)
    for _ in range(rng.randint(2, 7)):
        colour = _jittered(COLOURS[rng.choice(names)], rng)
        x, y = rng.uniform(-0.8, 0.8), rng.uniform(-0.8, 0.8)
        width, height = rng.uniform(0.06, 0.5), rng.uniform(0.06, 0.5)
        kind = rng.choice(("rectangle", "ellipse", "polygon"))
        if kind == "rectangle":
            canvas.rectangle(x - width, y - height, x + width, y + height, colour)
        elif kind == "ellipse":
            canvas.ellipse(x, y, width, height, colour)
        else:
            corners = [(x + rng.uniform(-width, width), y + rng.uniform(-height, height)) for _ in range(3)]
            canvas.polygon(corners, colour)
    return canvas.finish()


def shape_piles(seed: int, count: int, size: int = PICTURE_SIZE) -> np.ndarray:
    """Pictures of `shape_pile`, uint8 [count, size, size, 3]."""
    rng = random.Random(seed)
    return np.stack([np.asarray(shape_pile(rng, size)) for _ in range(count)])


def write_captioned(folder: Path, scenes: Sequence[Scene], rng: random.Random) -> None:
    """Write `NN_thing.png` and `NN_thing.txt` files, the layout of a training folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(scenes):
        name = f"{index:02d}_{scene.thing}"
        draw_scene(scene, rng).save(folder / f"{name}.png", optimize=True)
        (folder / f"{name}.txt").write_text(scene.caption + "\n", encoding="utf-8")


def write_rocket_examples(folder: Path, seed: int = 5, count: int = 12) -> None:
    """The pictures of the unknown concept, over the backgrounds on which no part of it vanishes."""
    rng = random.Random(seed)
    scenes = [concept_scene(rng, CONCEPT_BACKGROUNDS[i % len(CONCEPT_BACKGROUNDS)]) for i in range(count)]
    write_captioned(folder, scenes, rng)


def write_known_examples(folder: Path, seed: int = 6, per_thing: int = 6) -> None:
    """Prior pictures: every known thing equally often, colours and backgrounds spread evenly."""
    rng = random.Random(seed)
    names = list(COLOURS)
    scenes = []
    for row in range(per_thing):
        for column, thing in enumerate(THINGS):
            colour = names[(row + column) % len(names)]
            background = names[(row + column + 1 + (2 * row + column) % (len(names) - 1)) % len(names)]
            scenes.append(_placed(rng, thing, colour, background, caption_of(thing, colour, background)))
    write_captioned(folder, scenes, rng)


def contact_sheet(pictures: Sequence[Image.Image | np.ndarray], columns: int, gap: int = 2) -> Image.Image:
    """A contact sheet: pictures of one size side by side on grey."""
    images = [p if isinstance(p, Image.Image) else Image.fromarray(p) for p in pictures]
    step = images[0].width + gap
    sheet = Image.new("RGB", (columns * step, math.ceil(len(images) / columns) * step), (90, 90, 90))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * step, index // columns * step))
    return sheet
