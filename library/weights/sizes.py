# SPDX-License-Identifier: Apache-2.0
"""Sizes of a model, read from the names and shapes of its file: how many blocks there are, how wide a layer is.

No single tensor decides how deep a model is. A block counts where half of its tensors are there, so that a tensor that
is gone leaves a hole in a block, and one too many is left over: both are found when every weight is looked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from library.errors import UserError
from library.key_tables import Shapes


class SizeError(Exception):
    """A size cannot be read. what, name of a tensor and rest complete the line "<file> ..."."""

    def __init__(self, what: str, name: str, rest: str = "") -> None:
        super().__init__(f"{what} {name}{rest}")
        self.what, self.name, self.rest = what, name, rest

    def line(self, prefix: str) -> str:
        """The message; with a prefix, the tensor's whole name in the file too."""
        whole = f" ({prefix}{self.name})" if prefix else ""
        return f"{self.what} {self.name}{whole}{self.rest}"


def below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """What a file has below a prefix, by the rest of the names."""
    return {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}


def has(shapes: Shapes, *starts: str) -> bool:
    """Whether the name of any tensor begins with one of `starts`."""
    return any(name.startswith(starts) for name in shapes)


def shape_of(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of one tensor. Raises SizeError when it is not there, is empty, or has more or fewer dimensions."""
    if name not in shapes:
        raise SizeError("is incomplete: it lacks", name)
    shape = tuple(shapes[name])
    if len(shape) != dimensions or 0 in shape:
        raise SizeError("is damaged or of another kind:", name, f" has shape {shape}, not {dimensions} dimensions")
    return shape


def depth(shapes: Shapes, *blocks: str) -> int:
    """How many blocks of a kind there are. blocks: the start of their names, "layers.{}."; the deepest kind counts."""
    return max(_depth(shapes, block) for block in blocks)


def _depth(shapes: Shapes, block: str) -> int:
    pattern = re.compile(re.escape(block).replace(r"\{\}", r"(\d{1,6})"))
    counts = Counter(int(found[1]) for found in map(pattern.match, shapes) if found)
    whole = max(counts.values(), default=0)
    indices = {index for index, count in counts.items() if 2 * count >= whole}
    gap = next((i for i in range(len(indices)) if i not in indices), None)
    if gap is not None:
        later = next(name for name in shapes if (found := pattern.match(name)) and int(found[1]) > gap)
        raise SizeError("is incomplete: it has", later, f", and lacks {block.format(gap)}*")
    return len(indices)


@contextmanager
def reading_sizes(path: Path, prefix: str = "", option: str = "") -> Iterator[None]:
    """Whatever cannot be read of sizes inside ends as a UserError about `path`. prefix: of the names in the file."""
    start = f"{option}: {path}" if option else str(path)
    try:
        yield
    except SizeError as error:
        raise UserError(f"{start} {error.line(prefix)}") from None
    except KeyError as error:  # an entry of config.json
        raise UserError(f"{start} is incomplete: it lacks {error.args[0]}") from None
    except (ValueError, TypeError, IndexError, ArithmeticError) as error:  # of numbers that make no model
        raise UserError(f"{start} is damaged or of another kind: its sizes make no model ({error})") from None
