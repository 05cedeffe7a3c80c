# SPDX-License-Identifier: Apache-2.0
"""Adapters merged into the weights of a checkpoint, tensor by tensor, by the classes that apply them in training.

Each layer of an adapter file is put on a module with the checkpoint's weight, so every kind of adapter that can be
trained can be merged, with the same arithmetic.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.file_readers import LayerReader, pieces, reader_of
from library.adapters.formats.damage import BROKEN
from library.adapters.formats.deltas import kohya_dora
from library.adapters.formats.layer_tensors import BIAS_ADDED, COMFY_DORA, DORA, DOWN, UP, Tensors
from library.adapters.surgery.checkpoint_layers import CheckpointLayers, WeightLocation
from library.adapters.target_spec import TargetModule, TargetSpec
from library.errors import UserError, first_names, raise_problems
from library.key_tables import part_rows
from library.weights.grown_input import EDIT_CHANNELS, is_grown, padded
from library.weights.weight_files import WeightFile

BIASED = {"b_norm", BIAS_ADDED}  # an adapter with one of these tensors changes the bias too
NUMBERED = "oft_blocks."  # a fused layer has one set of rotations for each of its parts


@dataclass(frozen=True)
class Adapter:
    """An adapter file: its layers by kohya name, and the strength at which each is merged."""

    label: str  # for messages
    layers: Mapping[str, Tensors]
    strength: Callable[[str], float]  # layer -> ratio


@dataclass(frozen=True)
class MergeStep:
    """One layer of one adapter, waiting for the checkpoint's weight."""

    layer: str
    place: WeightLocation
    own: Tensors
    reader: LayerReader
    strength: float

    def grown(self, weight: Tensor) -> Tensor:
        """The weight, with new input channels if the adapter has them: of a model that learned to edit pictures."""
        change = self.own.get("diff")
        is_new = change is not None and is_grown(weight.shape, change.shape)
        return padded(weight, EDIT_CHANNELS) if is_new else weight

    def on(self, weight: Tensor, bias: Tensor | None) -> AdapterLayer:
        """The adapter on a module that has this weight and bias, with the values of the file."""
        weight = self.grown(weight)
        target = target_of(self.layer, weight, bias, sum(name.startswith(NUMBERED) for name in self.own))
        own = kohya_dora(self.own, target)
        layer = self.reader.from_tensors(target, own, None)
        problem = layer.problem(own)
        if problem is not None:
            raise UserError(problem)
        layer.load_tensors(own)
        return layer

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the adapter merged in: new tensors, float32."""
        layer = self.on(weight.float().clone(), None if bias is None else bias.float().clone())
        layer.set_multiplier(self.strength)
        layer.merge()
        module = layer.target.modules[0].module
        assert isinstance(module.weight, Tensor)
        return module.weight, module.bias if isinstance(module.bias, Tensor) else None


class MergedWeights:
    """A checkpoint's tensors with adapters merged in, computed on demand. Raises UserError for unfit adapters.

    used: names of the adapters' layers that this file has; the others are of other parts of the model. moved: those of
    them that changed a tensor that was asked for.
    """

    def __init__(self, file: WeightFile, layers: CheckpointLayers, adapters: Sequence[Adapter]) -> None:
        self.file, self.layers = file, layers
        self.used: list[str] = []
        self.moved: set[str] = set()
        self.left: list[str] = []
        self._steps: dict[str, list[MergeStep]] = {}  # name of a tensor -> what happens to it, in order
        raise_problems(problem for adapter in adapters for problem in self._plan(adapter))

    @property
    def grown(self) -> dict[str, tuple[int, ...]]:
        """Names of the tensors that get new input channels -> their shapes."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, steps in self._steps.items():
            old = torch.empty(self.layers.shapes[name], device="meta")
            new = next((new for step in steps if (new := step.grown(old)) is not old), old)
            shapes |= {} if new is old else {name: tuple(new.shape)}
        return shapes

    @property
    def changed(self) -> set[str]:
        """Names of the tensors that differ from the file's."""
        return set(self._steps)

    def tensor(self, name: str) -> Tensor:
        """One tensor: merged in float32, or as the file has it."""
        if name not in self._steps:
            return self.file.tensor(name)
        whole = self.file.tensor(name, torch.float32)  # may be mapped: nothing is written into it
        for step in self._steps[name]:
            before, whole = whole, self._after(step, name, whole)
            if before.shape != whole.shape or not torch.equal(before, whole):
                self.moved.add(step.layer)
        return whole

    def _after(self, step: MergeStep, name: str, whole: Tensor) -> Tensor:
        """Tensor `name`, which is `whole` by now, after one more step: a weight, or a bias."""
        place = step.place
        beside = replace(place, transposed=False)
        bias = beside.of(self.file.tensor(place.bias)) if place.bias in self.layers.shapes else None
        if name == place.weight:
            return place.put(whole, step.merged(place.of(whole), bias)[0])
        found = step.merged(place.of(self.file.tensor(place.weight)), beside.of(whole))[1]
        assert found is not None
        return beside.put(whole, found)

    def _plan(self, adapter: Adapter) -> Iterator[str]:
        """Add the steps for an adapter's layers. Yields a line for each problem."""
        unknown: list[str] = []
        unfit: list[str] = []
        for name, own in adapter.layers.items():
            found = self.layers.placed(name)
            if found is None:
                unknown.append(name)
                continue
            layer, place = found
            if place is None:
                self.left.append(layer.kohya)
                continue
            steps = [self._step(name, layer.kohya, place, own, adapter) for own in pieces(own)]
            problems = [f"{name} {step}" for step in steps if isinstance(step, str)]
            unfit += problems[:1]
            if problems:
                continue
            self.used.append(layer.kohya)
            for step in steps:
                assert isinstance(step, MergeStep)
                for tensor in (place.weight, *([place.bias] if BIASED & set(step.own) else [])):
                    self._steps.setdefault(tensor, []).append(step)
        title = self.layers.architecture.title
        if unknown:
            yield f"{adapter.label}: {len(unknown)} layers are not in {title}: {first_names(unknown)}"
        elif unfit:
            yield f"{adapter.label}: {len(unfit)} layers do not fit the model: {first_names(unfit)}"

    def _step(self, name: str, layer: str, place: WeightLocation, own: Tensors, adapter: Adapter) -> MergeStep | str:
        """The step for a layer, or the reason why there is none."""
        reader = reader_of(name, own)
        if reader is None:
            return f"is of no kind that can be merged ({', '.join(sorted(own))})"
        axes = len(self.layers.shape_of(place))
        step = MergeStep(layer, place, fitted(own, axes), reader, adapter.strength(layer))
        return self._problem(step) or step

    def _problem(self, step: MergeStep) -> str | None:
        """Why a layer does not fit its weight, found without reading it."""
        weight = torch.empty(self.layers.shape_of(step.place), device="meta")
        bias = torch.empty(len(weight), device="meta") if step.place.bias in self.layers.shapes else None
        if (weight.dim() == 1) != ("w_norm" in step.own):
            return "is for another kind of layer"
        own = {DORA if name == COMFY_DORA else name: value for name, value in step.own.items()}  # no weight is needed
        try:
            replace(step, own=own).on(weight, bias)
        except UserError as error:
            return error.problems[0]
        except BROKEN as error:
            return f"does not fit ({str(error).splitlines()[0]})"
        return None


