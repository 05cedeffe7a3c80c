# SPDX-License-Identifier: Apache-2.0
"""Reversible tables between the weight names of checkpoint files and those of our modules.

A table is a tuple of rules. `publish` converts our tensors to the file's, `read` the file's to ours, and
`read(publish(x)) == x` bit for bit. A family only provides tables (its names.py); the functions here are the only
interpreter. Tables are written as module names (`ModuleName`), which also name LoRA layers; `expand` turns them into
rules for tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

ChildCount = Callable[[str], int]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Op:
    """The conversion of a tensor between the two layouts. read: called with the file's tensor and our shape."""

    publish: Callable[[Tensor], Tensor]
    read: Callable[[Tensor, tuple[int, ...]], Tensor]
    of_bias: bool = False  # also applies to a module's bias
    moves: bool = False  # `read` returns a copy
    # our shape -> shapes that the file's tensor may have
    shapes: Callable[[tuple[int, ...]], tuple[tuple[int, ...], ...]] = lambda shape: (shape,)


def _swap_halves(tensor: Tensor) -> Tensor:
    import torch

    first, second = tensor.chunk(2, 0)
    return torch.cat([second, first], 0)


COPY = Op(lambda t: t, lambda t, shape: t)
# a Linear in our module, a 1x1 convolution in the file
CONV_1X1 = Op(
    lambda t: t.reshape(*t.shape[:2], 1, 1),
    lambda t, shape: t.reshape(shape),
    shapes=lambda shape: ((*shape, 1, 1), shape),
)
TRANSPOSE = Op(lambda t: t.T, lambda t, shape: t.T, shapes=lambda shape: (shape[::-1],))
# (scale, shift) in our module, (shift, scale) in the file
SWAP_HALVES = Op(_swap_halves, lambda t, shape: _swap_halves(t), of_bias=True, moves=True)


@dataclass(frozen=True)
class Rule:
    """One tensor of the file, which consists of our tensors, concatenated along the first axis."""

    published: str
    ours: tuple[str, ...]
    op: Op = COPY


@dataclass(frozen=True)
class ModuleName:
    """The published name of a module and our name for it. Create it with `named`.

    One name of ours: a module with everything below it, or a single tensor. Several names: Linear layers with the same
    input that are one Linear in the file, in the order of its rows.
    """

    published: str
    ours: tuple[str, ...]
    op: Op = COPY


def named(published: str, *ours: str, op: Op = COPY) -> ModuleName:
    """`ModuleName` from a published name and one or more names of ours."""
    return ModuleName(published, ours, op)


def repeated(count: int, names: Iterable[ModuleName]) -> list[ModuleName]:
    """The names with `{i}` replaced by 0 .. count - 1, block by block."""
    table = list(names)
    return [
        ModuleName(name.published.format(i=i), tuple(own.format(i=i) for own in name.ours), name.op)
        for i in range(count)
        for name in table
    ]


def inside(published: str, ours: str, table: Iterable[tuple[str, str]]) -> Iterator[ModuleName]:
    """The rows (published, own) of a table, below a module."""
    return (named(f"{published}.{a}", f"{ours}.{b}") for a, b in table)


def children_of(root: nn.Module) -> ChildCount:
    """A function from the path of a module list to its length: 0 where a block does not have that list."""
    tree = dict(root.named_modules())
    return lambda name: len(list(tree[name].children())) if name in tree else 0


