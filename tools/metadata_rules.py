# SPDX-License-Identifier: Apache-2.0
"""Cleaning of machine-made tags and captions, by the rules of sd-scripts' finetune/clean_captions_and_tags.py.

Two differences: tags may be separated by a comma without a space, and captions are changed word by word, never inside
a longer word ("ladybug" stays).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

FACE = "^_^"  # the one tag whose underscore is not a space
RATING = "rating"  # DeepDanbooru's last tag starts with it
SEVERAL = ("girls", "boys")  # words for several people

LENGTH = re.compile(r"(?:long|short|medium) hair")
HAIR = re.compile(r"[\w-]+ hair")
# Kinds of tags of which a picture of several people may have more than one, for different people
OF_ONE_PERSON = (
    LENGTH,
    re.compile(r"(?:bob|hime) cut"),
    re.compile(r"[\w-]+ eyes"),
    re.compile(r"[\w-]+ sleeves|sleeveless"),
    re.compile(
        r"ponytail|braid|ahoge|twintails|sidelocks|two side up|two tails|single (?:hair|side) bun|[\w-]+ (?:bun|braid)"
    ),
)
GENERAL = re.compile(r"[\w-]+|hair ornament")  # removed if a longer tag ends with it


def clean_tags(text: str) -> str:
    """Tags without underscores, rating, contradictions, and words that end a longer tag: "shirt" in "white shirt"."""
    tags = [FACE.join(part.replace("_", " ") for part in tag.split(FACE)) for tag in split(text)]
    rating = next((i for i, tag in enumerate(tags) if i and tag.startswith(RATING)), len(tags))
    tags = tags[:rating]
    if any(word in tag for tag in tags for word in SEVERAL):
        for kind in OF_ONE_PERSON:
            tags = without_kind(tags, kind)
        # a single hair length is kept, whatever the colours
        tags = without_kind(tags, HAIR, keep=LENGTH)
    endings = {tag.split(" ", i)[i] for tag in tags for i in range(1, tag.count(" ") + 1) if _plain(tag, i)}
    return ", ".join(tag for tag in tags if not (GENERAL.fullmatch(tag) and tag in endings))


def split(text: str) -> list[str]:
    """The tags of a text, without empty ones."""
    return [tag for part in text.split(",") if (tag := part.strip())]


def without_kind(tags: list[str], kind: re.Pattern[str], *, keep: re.Pattern[str] | None = None) -> list[str]:
    """The tags without those of a kind, if there are several. Tags that match `keep` do not count as that kind."""
    found = [tag for tag in tags if kind.fullmatch(tag) and not (keep and keep.fullmatch(tag))]
    return [tag for tag in tags if tag not in found] if len(found) > 1 else tags


def _plain(tag: str, count: int) -> bool:
    """Whether the first `count` words of a tag are letters and digits only."""
    return all(re.fullmatch(r"\w+", word) for word in tag.split(" ")[:count])


# ---- captions -------------------------------------------------------------------------------------------------------


def _each(words: str, replacement: str) -> list[tuple[str, str]]:
    return [(word, replacement) for word in words.split("|")]


# Applied in this order, each until nothing changes. Plurals stay plurals.
REPLACEMENTS: tuple[tuple[str, str], ...] = (
    ("anime anime", "anime"),
    ("young ", ""),
    ("anime girl", "girl"),
    *_each("cartoon female|cartoon lady|cartoon character|cartoon woman", "girl"),
    ("cartoon women", "girls"),
    ("cartoon girl", "girl"),
    *_each("anime female|anime lady|anime character|anime woman", "girl"),
    ("anime women", "girls"),
    *_each("lady|female|woman", "girl"),
    *_each("women|people", "girls"),
    ("person", "girl"),
    ("a cartoon figure", "a figure"),
    ("a cartoon image", "an image"),
    ("a cartoon picture", "a picture"),
    ("an anime cartoon image", "an image"),
    *_each("a cartoon anime drawing|a cartoon drawing", "a drawing"),
    ("girl girl", "girl"),
)


def _compiled(table: Iterable[tuple[str, str]]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(rf"\b{old}" if old.endswith(" ") else rf"\b{old}(?=s?\b)"), new) for old, new in table)


_RULES = _compiled(REPLACEMENTS)


def clean_caption(text: str) -> str:
    """A caption with a single name each for people and for drawings."""
    for pattern, new in _RULES:
        before = None
        while before != text:
            before, text = text, pattern.sub(new, text)
    return text
