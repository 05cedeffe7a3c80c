# SPDX-License-Identifier: Apache-2.0
"""Show what is in an adapter file, and whether every number in it is finite.

    python networks/check_lora_weights.py lora.safetensors

Prints a line per tensor: name, shape, dtype, mean of the absolute values, smallest and largest; then, for each program
that loads such files, which keys it leaves or why it refuses the file. The exit code is 1 when a tensor holds inf or
nan.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any folder

from library.adapters.surgery.tool_options import missing_adapters, needed
from library.cli import run_tool
from library.options import option

if TYPE_CHECKING:
    from torch import Tensor

EXIT_NOT_FINITE = 1


@dataclass(frozen=True)
class CheckOptions:
    """The file to check."""

    file: str | None = option(None, help="Adapter file to look at; --file may be left out.", path=True)

    def problems(self) -> Iterator[str]:
        yield from needed(self, "file")
        yield from missing_adapters("--file", [self.file])


@dataclass(frozen=True)
class CheckLoraOptions:
    """All options of this script."""

    check: CheckOptions = field(default_factory=CheckOptions)


def lines(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """A line per tensor, in the order of names."""
    width = max(len(name) for name in tensors)
    for name in sorted(tensors):
        value = tensors[name]
        numbers = value.float()
        figures = "empty"
        if value.numel():
            mean, low, high = float(numbers.abs().mean()), float(numbers.min()), float(numbers.max())
            figures = f"mean |x| {mean:.6g}, min {low:.6g}, max {high:.6g}"
        kind = str(value.dtype).removeprefix("torch.")
        yield f"{name:{width}} {tuple(value.shape)!s:20} {kind:8} {figures}"


def check(options: CheckLoraOptions) -> list[str]:
    """Print the lines. Returns the names of the tensors that are not finite."""
    from library.adapters.formats.adapter_files import load_tensors
    from library.adapters.readers.known_keys import key_lines
    from library.families.adapters import adapter_tables
    from library.io.checkpoint import nonfinite_names

    assert options.check.file
    tensors = load_tensors(options.check.file)
    print(f"{options.check.file}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} numbers")
    print("\n".join([*lines(tensors), *key_lines(tensors, adapter_tables())]))
    return nonfinite_names(tensors)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 when a tensor is not finite; 2 for bad input."""
    words = [*(sys.argv[1:] if argv is None else argv)]
    if words and not words[0].startswith("-"):
        words.insert(0, "--file")
    bad: list[str] = []
    action = lambda options: bad.extend(check(options))
    code = run_tool(CheckLoraOptions, action, words, "check_lora_weights.py", __doc__ or "")
    for name in bad:
        sys.stderr.write(f"not finite: {name}\n")
    return code or (EXIT_NOT_FINITE if bad else 0)


if __name__ == "__main__":
    sys.exit(main())
