# SPDX-License-Identifier: Apache-2.0
"""Our models as kohya-ss/sd-scripts builds them, for third-party networks: its classes, its paths, our weights.

    models = published_models(AdaptedModels(text_encoders, unet), families)
    create_network(1.0, 4, 1.0, None, models.encoders, models.denoiser)  # finds double_blocks.0.img_attn.qkv

A tree of empty modules stands for a model. Its leaves are our own layers, or a `FusedLinear` where a published layer is
several modules of ours. A network replaces the `forward` of leaves, or hooks them; the tree itself is never called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.adapters.foreign.published_classes import ENCODER_CLASSES, ClassNames
from library.adapters.shared_call import SharedCall
from library.adapters.target_spec import ReachedLayer, TargetSpec
from library.adapters.targets import AdaptedModels, AnyFamily
from library.errors import UserError, first_names

LAYERS = (nn.Linear, nn.Conv2d)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


class FusedLinear(nn.Linear):
    """A published Linear that is several of our modules, or one with its rows in another order.

    Its weight and bias are theirs, concatenated at each use; assigning one writes theirs. It stores no weights itself.
    """

    def __init__(self, target: TargetSpec):
        nn.Module.__init__(self)
        self.target = target
        self.own = tuple({id(m.module): m.module for m in target.modules}.values())
        self.originals: tuple[Callable[[Tensor], Tensor], ...] = tuple(module.forward for module in self.own)
        self.in_features, self.out_features = target.modules[0].shape[1], target.width
        self.shared = SharedCall(len(self.own))

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias") and name not in self._parameters:
            return self._joined(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            self._write(name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Ignore that a network removes the weight that it replaces: ours stays, unused."""
        if name not in ("weight", "bias"):
            super().__delattr__(name)

    def _joined(self, name: str) -> Tensor | None:
        if name == "weight":
            return self.target.weight
        if all(m.module.bias is None for m in self.target.modules):
            return None
        parts = []
        for module in self.target.modules:
            bias, weight = module.module.bias, module.module.weight
            assert isinstance(weight, Tensor)
            own = bias.detach() if isinstance(bias, Tensor) else weight.new_zeros(module.full_width)
            parts.append(own if module.rows is None else own[module.rows])
        return torch.cat(parts)

    @torch.no_grad()
    def _write(self, name: str, value: Tensor | None) -> None:
        if value is None:
            return
        for index, module in enumerate(self.target.modules):
            rows, part = module.rows or slice(None), value[self.target.own_rows(index)]
            own = module.module.weight if name == "weight" else module.module.bias
            if own is None:
                assert isinstance(module.module.weight, Tensor)
                own = nn.Parameter(module.module.weight.new_zeros(module.full_width), requires_grad=False)
                module.module.bias = own
            assert isinstance(own, nn.Parameter), "nothing can be written into quantised weights"
            own[rows] = part.to(own.dtype)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context in which weight and bias are parameters that may be written in place; ours get them afterwards."""
        for name in ("weight", "bias"):
            value = self._joined(name)
            if value is not None:
                self._parameters[name] = nn.Parameter(value, requires_grad=False)
        yield
        for name in [*self._parameters]:
            value = self._parameters.pop(name)
            self._write(name, value)

    # ---- at work ---------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Make our modules return their rows of this layer's output."""
        for index, module in enumerate(self.own):
            module.forward = partial(self._rows, index)

    def part(self) -> None:
        """Undo `join`."""
        for module, original in zip(self.own, self.originals, strict=True):
            module.__dict__.pop("forward", None)
            if getattr(original, "__self__", None) is not module:  # it had been replaced before
                module.forward = original

    def forward(self, x: Tensor) -> Tensor:
        """The published layer itself, as it is before a network replaces this method."""
        outputs = {id(module): forward(x) for module, forward in zip(self.own, self.originals, strict=True)}
        return torch.cat([outputs[id(m.module)][..., m.rows or slice(None)] for m in self.target.modules], -1)

    def _rows(self, number: int, x: Tensor) -> Tensor:
        """The output of our module `number`. The first one that is called computes the whole layer."""
        self.shared.enter(x, number)
        try:
            y = self.shared.value("output", lambda: self(x))
        except BaseException:  # recomputation stops in the middle of a layer, as soon as it has what it needs
            self.shared.forget()
            raise
        self.shared.leave()
        pieces = [(m.rows, self.target.own_rows(i)) for i, m in enumerate(self.target.modules)
                  if m.module is self.own[number]]  # fmt: skip
        if len(pieces) == 1:
            return y[..., pieces[0][1]]
        pieces.sort(key=lambda piece: piece[0].start if piece[0] is not None else 0)
        return torch.cat([y[..., own] for _, own in pieces], -1)


