# SPDX-License-Identifier: Apache-2.0
"""Check which programs apply an adapter file as it was trained: by their rules, layer by layer, on the CPU.

Each layer's change is applied to one random vector, by the live layer and by the program's formula. Both are computed
in float64, so that they agree to 1e-5 where the file is in float32, else to the rounding of its precision.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from library.adapters.formats.architecture import LayerPart, Tables
from library.adapters.formats.conversion import FORMATS
from library.adapters.formats.layer_tensors import DORA
from library.adapters.readers.diffusers_rules import DIFFUSERS
from library.adapters.readers.formulas import FORMULAS, ON_WEIGHT, BaseWeight, change_of
from library.adapters.readers.programs import COMFY, FORGE
from library.adapters.readers.reading import NamedModel, Program, Reading, ReadLayer
from library.adapters.readers.trained_layer import TrainedLayer
from library.errors import first_names
from library.key_tables import part_rows

PROGRAMS = (COMFY, FORGE, DIFFUSERS)
TOLERANCE = 1e-5  # of the norm of a change
ROUNDING = 1e-6  # of the norm of W x, where the change is made of W: layers compute ratios of norms in float32
LARGE = 1 << 22  # numbers in a weight, above which of layers of one shape only one is computed
FROM_W = tuple(FORMULAS[name] for name in ON_WEIGHT)
CHEAP = (FORMULAS["LoRA"], FORMULAS["LoKr"], FORMULAS["norm"])


@dataclass
class Verdict:
    """How a program applies a file. missing: unchanged layers. wrong: (layer, relative difference)."""

    program: str
    refused: str | None = None
    missing: list[str] = field(default_factory=list)
    wrong: list[tuple[str, float]] = field(default_factory=list)
    layers: int = 0

    @property
    def takes(self) -> bool:
        return not (self.refused or self.missing or self.wrong)

    def text(self) -> str:
        """What it does, as the rest of a sentence that begins with the program."""
        if self.refused:
            return f"refuses the file: {self.refused}"
        if len(self.missing) == self.layers:
            return "loads nothing of the file"
        said = []
        if self.missing:
            said.append(f"leaves {len(self.missing)} of {self.layers} layers as they were: {first_names(self.missing)}")
        if self.wrong:
            names = first_names([f"{name} (by {100 * by:.3g} %)" for name, by in self.wrong])
            said.append(f"changes {len(self.wrong)} of {self.layers} layers otherwise than trained: {names}")
        return "; it ".join(said)


class NetworkComparison:
    """Compares the live layers, whose changes are computed once, with how programs apply files."""

    def __init__(self, layers: Iterable[TrainedLayer], model: str, tables: Tables):
        """model: the name of the architecture, or of a variant of one, among `tables`."""
        self.model, self.tables = model, tables
        self.layers = {layer.name: layer for layer in layers}
        self._changes: dict[str, Tensor] = {}
        self._plain: dict[str, Tensor] = {}

    def sample(self) -> NetworkComparison:
        """Of layers that are alike the first and the last: a check of those."""
        names = _ends_of_alike({name: re.sub(r"\d+", "#", name) for name in self.layers})
        return NetworkComparison([self.layers[name] for name in names], self.model, self.tables)

    def programs(self) -> list[Program]:
        model = NamedModel.of(self.model, (), self.tables)
        return [program for program in PROGRAMS if model.formats(program.name)]

    def verdict(self, program: Program, tensors: Mapping[str, Tensor]) -> Verdict:
        model = NamedModel.of(self.model, [*tensors, *self.layers], self.tables)
        reading = program.read(tensors, model)
        verdict = Verdict(program.name, reading.refused, layers=len(self.layers))
        if reading.refused:
            return verdict
        found = {name: self._entries(name, reading, model) for name in self.layers}
        verdict.missing = [name for name, entries in found.items() if not entries]
        for name in self._computed({name: entries for name, entries in found.items() if entries}):
            difference = self._difference(name, found[name], reading.decompose)
            if difference:
                verdict.wrong.append((name, difference))
        return verdict

    def _entries(self, name: str, reading: Reading, model: NamedModel) -> list[tuple[ReadLayer, slice]]:
        """What the program applies to a live layer, and to which of its rows."""
        place = model.index.find(_lora_name(name))
        if place is None:
            return []
        found = []
        for entry in reading.entries.get(place.layer.kohya, ()):
            if place.part is not None:  # the live layer is a part itself
                if entry.place.part == place.part:
                    found.append((entry, slice(None)))
            else:
                found.append((entry, self._rows(entry.place, self.layers[name].shape)))
        return found

    def _rows(self, place: LayerPart, shape: Sequence[int]) -> slice:
        if place.part is None or len(place.layer.parts) == 1:
            return slice(None)
        rows = part_rows(shape[0], shape[1], len(place.layer.parts))
        start = sum(rows[: place.part])
        return slice(start, start + rows[place.part])

    def _computed(self, found: Mapping[str, list[tuple[ReadLayer, slice]]]) -> list[str]:
        """All layers, but of large ones of one shape only one where each costs products as large as the weight."""
        chosen: dict[object, str] = {}
        for name, entries in found.items():
            layer = self.layers[name]
            cheap = layer.cheap and all(entry.formula in CHEAP and DORA not in entry.tensors for entry, _ in entries)
            kinds = tuple(entry.formula for entry, _ in entries)
            small = cheap or torch.Size(layer.shape).numel() < LARGE
            chosen.setdefault(name if small else (layer.shape, kinds), name)
        return list(chosen.values())

    def _difference(self, name: str, entries: Sequence[tuple[ReadLayer, slice]], decompose: str) -> float:
        """0 where the program arrives at the trained change, else how far it is away."""
        layer = self.layers[name]
        if layer.probe is None:
            return 0.0
        expected = self._change(layer)
        found = torch.zeros_like(expected)
        try:
            for entry, rows in entries:
                found[rows] += self._effect(layer, entry, rows, decompose)
        except (RuntimeError, IndexError, KeyError):  # shapes that do not fit: the program has the same trouble
            return 1.0
        off, size = float((found - expected).norm()), float(expected.norm())
        limit = max(TOLERANCE, 4 * max(entry.eps for entry, _ in entries)) * size
        for entry, _ in entries:
            if entry.formula in FROM_W or DORA in entry.tensors:
                limit += (ROUNDING + entry.eps) * float(self._without(layer).norm())
        return 0.0 if off <= limit else off / max(size, torch.finfo(torch.float32).tiny)

    def _change(self, layer: TrainedLayer) -> Tensor:
        assert layer.probe is not None
        if layer.name not in self._changes:
            self._changes[layer.name] = layer.change(layer.probe)
        return self._changes[layer.name]

    def _without(self, layer: TrainedLayer) -> Tensor:
        """W x."""
        assert layer.probe is not None
        if layer.name not in self._plain:
            self._plain[layer.name] = layer.weight().flatten(1) @ layer.probe.flat
        return self._plain[layer.name]

    def _effect(self, layer: TrainedLayer, entry: ReadLayer, rows: slice, decompose: str) -> Tensor:
        """The change that a program makes of some rows, in the published order."""
        assert layer.probe is not None
        place, columns = entry.place, layer.shape[1:]
        swaps = place.part is not None and bool(columns) and place.layer.swaps(layer.shape[0], columns[0])
        order: Callable[[Tensor], Tensor] = lambda t: torch.cat(t.chunk(2)[::-1]) if swaps else t
        base = BaseWeight((len(range(layer.shape[0])[rows]), *columns), lambda: order(layer.weight()[rows]))
        own = {name: value.double() for name, value in entry.tensors.items()}
        return order(change_of(entry.formula, own, layer.probe.flat, base, decompose))


def _ends_of_alike(keys: Mapping[str, str]) -> list[str]:
    """The first and the last name of each key."""
    alike: dict[str, list[str]] = {}
    for name, key in keys.items():
        alike.setdefault(key, []).append(name)
    return [name for names in alike.values() for name in dict.fromkeys((names[0], names[-1]))]


def _lora_name(name: str) -> str:
    return f"lora_{name.removeprefix('oft_')}" if name.startswith("oft_") else name


# ---- lines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProgramReport:
    """What to say of a file: who takes it as it was trained, and one line for each program that does not."""

    taken_by: list[str]
    warnings: list[str]


Rewritten = Callable[[str, Collection[str]], Mapping[str, Tensor]]


def report(check: NetworkComparison, tensors: Mapping[str, Tensor], form: str, rewritten: Rewritten) -> ProgramReport:
    """What the programs make of a file in the --lora_format `form`.

    rewritten: these layers of the same network in another format; raises where that has no names for them.
    """
    if not check.layers:
        return ProgramReport([], ["what other programs make of it is not known: no layer of the network says its name"])
    verdicts = {program: check.verdict(program, tensors) for program in check.programs()}
    taken = [program.name for program, verdict in verdicts.items() if verdict.takes]
    formats = _Formats(check.sample(), rewritten, [other for other in FORMATS if other != form])
    warnings = []
    for program, verdict in verdicts.items():
        if not verdict.takes:
            better = formats.taken_by(program)
            advice = f"--lora_format {better} is for it" if better else "no --lora_format of this network is for it"
            warnings.append(f"{program.name} {verdict.text()}; {advice}")
    return ProgramReport(taken, warnings)


class _Formats:
    """The same network in other formats, written when a program asks for them: of layers that are alike only two."""

    def __init__(self, check: NetworkComparison, rewritten: Rewritten, others: Sequence[str]):
        self.check, self.rewritten, self.others = check, rewritten, others

    def taken_by(self, program: Program) -> str | None:
        """The first format that the program takes."""
        return next((o for o in self.others if (t := self._tensors(o)) and self.check.verdict(program, t).takes), None)

    @functools.cache  # noqa: B019  # lives as long as the report is made
    def _tensors(self, form: str) -> Mapping[str, Tensor] | None:
        try:
            return self.rewritten(form, self.check.layers.keys())
        except Exception:  # a format without names for this network is not advised
            return None
