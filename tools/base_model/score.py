# SPDX-License-Identifier: Apache-2.0
"""Which known thing, or the rocket, a generated picture shows. NumPy and PIL only, no learned model.

The foreground is cut out by its bounding box, resized to 24 x 24 and compared with drawings of all things
in all colours on the same background, cut out alike: the answer does not depend on place and size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from .draw import COLOURS, CONCEPT, THINGS, caption_of, render

SCORING_SIZE = 64  # pixels, to which pictures are reduced first
PATCH_SIZE = 24
FOREGROUND_DIFFERENCE = 45  # of 255, in any channel, from the background
MINIMAL_FOREGROUND = 12  # pixels of 64 x 64
NOTHING = "nothing"


@dataclass(frozen=True)
class Score:
    """The nearest drawing of one picture; similarities are 1 for equal patches, about 0 for unrelated ones."""

    thing: str  # of draw.THINGS, "rocket" or "nothing"
    colour: str  # of draw.COLOURS; "" for the rocket and nothing
    rocket_similarity: float
    known_similarity: float  # of the best known thing
    background_error: float  # largest channel difference from the wanted background, of 255


@dataclass(frozen=True)
class ScoredPrompt:
    """A caption for sampling and what the picture must show."""

    caption: str
    thing: str
    colour: str
    background: str


@dataclass(frozen=True)
class KnownReport:
    count: int
    thing_right: float  # share of the pictures, likewise below
    colour_right: float
    background_right: float
    taken_for_rocket: float
    thing_right_by_thing: dict[str, float]


@dataclass(frozen=True)
class ConceptReport:
    count: int
    rocket_nearest: float  # share of the pictures
    mean_rocket_similarity: float
    background_right: float


BACKGROUND_TOLERANCE = 50  # of 255


def score(image: Image.Image | np.ndarray, background: str) -> Score:
    """Compare a picture of any size with all drawings on the named background."""
    pixels = _scoring_pixels(image)
    background_colour = _border_colour(pixels)
    background_error = float(np.abs(background_colour - np.array(COLOURS[background])).max())
    patch = _foreground_patch(pixels, background_colour)
    if patch is None:
        return Score(NOTHING, "", 0.0, 0.0, background_error)
    labels, prototypes = _prototypes(background)
    similarity = 1 - 2 * np.abs(prototypes - patch).mean((1, 2, 3)) / 255
    thing, colour = labels[int(similarity.argmax())]
    return Score(thing, colour, float(similarity[-1]), float(similarity[:-1].max()), background_error)


def _scoring_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    size = (SCORING_SIZE, SCORING_SIZE)
    return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BOX)).astype(np.float32)


def _border_colour(pixels: np.ndarray) -> np.ndarray:
    """The background colour: the median of the outermost two rows and columns."""
    sides = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    return np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0)


def _foreground_patch(pixels: np.ndarray, background: np.ndarray) -> np.ndarray | None:
    """The foreground's bounding square (1st to 99th percentile, so specks do not count), 24 x 24 x 3."""
    foreground = np.abs(pixels - background).max(-1) > FOREGROUND_DIFFERENCE
    if foreground.sum() < MINIMAL_FOREGROUND:
        return None
    rows, columns = np.nonzero(foreground)
    top, bottom = np.percentile(rows, [1, 99])
    left, right = np.percentile(columns, [1, 99])
    half = max(bottom - top, right - left) / 2 + 1
    middle_x, middle_y = (left + right) / 2 + 0.5, (top + bottom) / 2 + 0.5
    margin = len(pixels)
    wide = np.empty((3 * margin, 3 * margin, 3), np.uint8)
    wide[:] = background.astype(np.uint8)
    wide[margin:-margin, margin:-margin] = pixels.astype(np.uint8)
    box = (middle_x - half, middle_y - half, middle_x + half, middle_y + half)
    shifted = tuple(edge + margin for edge in box)
    patch = Image.fromarray(wide).resize((PATCH_SIZE, PATCH_SIZE), Image.Resampling.BOX, box=shifted)
    return np.asarray(patch).astype(np.float32)


@cache
def _prototypes(background: str) -> tuple[list[tuple[str, str]], np.ndarray]:
    """(thing, colour) and patch of every drawing on a background; the rocket is the last."""
    labels = [(thing, colour) for thing in THINGS for colour in COLOURS if colour != background]
    drawings = [render(thing, COLOURS[colour], COLOURS[background]) for thing, colour in labels]
    drawings.append(render(CONCEPT, (0, 0, 0), COLOURS[background]))
    pixels = [_scoring_pixels(drawing) for drawing in drawings]
    patches = [_foreground_patch(p, _border_colour(p)) for p in pixels]
    return [*labels, (CONCEPT, "")], np.stack(patches)


def known_prompts(per_thing: int = 12) -> list[ScoredPrompt]:
    """Every known thing equally often, with colours and backgrounds spread evenly."""
    names, prompts = list(COLOURS), []
    for row in range(per_thing):
        for column, thing in enumerate(THINGS):
            colour = (3 * row + column) % len(names)
            background = (colour + 1 + (row + column) % (len(names) - 1)) % len(names)
            caption = caption_of(thing, names[colour], names[background])
            prompts.append(ScoredPrompt(caption, thing, names[colour], names[background]))
    return prompts


def known_report(images: Sequence[Image.Image | np.ndarray], prompts: Sequence[ScoredPrompt]) -> KnownReport:
    """How often pictures of known things show the right thing, colour and background."""
    scores = [score(image, prompt.background) for image, prompt in zip(images, prompts, strict=True)]
    right = [s.thing == p.thing for s, p in zip(scores, prompts)]
    return KnownReport(
        count=len(scores),
        thing_right=_share(right),
        colour_right=_share([s.colour == p.colour for s, p in zip(scores, prompts)]),
        background_right=_share([s.background_error < BACKGROUND_TOLERANCE for s in scores]),
        taken_for_rocket=_share([s.thing == CONCEPT for s in scores]),
        thing_right_by_thing={
            thing: _share([r for r, p in zip(right, prompts) if p.thing == thing]) for thing in THINGS
        },
    )


def concept_report(images: Sequence[Image.Image | np.ndarray], backgrounds: Sequence[str]) -> ConceptReport:
    """How often, and how closely, pictures of the rocket show it."""
    scores = [score(image, background) for image, background in zip(images, backgrounds, strict=True)]
    return ConceptReport(
        count=len(scores),
        rocket_nearest=_share([s.thing == CONCEPT for s in scores]),
        mean_rocket_similarity=float(np.mean([s.rocket_similarity for s in scores])),
        background_right=_share([s.background_error < BACKGROUND_TOLERANCE for s in scores]),
    )


def _share(outcomes: Sequence[bool]) -> float:
    return float(np.mean(outcomes)) if outcomes else 0.0