# Networks tell a plain layer from a quantised one by the name of its class
PLAIN_LINEAR = type("Linear", (FusedLinear,), {})


class GivenModel:
    """A model of an unknown class, which networks get as it is."""

    fused: Sequence[FusedLinear] = ()
    prefix = ""  # of its adapters' names: "lora_te2_"; not known

    def __init__(self, model: nn.Module):
        self.model: nn.Module | None = model
        self.tree = model
        self._before = _marks(model)

    def changed(self) -> list[ReachedLayer]:
        """Every Linear and convolution, and whether the network changed it or a part that it is in."""
        now = _marks(self.tree)
        touched = {name for name in now if now[name] != self._before.get(name)}
        return [
            ReachedLayer((module,), any(".".join(steps[:n]) in touched for n in range(len(steps) + 1)))
            for name, module in self.tree.named_modules()
            for steps in [name.split(".")]
            if isinstance(module, LAYERS)
        ]

    def join(self) -> None:
        """Nothing to do: the model itself is called."""

    def part(self) -> None:
        """Nothing to do: the model itself is called."""


class PublishedModel(GivenModel):
    """A known model (None: one that gets no adapters) and the tree that stands for it."""

    def __init__(self, model: nn.Module | None, targets: Sequence[TargetSpec], names: ClassNames, *, stand_ins: bool):
        self.model = model
        leaves = {target.path: _leaf(target) for target in targets}
        self.fused = [leaf for leaf in leaves.values() if isinstance(leaf, FusedLinear)]
        self.prefix = "_".join([*targets[0].name.split("_")[:2], ""]) if targets else ""
        self.leaves = [(leaves[t.path], tuple(m.module for m in t.modules)) for t in targets]
        self.tree = _tree(leaves, names.root, names.parts(leaves, stand_ins=stand_ins))
        self._before = _marks(self.tree)

    def changed(self) -> list[ReachedLayer]:
        """Every Linear and convolution, and whether the network changed it.

        Raises UserError when it changed a part that is never called.
        """
        now = _marks(self.tree)
        touched = {name for name in self._before if now.get(name) != self._before[name]}
        paths = {id(module): name for name, module in self.tree.named_modules(remove_duplicate=False)}
        own = {paths[id(leaf)] for leaf, _ in self.leaves if id(leaf) in paths}
        lost = sorted((touched | (self._before.keys() ^ now.keys())) - own)
        if lost:
            names = first_names([name or "the model itself" for name in lost])
            raise UserError(f"it replaces or hooks other parts than layers, which is not possible here: {names}")
        return [
            ReachedLayer(modules, paths[id(leaf)] in touched)
            for leaf, modules in self.leaves
            if isinstance(leaf, LAYERS)
        ]

    def join(self) -> None:
        """Activate the changed layers that are several modules of ours."""
        now = _marks(self.tree)
        for name, module in self.tree.named_modules():
            if isinstance(module, FusedLinear) and now[name] != self._before[name]:
                module.join()

    def part(self) -> None:
        for leaf in self.fused:
            leaf.part()


def _leaf(target: TargetSpec) -> nn.Module:
    first = target.modules[0]
    if len(target.modules) == 1 and first.rows is None:
        return first.module
    leaf = PLAIN_LINEAR(target)
    assert isinstance(leaf, FusedLinear)
    return leaf.train(first.module.training)


def _tree(leaves: Mapping[str, nn.Module], root: str, classes: Mapping[str, str]) -> nn.Module:
    """Modules of these class names (others are plain) with the leaves at their paths."""
    made: dict[str, nn.Module] = {"": type(root, (nn.Module,), {})()}
    for path, leaf in leaves.items():
        steps = path.split(".")
        for depth in range(1, len(steps)):
            name = ".".join(steps[:depth])
            if name not in made:
                made[name] = type(classes.get(name, "Part"), (nn.Module,), {})()
                made[".".join(steps[: depth - 1])].add_module(steps[depth - 1], made[name])
        made[".".join(steps[:-1])].add_module(steps[-1], leaf)
    return made[""]


