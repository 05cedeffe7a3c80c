# SPDX-License-Identifier: Apache-2.0
"""Reversible tables of weight names: the names that checkpoint files use, and the names inside our modules.

A table is a tuple of rules. `publish` turns our tensors into the file's, `read` the file's into ours, and
`read(publish(x)) == x` bit for bit. A family only writes tables (see sd_keys.py); the two functions here are
the only interpreter. Module names (`ModuleName`) come first: they also name LoRA layers; `expand` makes tensor
rules of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Op:
    """How one tensor changes between the two layouts. `read` gets the tensor and our shape."""

    publish: Callable[[Tensor], Tensor]
    read: Callable[[Tensor, tuple[int, ...]], Tensor]


def _swap_halves(tensor: Tensor) -> Tensor:
    import torch

    first, second = tensor.chunk(2, 0)
    return torch.cat([second, first], 0)


COPY = Op(lambda t: t, lambda t, shape: t)
# a Linear here, a 1x1 convolution in the file
CONV_1X1 = Op(lambda t: t.reshape(*t.shape[:2], 1, 1), lambda t, shape: t.reshape(shape))
TRANSPOSE = Op(lambda t: t.T, lambda t, shape: t.T)
# (scale, shift) here, (shift, scale) in the file
SWAP_HALVES = Op(_swap_halves, lambda t, shape: _swap_halves(t))


@dataclass(frozen=True)
class Rule:
    """One tensor of the file = our tensors, concatenated along the first axis."""

    published: str
    ours: tuple[str, ...]
    op: Op = COPY


@dataclass(frozen=True)
class ModuleName:
    """A module (a leaf, or everything below it) under its published name and under ours; `op` changes its weight."""

    published: str
    ours: str
    op: Op = COPY


def expand(names: Iterable[ModuleName], tensors: Iterable[str]) -> tuple[Rule, ...]:
    """One rule per tensor name of ours, by the longest module name that contains it.

    Raises ValueError naming the tensors that no module name covers: a table must be whole.
    """
    table = {name.ours: name for name in names}
    rules, uncovered = [], []
    for tensor in tensors:
        parts = tensor.split(".")
        owner = next((table[p] for i in range(len(parts), 0, -1) if (p := ".".join(parts[:i])) in table), None)
        if owner is None:
            uncovered.append(tensor)
            continue
        op = owner.op if tensor.endswith(".weight") else COPY
        rules.append(Rule(owner.published + tensor[len(owner.ours) :], (tensor,), op))
    if uncovered:
        raise ValueError(f"no published name for {uncovered}")
    return tuple(rules)


def publish(tensors: Mapping[str, Tensor], rules: Sequence[Rule], prefix: str = "") -> dict[str, Tensor]:
    """Our tensors under the file's names, contiguous."""
    import torch

    result = {}
    for rule in rules:
        parts = [tensors[name] for name in rule.ours]
        whole = torch.cat(parts, 0) if len(parts) > 1 else parts[0]
        result[prefix + rule.published] = rule.op.publish(whole).contiguous()
    return result


def read(
    get: Callable[[str], Tensor], names: Iterable[str], rules: Sequence[Rule], shapes: Shapes, prefix: str = ""
) -> tuple[dict[str, Tensor], list[str]]:
    """The file's tensors under our names, and the published names that the file lacks or has in another shape.

    get: reads one tensor of the file. names: what the file has. shapes: of our module.
    """
    present = set(names)
    result: dict[str, Tensor] = {}
    wrong: list[str] = []
    for rule in rules:
        name = prefix + rule.published
        if name not in present:
            wrong.append(name)
            continue
        tensor = get(name)
        rows = [shapes[n][0] if shapes[n] else 1 for n in rule.ours]
        try:
            parts = tensor.split(rows, 0) if len(rows) > 1 else (tensor,)
            parts = tuple(rule.op.read(part, shapes[n]) for part, n in zip(parts, rule.ours))
        except RuntimeError:
            wrong.append(name)
            continue
        if any(tuple(part.shape) != shapes[n] for part, n in zip(parts, rule.ours)):
            wrong.append(name)
            continue
        result.update(zip(rule.ours, parts))
    return result, wrong
