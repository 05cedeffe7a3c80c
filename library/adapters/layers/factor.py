# SPDX-License-Identifier: Apache-2.0
"""Base class of LoHa and LoKr: a change that is a product of several factors, with the names of LyCORIS.

The scale is alpha / rank (rs_lora: alpha / sqrt(rank), saved as alpha * sqrt(rank)). use_scalar: a learned number that
starts at 0, multiplied into the first factor of the file. rank_dropout drops rows of ΔW in training, as in LyCORIS;
with rank_dropout_scale the others grow by as much as is lost.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.adapters.layers.ranked import RankedLayer, RankedOptions, RankedSettings, ranked_values
from library.adapters.options import warn_dropout
from library.adapters.target_spec import TargetSpec
from library.options import option


@dataclass(frozen=True)
class FactorOptions(RankedOptions):
    """How a LoHa or LoKr layer is built and what it drops, besides `DropoutOptions`."""

    rank_dropout_scale: bool = option(False, help="Where rank_dropout drops rows, the others grow by what is lost.")


@dataclass(frozen=True)
class FactorSettings(RankedSettings):
    """How a LoHa or LoKr layer is built and what it drops in training."""

    rank_dropout_scale: bool = False


class FactorLayer(RankedLayer):
    """A RankedLayer with factors. The subclass creates the factors and multiplies them."""

    def __init__(self, target: TargetSpec, *, rank: int, alpha: float, settings: FactorSettings):
        super().__init__(target, rank=rank, alpha=alpha, settings=settings)
        self.settings = settings
        _, self.inputs, *kernel = target.modules[0].shape
        self.kernel = tuple(kernel)  # (kh, kw) of a convolution, () of Linear
        self.tucker = settings.tucker and any(size != 1 for size in self.kernel)
        self.scalar = nn.Parameter(torch.zeros(())) if settings.scalar else None

    @abstractmethod
    def factors(self) -> dict[str, nn.Parameter]:
        """Saved suffix -> factor, in the order of the file."""

    @abstractmethod
    def whole_norm(self) -> Tensor:
        """‖ΔW‖ of all modules together (Frobenius, float32), before the scale."""

    # ---- at work ---------------------------------------------------------------------------------------------------

    def factored(self, delta: Tensor) -> Tensor:
        """`delta` times the learned scalar, if there is one."""
        return delta if self.scalar is None else delta * self.scalar.to(delta.dtype)

    def drop_rows(self, delta: Tensor, index: int) -> Tensor:
        """Rank dropout: in training, random rows of the output are 0, the same ones for a whole pass."""
        rate = self.settings.rank_dropout
        if not (self.training and rate):
            return delta
        kept = self.shared.value("rows", lambda: self._kept(rate, delta.device))[self.target.own_rows(index)]
        return delta * kept.to(delta.dtype).reshape(-1, *[1] * (2 * self.is_conv))

    def _kept(self, rate: float, device: torch.device) -> Tensor:
        kept = (torch.rand(self.target.width, device=device) >= rate).float()
        return kept / kept.mean().clamp_min(1 / len(kept)) if self.settings.rank_dropout_scale else kept

    @torch.no_grad()
    def limit_norm(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Scale the change down to `max_norm`; all factors take an equal share of the ratio."""
        scalar = 1.0 if self.scalar is None else self.scalar.abs().float()
        norm = self.whole_norm() * self.scale * scalar
        factors = [*self.factors().values()]
        return self.shrink(factors, norm, max_norm, count=len(factors))

    # ---- files -----------------------------------------------------------------------------------------------------

    def named_tensors(self) -> dict[str, nn.Parameter]:
        magnitude = {} if self.dora_scale is None else {"dora_scale": self.dora_scale}
        return magnitude | self.factors()


def factor_values(options: Mapping[str, Any], module: str, neuron_dropout: float | None) -> dict[str, Any]:
    """The fields of `FactorSettings`, from the options of the network module."""
    warn_dropout(module, neuron_dropout, options["dropout"].dropout)
    return {**ranked_values(options), "rank_dropout_scale": options["layer"].rank_dropout_scale}