def target_of(name: str, weight: Tensor, bias: Tensor | None, parts: int = 0) -> TargetSpec:
    """A target on one module that holds `weight`: Linear, convolution or norm, by its axes.

    parts: how many pieces of a fused layer an adapter tells apart; 0: none.
    """
    module = module_of(weight, bias)
    if parts < 2:
        return TargetSpec(name, (TargetModule(name, module),), "denoiser")
    ends = [*itertools.accumulate(part_rows(len(weight), weight.shape[1], parts))]
    pieces = (TargetModule(name, module, slice(start, end)) for start, end in zip([0, *ends], ends))
    return TargetSpec(name, tuple(pieces), "denoiser")


def module_of(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A module that holds an existing weight and bias."""
    module: nn.Module
    with torch.device("meta"):
        if weight.dim() == 1:
            module = nn.LayerNorm(len(weight), bias=bias is not None)
        elif weight.dim() == 2:
            module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        else:
            kernel = (weight.shape[2], weight.shape[3])
            module = nn.Conv2d(weight.shape[1], weight.shape[0], kernel, bias=bias is not None)
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    if bias is not None:
        module.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
    return module


def fitted(own: Tensors, axes: int) -> dict[str, Tensor]:
    """A LoRA's matrices with the number of axes of the weight: a 1x1 convolution may be stored as a Linear."""
    found = dict(own)
    for name in (DOWN, UP, DORA, COMFY_DORA):
        value = found.get(name)
        if value is None or value.dim() == axes:
            continue
        if value.dim() == 4 and axes == 2 and value.shape[2:] == (1, 1):
            found[name] = value[:, :, 0, 0]
        elif value.dim() == 2 and axes == 4:
            found[name] = value[:, :, None, None]
    return found