def part_rows(total: int, inputs: int, parts: int) -> tuple[int, ...]:
    """Rows of each part of a fused layer with `total` rows and `inputs` columns.

    Covers all published fused layers: two halves; q, k, v, where q is as wide as the input and k and v share the rest
    (also with fewer key heads); and q, k, v, mlp.
    """
    if parts < 3:
        return (total // parts,) * parts
    if parts == 3:
        return inputs, (total - inputs) // 2, (total - inputs) // 2
    return inputs, inputs, inputs, total - 3 * inputs


def expand(names: Iterable[ModuleName], tensors: Iterable[str]) -> tuple[Rule, ...]:
    """One rule per tensor of the file. tensors: our tensors, each of which belongs to the longest matching module name.

    Raises ValueError with the tensors that no module name covers: a table must be complete.
    """
    table = {own: name for name in names for own in name.ours}
    rules, uncovered = [], []
    for tensor in tensors:
        parts = tensor.split(".")
        own = next((p for i in range(len(parts), 0, -1) if (p := ".".join(parts[:i])) in table), None)
        if own is None:
            uncovered.append(tensor)
            continue
        owner, ending = table[own], tensor[len(own) :]
        if own == owner.ours[0]:  # the first tensor of a fused layer stands for all
            op = owner.op if owner.op.of_bias or tensor.endswith(".weight") else COPY
            rules.append(Rule(owner.published + ending, tuple(name + ending for name in owner.ours), op))
    if uncovered:
        raise ValueError(f"no published name for {uncovered}")
    return tuple(rules)


class LazyTensors(Mapping[str, "Tensor"]):
    """Named tensors, each of which is made when it is read, and not kept. A subclass makes them (`__getitem__`)."""

    names: Collection[str]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Published(LazyTensors):
    """Our tensors under the file's names, contiguous."""

    def __init__(self, tensors: Mapping[str, Tensor], rules: Sequence[Rule], prefix: str = "") -> None:
        self.tensors, self.rules = tensors, {prefix + rule.published: rule for rule in rules}
        self.names = self.rules

    def __getitem__(self, name: str) -> Tensor:
        import torch

        rule = self.rules[name]
        parts = [self.tensors[own] for own in rule.ours]
        whole = torch.cat(parts, 0) if len(parts) > 1 else parts[0]
        return rule.op.publish(whole).contiguous()


def publish(tensors: Mapping[str, Tensor], rules: Sequence[Rule], prefix: str = "") -> dict[str, Tensor]:
    """Our tensors under the file's names, all assembled at once."""
    return dict(Published(tensors, rules, prefix))


def read(
    get: Callable[[str], Tensor],
    names: Iterable[str],
    rules: Sequence[Rule],
    shapes: Shapes,
    prefix: str = "",
    keep: Callable[[str, Tensor], Mapping[str, Tensor]] = lambda own, tensor: {own: tensor},
) -> tuple[dict[str, Tensor], list[str]]:
    """The file's tensors under our names, and the published names that are missing in the file or have a wrong shape.

    get: reads one tensor of the file. names: the file's tensors. shapes: shapes of our module's tensors. keep: converts
    one of our names and its tensor to the tensors that are kept; it is called before the next one is read.
    """
    present = set(names)
    result: dict[str, Tensor] = {}
    wrong: list[str] = []
    for rule in rules:
        name = prefix + rule.published
        parts = read_parts(get(name), rule, shapes) if name in present else None
        if parts is None:
            wrong.append(name)
            continue
        for own in rule.ours:
            result.update(keep(own, parts.pop(own)))
    return result, wrong


def file_shapes(rule: Rule, shapes: Shapes) -> tuple[tuple[int, ...], ...]:
    """The shapes that a rule's tensor may have in a file, the published one first. shapes: those of our tensors."""
    first, *others = (shapes[name] for name in rule.ours)
    whole = (first[0] + sum(other[0] for other in others), *first[1:]) if others else first
    return rule.op.shapes(whole)


def read_parts(tensor: Tensor, rule: Rule, shapes: Shapes) -> dict[str, Tensor] | None:
    """One tensor of the file as our tensors, by name. None when its shape is wrong."""
    if tuple(tensor.shape) not in file_shapes(rule, shapes):
        return None
    parts = tensor.split([shapes[n][0] for n in rule.ours], 0) if len(rule.ours) > 1 else (tensor,)
    return {n: rule.op.read(part, shapes[n]) for part, n in zip(parts, rule.ours)}
