# SPDX-License-Identifier: Apache-2.0
"""Values of options: conversion of command-line texts and TOML values to the annotated types, and range checks."""

from __future__ import annotations

import math
import os
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ValueCheck = Callable[[Any], "str | None"]  # value -> what is wrong ("must be at least 1"), or None

LARGEST_FLOAT = 3.4028235e38  # float32
MOST = 10**9  # default limit of numbers: no run needs more steps, pixels or strength
SEEDS = (-(2**63), 2**64 - 1)
LONGEST_SHOWN = 60
LONGEST_PATH, LONGEST_NAME = 4095, 255  # bytes, limits of the usual file systems


# ---- checks -------------------------------------------------------------------------------------------------------


def positive(value: float) -> str | None:
    return at_most(MOST)(value) if value > 0 else "must be greater than 0"


def at_least(low: float, most: float = MOST) -> ValueCheck:
    return lambda value: at_most(most)(value) if value >= low else f"must be at least {low}"


def rate(value: float) -> str | None:
    """Check a learning rate: any float32 value is valid, since a run that diverges is detected by its loss."""
    return at_least(0, LARGEST_FLOAT)(value)


def at_most(most: float) -> ValueCheck:
    return lambda value: None if value <= most else f"must be at most {most}"


def between(low: float, high: float) -> ValueCheck:
    return lambda value: None if low <= value <= high else f"must be between {low} and {high}"


@dataclass(frozen=True)
class Refused:
    """A check for options of other architectures, which refuses every value with a reason.

    0, false and the like, which graphical programs write for unused options, are accepted.
    """

    reason: str

    def __call__(self, value: Any) -> str | None:
        return f"has no meaning here: {self.reason}" if value else None


refused = Refused


def usual_range(value: Any) -> str | None:
    """The default check of options."""
    return between(-MOST, MOST)(value) if isinstance(value, (int, float)) else None


def text_problem(text: str, *, path: bool = False) -> str | None:
    """Why a text cannot be written to a file or, with `path`, cannot be a path. None: there is no problem.

    On Linux a path may contain bytes that are not UTF-8, which Python represents as surrogates.
    """
    if "\0" in text:
        return "must not hold the character NUL"
    try:
        data = os.fsencode(text) if path else text.encode()
    except UnicodeEncodeError:
        return "is not valid text: it holds half a character (a surrogate) or bytes that are not UTF-8"
    if path and (len(data) > LONGEST_PATH or any(len(name) > LONGEST_NAME for name in data.split(b"/"))):
        return f"is too long for a path: {len(data)} bytes"
    return None


# ---- conversion ---------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value for messages: texts in quotes, shortened to LONGEST_SHOWN letters."""
    return cut(f"'{value}'" if isinstance(value, str) else repr(value))


def cut(text: str, limit: int = LONGEST_SHOWN) -> str:
    """A text, shortened to `limit` letters."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def convert(value: Any, hint: Any) -> Any:
    """Convert `value` (command-line text or TOML value) to a type. Raises ValueError: "expects ..., got ..."."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return convert(value, next(a for a in arguments if a is not type(None)))
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(convert(item, arguments[0]) for item in items)
    if hint is bool:
        return _to_bool(value)
    if hint is int:
        return whole_number(value)
    if hint is float:
        return number(value)
    if hint is str:
        if value is None or isinstance(value, (list, dict, bool)):
            raise ValueError(f"expects a text, got {shown(value)}")
        return str(value)
    raise TypeError(f"unsupported option type {hint}")


def _to_bool(value: Any) -> bool:
    text = str(value).lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off"):
        return False
    raise ValueError(f"expects true or false, got {shown(str(value))}")


def number(value: Any) -> float:
    """Convert to a finite number. Raises ValueError."""
    found = _finite(value)
    if found is None:
        raise ValueError(f"expects a number, got {shown(value)}")
    return found


def whole_number(value: Any) -> int:
    """Convert to an integer, exactly, whatever its size. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
        try:
            return int(value)
        except ValueError:  # Python converts only so many digits
            raise ValueError(f"expects a whole number, got one of {len(value.strip())} digits") from None
    found = _finite(value)
    if found is None or found != int(found):
        raise ValueError(f"expects a whole number, got {shown(value) if found is None else found}")
    return int(found)


def _finite(value: Any) -> float | None:
    """`value` or the number in its text; None when there is none, or when it is infinite or nan."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and "_" in value:  # Python takes 1_000
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def int_or_fraction(value: Any) -> int | float:
    """Convert a number of steps, a fraction of the run below 1, or a percentage such as "10%". Raises ValueError."""
    text = value.strip() if isinstance(value, str) else value
    wrong = ValueError(f"expects steps, a fraction below 1 or a percentage, got {shown(str(value))}")
    if isinstance(text, str) and text.endswith("%"):
        percent = _finite(text[:-1])
        if percent is None:
            raise wrong
        return percent / 100
    found = _finite(text)
    if found is None:
        raise wrong
    return whole_number(text) if found == int(found) and (found >= 1 or found == 0) else found
