# SPDX-License-Identifier: Apache-2.0
"""Between a file's tensors and a model whose Linears are quantised: each is made small as soon as it is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.key_tables import TRANSPOSE, Rule, Shapes, read_parts
from library.memory.quantise import QuantisedWeight, QuantKind, QuantLinear, check_available, quantised, replace_linears
from library.weights.weight_files import WeightFile


class Quantiser:
    """Puts empty QuantLinears into an empty module, and gives the tensors that they wait for.

    dtype: of the computation; None: as the file has each weight.
    """

    def __init__(self, module: nn.Module, kind: QuantKind, dtype: torch.dtype | None) -> None:
        check_available(kind)
        self.kind, self.dtype = kind, dtype
        make = lambda linear: QuantLinear.empty(linear, kind, dtype or torch.float32)
        self.layers = {f"{name}.weight": layer for name, layer in replace_linears(module, make).items()}

    @property
    def weights(self) -> set[str]:
        """Names of the weights that are quantised."""
        return set(self.layers)

    def keep(self, own: str, tensor: Tensor) -> dict[str, Tensor]:
        """What is kept of one of our tensors, by its names in the module."""
        if own not in self.layers:
            return {own: tensor}
        if self.dtype is None:
            self.layers[own].dtype = tensor.dtype
        return _named(own, quantised(tensor, self.kind))

    def take_stored(
        self, file: WeightFile, rules: Sequence[Rule], shapes: Shapes, prefix: str, device: torch.device | str
    ) -> tuple[dict[str, Tensor], list[Rule]]:
        """For "fp8": what the file has in fp8 already, byte for byte; and the rules of all the rest."""
        tensors: dict[str, Tensor] = {}
        rest = []
        for rule in rules:
            parts = None
            if self.kind == "fp8" and file.is_float8 and self.weights.issuperset(rule.ours):
                parts = _stored_parts(file, rule, shapes, prefix + rule.published, device)
            if parts is None:
                rest.append(rule)
            else:
                tensors |= parts
        return tensors, rest


def _stored_parts(
    file: WeightFile, rule: Rule, shapes: Shapes, name: str, device: torch.device | str
) -> dict[str, Tensor] | None:
    """An fp8 matrix of the file and its scales, as QuantLinears keep them; None where it is none, or does not fit."""
    found = file.stored(name, device) if name in file.shapes and rule.op is not TRANSPOSE else None
    if found is None:
        return None
    data, scale = found
    # moved as bytes: not every operation knows fp8. Scales belong to rows, as a bias does
    parts = read_parts(data.view(torch.uint8), rule, shapes)
    scale_rule = rule if rule.op.of_bias else Rule(rule.published, rule.ours)
    scales = read_parts(scale, scale_rule, {own: shapes[own][:1] for own in rule.ours})
    if parts is None or scales is None:
        return None
    named = (_named(own, QuantisedWeight(parts[own].view(data.dtype), scales[own])) for own in rule.ours)
    return {name: tensor for tensors in named for name, tensor in tensors.items()}


def _named(weight: str, stored: QuantisedWeight) -> dict[str, Tensor]:
    """The tensors of a QuantLinear under its names for them. weight: the name that its weight would have."""
    name = weight.removesuffix(".weight")
    found = {f"{name}.stored": stored.data, f"{name}.scale": stored.scale}
    return found if stored.code is None else {**found, f"{name}.code": stored.code}
