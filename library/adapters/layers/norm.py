# SPDX-License-Identifier: Apache-2.0
"""Changes of the scale and shift of LayerNorm and GroupNorm (train_norm): tensors `w_norm` and `b_norm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.target_spec import TargetSpec


class NormLayer(AdapterLayer):
    """Norm(x) with weight + w_norm and bias + b_norm. Linear in both, so the change is Norm(x; w_norm, b_norm)."""

    marks: ClassVar[set[str]] = {"w_norm"}
    saved: ClassVar[tuple[str, ...]] = ("w_norm", "b_norm")

    def __init__(self, target: TargetSpec, *, module_dropout: float = 0.0):
        super().__init__(target, module_dropout=module_dropout)
        module = self._module()
        self.w_norm = nn.Parameter(torch.zeros(target.width))
        self.b_norm = nn.Parameter(torch.zeros(target.width)) if module.bias is not None else None

    @classmethod
    def from_tensors(cls, target: TargetSpec, tensors: Mapping[str, Tensor], settings: Any) -> NormLayer:
        return cls(target, module_dropout=settings.module_dropout)

    def _module(self) -> nn.LayerNorm | nn.GroupNorm:
        module = self.target.modules[0].module
        assert isinstance(module, (nn.LayerNorm, nn.GroupNorm))
        return module

    @property
    def reads_weights(self) -> bool:
        return False

    def delta(self, x: Tensor, index: int = 0) -> Tensor:
        module = self._module()
        weight = self.w_norm.to(x.dtype)
        bias = None if self.b_norm is None else self.b_norm.to(x.dtype)
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
        # torch 2.13 on the CPU crashes in the backward pass of a channels-last input that needs no gradient
        return F.group_norm(x.contiguous(), module.num_groups, weight, bias, module.eps)

    def merged_weight(self, index: int = 0) -> Tensor:
        return self._module().weight.detach().float() + self.multiplier * self.w_norm.detach().float()

    def merged_bias(self, index: int = 0) -> Tensor | None:
        if self.b_norm is None:
            return None
        return self._module().bias.detach().float() + self.multiplier * self.b_norm.detach().float()

    def named_tensors(self) -> dict[str, nn.Parameter]:
        return {"w_norm": self.w_norm} | ({} if self.b_norm is None else {"b_norm": self.b_norm})