def _marks(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Path of each part -> what changes when a network replaces or hooks it."""
    return {
        name: (id(module), module.__dict__.get("forward"), *(tuple(module.__dict__.get(hooks, ())) for hooks in HOOKS))
        for name, module in model.named_modules(remove_duplicate=False)
    }


@dataclass(frozen=True)
class PublishedModels:
    """The models of a run for a third-party network."""

    denoiser: GivenModel | None
    encoders: tuple[GivenModel, ...]  # in the places that their adapters' names have
    places: tuple[int | None, ...]  # of the encoders among the learning rates; None: gets no adapters
    numbered: bool  # lora_te1, lora_te2; else lora_te alone

    @property
    def all(self) -> tuple[GivenModel, ...]:
        return (*self.encoders, *(() if self.denoiser is None else (self.denoiser,)))

    @property
    def by_place(self) -> dict[int | None, GivenModel]:
        """Place of a text encoder, or None for the denoiser -> the model."""
        found: dict[int | None, GivenModel] = {}
        found |= {place: model for place, model in zip(self.places, self.encoders, strict=True) if place is not None}
        return found if self.denoiser is None else found | {None: self.denoiser}

    @property
    def unet(self) -> nn.Module | None:
        return None if self.denoiser is None else self.denoiser.tree

    @property
    def text_encoder(self) -> nn.Module | list[nn.Module] | None:
        trees = [encoder.tree for encoder in self.encoders]
        return None if not trees else trees if self.numbered else trees[0]


def published_models(
    models: AdaptedModels, families: AnyFamily, stand_ins: Collection[int | None] = ()
) -> PublishedModels:
    """The models as networks written for sd-scripts expect them. Models of unknown classes are given as they are.

    stand_ins: places of the text encoders (None: the denoiser) whose parts have their second class names.
    """
    given, unet = models.encoders, models.denoiser
    unknown = [model for model in given if model is not None and type(model).__name__ not in ENCODER_CLASSES]
    if unknown or (unet is not None and not families.knows(unet)):
        return _as_they_are(given, unet)
    family = families.of(models)
    targets = family.every(models, outside=False)
    denoiser = None
    if unet is not None:
        own = [target for target in targets if target.part == "denoiser"]
        denoiser = PublishedModel(unet, own, family.class_names, stand_ins=None in stand_ins)
    encoders, places, numbered = _encoders(given, targets, stand_ins)
    return PublishedModels(denoiser, encoders, places, numbered)


def _encoders(
    given: Sequence[nn.Module | None], targets: Sequence[TargetSpec], stand_ins: Collection[int | None]
) -> tuple[tuple[GivenModel, ...], tuple[int | None, ...], bool]:
    """The text encoders in the order of the numbers in their adapters' names, with empty models for missing numbers."""
    slots: dict[int, tuple[int | None, GivenModel]] = {}
    numbered = False
    for place, encoder in enumerate(given):
        if encoder is None:
            continue
        own = [t for t in targets if t.part == "text_encoder" and t.encoder == place]
        number = own[0].name.split("_")[1].removeprefix("te")
        numbered = numbered or bool(number)
        names = ENCODER_CLASSES[type(encoder).__name__]
        slots[int(number or 1)] = (place, PublishedModel(encoder, own, names, stand_ins=place in stand_ins))
    empty = (None, PublishedModel(None, (), ClassNames("NoModel", ()), stand_ins=False))
    filled = [slots.get(number, empty) for number in range(1, max(slots, default=0) + 1)]
    return tuple(model for _, model in filled), tuple(place for place, _ in filled), numbered


def _as_they_are(given: Sequence[nn.Module | None], unet: nn.Module | None) -> PublishedModels:
    """The models unchanged: one text encoder alone, several as a list."""
    encoders = {place: GivenModel(encoder) for place, encoder in enumerate(given) if encoder is not None}
    denoiser = None if unet is None else GivenModel(unet)
    return PublishedModels(denoiser, tuple(encoders.values()), tuple(encoders), len(encoders) > 1)
