# SPDX-License-Identifier: Apache-2.0
"""Sizes of a model, read from the names and shapes in its file: number of blocks, widths of layers.

No single tensor decides how deep a model is. A block counts if at least half of its tensors are there. The check of the
weights then finds missing tensors of such blocks, and surplus tensors of others.
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
    """A size cannot be read. `what`, the tensor's `name` and `rest` complete the line "<file> ..."."""

    def __init__(self, what: str, name: str, rest: str = "") -> None:
        super().__init__(f"{what} {name}{rest}")
        self.what, self.name, self.rest = what, name, rest

    def line(self, prefix: str) -> str:
        """The message, which also has the tensor's full name in the file if there is a prefix."""
        whole = f" ({prefix}{self.name})" if prefix else ""
        return f"{self.what} {self.name}{whole}{self.rest}"


def below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors below a prefix, by the rest of their names."""
    return {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}


def has(shapes: Shapes, *starts: str) -> bool:
    """Whether any tensor's name begins with one of `starts`."""
    return any(name.startswith(starts) for name in shapes)


def shape_of(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of one tensor. Raises SizeError if it is missing, is empty, or has more or fewer dimensions."""
    if name not in shapes:
        raise SizeError("is incomplete: it lacks", name)
    shape = tuple(shapes[name])
    if len(shape) != dimensions or 0 in shape:
        raise SizeError("is damaged or of another kind:", name, f" has shape {shape}, not {dimensions} dimensions")
    return shape


def depth(shapes: Shapes, *blocks: str) -> int:
    """The number of blocks, that of the deepest kind. blocks: the beginning of each kind's names, "layers.{}."."""
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
    """Context in which errors while reading sizes become a UserError about `path`. prefix: of the names in the file."""
    start = f"{option}: {path}" if option else str(path)
    try:
        yield
    except SizeError as error:
        raise UserError(f"{start} {error.line(prefix)}") from None
    except KeyError as error:  # an entry of config.json
        raise UserError(f"{start} is incomplete: it lacks {error.args[0]}") from None
    except (ValueError, TypeError, IndexError, ArithmeticError) as error:  # impossible sizes
        raise UserError(f"{start} is damaged or of another kind: its sizes make no model ({error})") from None
