# SPDX-License-Identifier: Apache-2.0
"""Adapters that change the weight of Linear and Conv2d modules: W' = W + scale * ΔW, with or without DoRA.

DoRA (arXiv:2402.09353, eq. 5) learns the length m of each weight row apart from its direction:
W' = m * V / ‖V‖ with V = W + scale * ΔW. As in its section 4.3, ‖V‖ counts as a constant in the backward pass.
The multiplier moves between the two weights: W + multiplier * (W' - W).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.adapters.adapter_layer import AdapterLayer, add_scaled
from library.adapters.target_spec import TargetSpec
from library.errors import UserError


def applied(weight: Tensor, x: Tensor, like: nn.Module) -> Tensor:
    """`x` through `weight`, without a bias; a convolution has the stride, padding and dilation of `like`."""
    if isinstance(like, nn.Conv2d):
        return F.conv2d(x, weight, None, like.stride, like.padding, like.dilation)
    return F.linear(x, weight)


class WeightLayer(AdapterLayer):
    """An adapter that changes a weight. Subclasses implement `delta` and `delta_weight`; DoRA is implemented here.

    dora: None, or the axis that m runs along: "output" (rows; what nearly every program reads) or "input" (columns).
    """

    def __init__(self, target: TargetSpec, *, module_dropout: float = 0.0, dora: str | None = None):
        super().__init__(target, module_dropout=module_dropout)
        first = target.modules[0].module
        self.is_conv = isinstance(first, nn.Conv2d)
        if isinstance(first, nn.Conv2d) and (first.groups != 1 or first.padding_mode != "zeros"):
            raise ValueError(f"{target.name}: no adapter for grouped convolutions or padding other than zeros")
        self.dora = dora
        self.dora_scale = nn.Parameter(self._initial_magnitude()) if dora is not None else None

    @property
    def reads_weights(self) -> bool:
        return self.dora is not None

    @abstractmethod
    def delta_weight(self, index: int = 0) -> Tensor:
        """The float32 ΔW of module `index`'s rows, in the weight's shape, before scale and multiplier."""

    def base_weight(self, index: int = 0) -> Tensor:
        """The frozen weight's rows that belong to the target, as stored."""
        module = self.target.modules[index]
        assert isinstance(module.module.weight, Tensor)
        weight = module.module.weight.detach()
        return weight if module.rows is None else weight[module.rows]

    def adapted_weight(self, index: int = 0) -> Tensor:
        """W' of the target's rows at multiplier 1, float32."""
        weight = self.base_weight(index).float() + self.scale * self.delta_weight(index)
        return weight if self.dora is None else weight * self._ratio(index).float()

    def merged_weight(self, index: int = 0) -> Tensor:
        with torch.no_grad():
            own = torch.lerp(self.base_weight(index).float(), self.adapted_weight(index), self.multiplier)
            return self.among_others(own, index)

    def among_others(self, own: Tensor, index: int) -> Tensor:
        """The float32 weight of module `index` with the rows `own` in place of the target's."""
        module = self.target.modules[index]
        if module.rows is None:
            return own
        assert isinstance(module.module.weight, Tensor)
        whole = module.module.weight.detach().float()
        return torch.cat([whole[: module.rows.start], own, whole[module.rows.stop :]])

    def without_bias(self, y: Tensor, index: int) -> Tensor:
        """The target's rows in the output `y` of module `index`, minus its bias."""
        module = self.target.modules[index]
        rows, bias = module.rows or slice(None), module.module.bias
        plain = y[:, rows] if self.is_conv else y[..., rows]
        if not isinstance(bias, Tensor):
            return plain
        return plain - bias.detach()[rows].reshape(-1, *[1] * (2 * self.is_conv)).to(y.dtype)

    # ---- DoRA ------------------------------------------------------------------------------------------------------

    def change(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        if self.dora is None:
            return super().change(x, y, index)
        change = self._row_change(x, y, index) if self.dora == "output" else self._column_change(x, index)
        return add_scaled(y, self.place(self.gate(change).to(y.dtype), index), self.multiplier)

    def _row_change(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        """(W' - W) x from the module's output y: with r = m/‖V‖, r (y - b + delta) - (y - b)."""
        ratio = self._ratio(index).reshape(-1, *[1] * (2 * self.is_conv))
        delta = self.delta(x, index).to(y.dtype) * self.scale
        return self.without_bias(y, index) * (ratio - 1).to(y.dtype) + delta * ratio.to(y.dtype)

    def _column_change(self, x: Tensor, index: int) -> Tensor:
        """(W' - W) x where m scales columns: W ((r - 1) x) + delta(r x), which takes a second product with W."""
        ratio = self._ratio(index).reshape(-1, *[1] * (2 * self.is_conv)).to(x.dtype)
        weight = self.base_weight(index).to(x.dtype)
        plain = applied(weight, x * (ratio - 1), self.target.modules[index].module)
        return plain + self.delta(x * ratio, index) * self.scale

    def _ratio(self, index: int) -> Tensor:
        """m / ‖V‖ shaped to multiply the weight; the gradient flows through m only."""
        assert self.dora_scale is not None
        magnitude: Tensor = self.dora_scale
        if self.dora == "output":
            magnitude = magnitude[self.target.own_rows(index)]
        with torch.no_grad(), torch.autocast(magnitude.device.type, enabled=False):
            norms = self.weight_norms(index).clamp_min(torch.finfo(torch.float32).eps)
        return magnitude / norms.reshape(magnitude.shape)

    def weight_norms(self, index: int) -> Tensor:
        """‖V‖ along the DoRA axis, flat, float32."""
        return self._norms(self.base_weight(index).float() + self.scale * self.delta_weight(index))

    def _norms(self, weight: Tensor) -> Tensor:
        flat = weight.transpose(0, 1).flatten(1) if self.dora == "input" else weight.flatten(1)
        return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32)

    def _initial_magnitude(self) -> Tensor:
        """‖W‖, so that training starts at the base model: rows of all modules in order, or columns of one module."""
        indices = range(len(self.target.modules))
        if self.dora == "input" and len(indices) > 1:
            raise UserError(f"{self.target.name}: DoRA over input columns is not possible, it is {len(indices)} pieces")
        norms = torch.cat([self._norms(self.base_weight(index)) for index in indices])
        ones = [1] * (len(self.target.modules[0].shape) - 1)
        norms = norms.reshape(-1, *ones) if self.dora == "output" else norms.reshape(1, -1, *ones[1:])
        return norms if norms.is_meta else norms.cpu()
