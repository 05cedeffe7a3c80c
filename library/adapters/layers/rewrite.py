# SPDX-License-Identifier: Apache-2.0
"""Adapters of LyCORIS that rewrite the weight they are on: full, IA3, GLoRA, diag-oft, BOFT. Read, never trained.

Their files can be merged and used as --base_weights; the formulas are in library/adapters/formats/deltas.py. A fused
layer is rewritten as the one published weight that it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.adapters.adapter_layer import add_scaled
from library.adapters.formats.deltas import GLORA, Rewrite, boft, diag_oft, full, glora, ia3, rewrite_of
from library.adapters.formats.layer_tensors import ALPHA, BIAS_ADDED
from library.adapters.layers.weight import WeightLayer, applied
from library.adapters.target_spec import TargetSpec

SUFFIXES: dict[Rewrite, set[str]] = {
    full: {"diff"},
    ia3: {"weight", "on_input"},
    glora: {*GLORA, "bm.weight", ALPHA},
    diag_oft: {"oft_blocks", "rescale", ALPHA},
    boft: {"oft_blocks", "rescale", ALPHA},
}


class RewriteLayer(WeightLayer):
    """The tensors of a file, unchanged. W' is a function of them and W; `diff_b` is added to the bias."""

    saved: ClassVar[tuple[str, ...]] = ()

    def __init__(self, target: TargetSpec, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(target)
        self.file = dict(tensors)
        self.rewrite = rewrite_of(tensors)
        self._whole: Tensor | None = None  # W' while it is written into the modules one by one

    @classmethod
    def claims(cls, names: set[str]) -> bool:
        return bool(names & {"diff", "a1.weight", "on_input", "oft_blocks"}) or names == {BIAS_ADDED}

    @classmethod
    def from_tensors(cls, target: TargetSpec, tensors: Mapping[str, Tensor], settings: Any) -> RewriteLayer:
        return cls(target, tensors)

    # ---- weights ---------------------------------------------------------------------------------------------------

    def rewritten(self) -> Tensor:
        """W' of the whole target at the multiplier, float32."""
        weight = self.target.weight.float()
        own = {name: value.to(weight.device) for name, value in self.file.items()}
        return weight if self.rewrite is None else self.rewrite(own, weight, self.multiplier)

    def merge(self, dtype: torch.dtype | None = None) -> None:
        self._whole = self.rewritten()
        super().merge(dtype)
        self._whole = None

    def merged_weight(self, index: int = 0) -> Tensor:
        whole = self.rewritten() if self._whole is None else self._whole
        return self.among_others(whole[self.target.own_rows(index)], index)

    def merged_bias(self, index: int = 0) -> Tensor | None:
        module = self.target.modules[index]
        if BIAS_ADDED not in self.file or not isinstance(module.module.bias, Tensor):
            return None
        bias = module.module.bias.detach().float().clone()
        bias[module.rows or slice(None)] += self.multiplier * self._bias(index).to(bias.device)
        return bias

    def _bias(self, index: int) -> Tensor:
        return self.file[BIAS_ADDED].float().flatten()[self.target.own_rows(index)]

    def delta_weight(self, index: int = 0) -> Tensor:
        return self.rewritten()[self.target.own_rows(index)] - self.base_weight(index).float()

    # ---- forward ---------------------------------------------------------------------------------------------------

    def change(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        return add_scaled(y, self.place(self.delta(x, index).to(y.dtype), index), 1.0)

    def delta(self, x: Tensor, index: int = 0) -> Tensor:
        """(W' - W) x at the multiplier, and the change of the bias."""
        found = applied(self.delta_weight(index).to(x.dtype), x, self.target.modules[index].module)
        if BIAS_ADDED not in self.file:
            return found
        bias = (self.multiplier * self._bias(index)).to(found)
        return found + (bias.reshape(-1, 1, 1) if self.is_conv else bias)

    # ---- files -----------------------------------------------------------------------------------------------------

    def named_tensors(self) -> dict[str, nn.Parameter]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.file)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.file = dict(tensors)

    def problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        known = {BIAS_ADDED, *(SUFFIXES[self.rewrite] if self.rewrite is not None else ())}
        foreign = sorted(set(tensors) - known)
        if foreign:
            return f"has an unknown tensor {foreign[0]}"
        rows, inputs, *_ = self._shape
        if BIAS_ADDED in tensors:
            if not all(isinstance(module.module.bias, Tensor) for module in self.target.modules):
                return f"has {BIAS_ADDED}, the layer has no bias"
            if tensors[BIAS_ADDED].numel() != rows:
                return f"{BIAS_ADDED} has {tensors[BIAS_ADDED].numel()} numbers, the layer has {rows} rows"
        wrong = next((line for line in self._unfit(tensors, rows, inputs)), None)
        return None if wrong is None else f"{wrong}, the layer has {rows} x {inputs}"

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.target.width, *self.target.modules[0].shape[1:])

    def _unfit(self, tensors: Mapping[str, Tensor], rows: int, inputs: int) -> list[str]:
        """Tensors that do not fit a layer of rows x inputs, as messages."""
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        told = [f"{name} has the shape {shape}" for name, shape in shapes.items()]
        count = rows * torch.Size(self._shape[1:]).numel()
        if self.rewrite is full:
            return told if tensors["diff"].numel() != count or len(tensors["diff"]) != rows else []
        if self.rewrite is ia3:
            if not set(tensors) >= SUFFIXES[ia3]:
                return ["has no weight"]
            return told if tensors["weight"].numel() != (inputs if int(tensors["on_input"]) else rows) else []
        if self.rewrite is glora:
            return _unfit_glora(tensors, rows, inputs, count // rows)
        if self.rewrite in (diag_oft, boft):
            return _unfit_rotation(tensors, rows)
        return []


def _unfit_glora(tensors: Mapping[str, Tensor], rows: int, inputs: int, columns: int) -> list[str]:
    """columns: inputs times the size of the kernel."""
    missing = [name for name in GLORA if name not in tensors]
    if missing:
        return [f"has no {missing[0]}"]
    a1, a2, b1, b2 = (tuple(tensors[name].shape[:2]) for name in GLORA)
    sizes = [tensors[name].numel() for name in GLORA]
    rank, kernel = len(tensors["a2.weight"]), tensors["bm.weight"].shape[2:].numel() if "bm.weight" in tensors else 1
    fits = a1 == (inputs, rank) and a2 == (rank, inputs) and b1 == (rows, rank) and b2 == (rank, inputs)
    fits = fits and sizes == [inputs * rank, inputs * rank, rows * rank, columns * rank // kernel]
    return [] if fits else [f"has matrices of {a1}, {a2}, {b1} and {b2}"]


def _unfit_rotation(tensors: Mapping[str, Tensor], rows: int) -> list[str]:
    shape = tuple(tensors["oft_blocks"].shape)
    square = len(shape) in (3, 4) and shape[-1] == shape[-2]
    if not square or shape[-3] * shape[-2] != rows or (len(shape) == 4 and shape[-1] % 2):
        return [f"oft_blocks has the shape {shape}"]
    if len(shape) == 4 and rows % (2 ** (shape[0] - 1) * shape[-1]):
        return [f"oft_blocks has the shape {shape}"]
    wrong = "rescale" in tensors and tensors["rescale"].numel() != rows
    return [f"rescale has {tensors['rescale'].numel()} numbers"] if wrong else []
