# SPDX-License-Identifier: Apache-2.0
"""New input channels of a convolution, trained whole beside the adapters of a network.

Files hold the change of the whole weight, as LyCORIS' full training names it: `diff`, zero for the other channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.layers.weight import applied
from library.adapters.target_spec import TargetSpec
from library.weights.grown_input import GrownConv2d


class NewInputsLayer(AdapterLayer):
    """W' = W + [0, new]. `new`: rows x new channels x kernel."""

    marks: ClassVar[set[str]] = {"diff"}
    saved: ClassVar[tuple[str, ...]] = ("diff",)

    def __init__(self, target: TargetSpec) -> None:
        super().__init__(target)
        module = target.modules[0].module
        assert isinstance(module, GrownConv2d)
        self.first = module.first  # input channels that stay as they are
        shape = target.modules[0].shape
        self.new = nn.Parameter(torch.zeros(shape[0], shape[1] - self.first, *shape[2:]))

    @classmethod
    def from_tensors(cls, target: TargetSpec, tensors: Mapping[str, Tensor], settings: Any) -> NewInputsLayer:
        if not isinstance(target.modules[0].module, GrownConv2d):
            raise ValueError("only new input channels are trained whole")
        return cls(target)

    @property
    def reads_weights(self) -> bool:
        return False

    def delta(self, x: Tensor, index: int = 0) -> Tensor:
        return applied(self.new.to(x.dtype), x[:, self.first :], self.target.modules[0].module)

    def merged_weight(self, index: int = 0) -> Tensor:
        weight = self.target.weight.detach().float()
        return weight + self.multiplier * self._diff().to(weight.device)

    def _diff(self) -> Tensor:
        """The change of the whole weight."""
        new = self.new.detach().float()
        return torch.cat([new.new_zeros(len(new), self.first, *new.shape[2:]), new], 1)

    # ---- files -----------------------------------------------------------------------------------------------------

    def named_tensors(self) -> dict[str, nn.Parameter]:
        return {"new": self.new}

    def tensors(self) -> dict[str, Tensor]:
        return {"diff": self._diff()}

    def problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        found = super().problem(tensors)
        if found is None and bool(tensors["diff"][:, : self.first].any()):
            return "changes input channels that are not new: use the file as --base_weights"
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.new.copy_(tensors["diff"][:, self.first :])
