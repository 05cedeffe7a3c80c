# SPDX-License-Identifier: Apache-2.0
"""Values of options: texts and TOML values as the annotated type, and checks of their range."""

from __future__ import annotations

import math
import os
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Check = Callable[[Any], "str | None"]  # returns what is wrong ("must be at least 1"), or None

LARGEST_FLOAT = 3.4028235e38  # float32
MOST = 10**9  # of a number whose option does not say another limit: no run needs more steps, pixels or strength
SEEDS = (-(2**63), 2**64 - 1)
LONGEST_SHOWN = 60
LONGEST_PATH, LONGEST_NAME = 4095, 255  # bytes, on every usual file system


# ---- checks -------------------------------------------------------------------------------------------------------


def positive(value: float) -> str | None:
    return at_most(MOST)(value) if value > 0 else "must be greater than 0"


def at_least(low: float, most: float = MOST) -> Check:
    return lambda value: at_most(most)(value) if value >= low else f"must be at least {low}"


def rate(value: float) -> str | None:
    """Check of a learning rate: any value that float32 holds, since a run that diverges is found by its loss."""
    return at_least(0, LARGEST_FLOAT)(value)


def at_most(most: float) -> Check:
    return lambda value: None if value <= most else f"must be at most {most}"


def between(low: float, high: float) -> Check:
    return lambda value: None if low <= value <= high else f"must be between {low} and {high}"


@dataclass(frozen=True)
class Refused:
    """For options that other architectures have: any value that asks for something is refused, with the reason.

    0, false and the like, which graphical programs write for options that are not used, pass.
    """

    reason: str

    def __call__(self, value: Any) -> str | None:
        return f"has no meaning here: {self.reason}" if value else None


refused = Refused


def usual_range(value: Any) -> str | None:
    """The check of every option that has none of its own."""
    return between(-MOST, MOST)(value) if isinstance(value, (int, float)) else None


def text_problem(text: str, *, path: bool = False) -> str | None:
    """What keeps a text from being written into a file or, with `path`, from naming one.

    On Linux a path may hold bytes that are not UTF-8; Python has them as surrogates.
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
    """A value in quotes where it is a text, on one line, cut where it is long."""
    return cut(f"'{value}'" if isinstance(value, str) else repr(value))


def cut(text: str, limit: int = LONGEST_SHOWN) -> str:
    """A text, without its end where it is long."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def convert(value: Any, hint: Any) -> Any:
    """`value` (CLI text or TOML value) as the annotated type. Raises ValueError with "expects ..., got ..."."""
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
    """A finite number. Raises ValueError."""
    found = _finite(value)
    if found is None:
        raise ValueError(f"expects a number, got {shown(value)}")
    return found


def whole_number(value: Any) -> int:
    """An integer, exact however large it is. Raises ValueError."""
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
    """The number that `value` is or says, None where it says none, infinity or no number (nan)."""
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
    """A number of steps, a fraction of the run below 1, or "10%"."""
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
