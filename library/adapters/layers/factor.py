# SPDX-License-Identifier: Apache-2.0
"""Base class of LoHa and LoKr: a change that is a product of several factors, with the names of LyCORIS.

The scale is alpha / rank (rs_lora: alpha / sqrt(rank), saved as alpha * sqrt(rank)). use_scalar: a learned number that
starts at 0, multiplied into the first factor of the file. rank_dropout drops rows of ΔW in training, as in LyCORIS;
with rank_dropout_scale the others grow by as much as is lost.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.adapters.formats.layer_tensors import dora_axis
from library.adapters.layers.weight import WeightLayer
from library.adapters.options import warn_dropout
from library.adapters.target_spec import TargetSpec
from library.options import option


@dataclass(frozen=True)
class FactorOptions:
    """How a LoHa or LoKr layer is built and what it drops, besides `DropoutOptions`."""

    use_tucker: bool = option(False, help="3x3 convolutions in Tucker form, the kernel apart from the columns.")
    use_scalar: bool = option(False, help="A learned factor that starts at 0, instead of a matrix of zeros.")
    dora_wd: bool = option(False, help="DoRA: learn the length of the weight's rows apart from their direction.")
    wd_on_output: bool = option(True, help="DoRA over output rows; false: over input columns, which few programs read.")
    rs_lora: bool = option(False, help="Scale by alpha / sqrt(rank) instead of alpha / rank.")
    rank_dropout_scale: bool = option(False, help="Where rank_dropout drops rows, the others grow by what is lost.")

    @property
    def form(self) -> list[str]:
        """The options given that decide which tensors a file has."""
        return [name for name in ("use_tucker", "use_scalar", "dora_wd", "rs_lora") if getattr(self, name)]

    def problems(self) -> Iterator[str]:
        if not self.wd_on_output and not self.dora_wd:
            yield "wd_on_output has no effect without dora_wd"


@dataclass(frozen=True)
class FactorSettings:
    """How a LoHa or LoKr layer is built and what it drops in training."""

    tucker: bool = False
    scalar: bool = False
    dora: str | None = None
    rs_lora: bool = False
    rank_dropout: float = 0.0
    rank_dropout_scale: bool = False
    module_dropout: float = 0.0


class FactorLayer(WeightLayer):
    """A WeightLayer with a rank, alpha and factors. The subclass creates the factors and multiplies them."""

    first: ClassVar[tuple[str, ...]]  # factors that may carry the learned number in a file: the first that is there

    def __init__(self, target: TargetSpec, *, rank: int, alpha: float, settings: FactorSettings):
        super().__init__(target, module_dropout=settings.module_dropout, dora=settings.dora)
        self.rank, self.settings = rank, settings
        # rounded as the file rounds it: a network read back from its file has exactly the same scale
        self.alpha = torch.tensor((alpha or rank) * (math.sqrt(rank) if settings.rs_lora else 1.0)).item()
        self.scale = self.alpha / rank
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
        ratio = max_norm / norm.clamp_min(max_norm)
        shared = [*self.factors().values()]
        for factor in shared:
            factor.mul_((ratio ** (1 / len(shared))).to(factor.dtype))
        return norm * ratio, norm > max_norm

    # ---- files -----------------------------------------------------------------------------------------------------

    def named_tensors(self) -> dict[str, nn.Parameter]:
        magnitude = {} if self.dora_scale is None else {"dora_scale": self.dora_scale}
        return magnitude | self.factors()

    def tensors(self) -> dict[str, Tensor]:
        own = super().tensors()
        if self.scalar is not None:
            name = next(name for name in self.first if name in own)
            own[name] = own[name] * self.scalar.detach()
        return {"alpha": torch.tensor(self.alpha), **own}

    def problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        if "dora_scale" in tensors and self.dora is None:
            return "is a DoRA (dora_scale), this network is not (--network_args dora_wd=True)"
        return super().problem(tensors)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a file. The learned scalar is inside its first factor, ours becomes 1; without alpha the scale is 1."""
        super().load_tensors(tensors)
        self.alpha = float(tensors["alpha"]) if "alpha" in tensors else float(self.rank)
        self.scale = self.alpha / self.rank
        if self.scalar is not None:
            with torch.no_grad():
                self.scalar.fill_(1.0)


def axis_in(tensors: Mapping[str, Tensor]) -> str | None:
    """The axis of the DoRA magnitudes in a file; None without magnitudes."""
    return dora_axis(tensors["dora_scale"]) if "dora_scale" in tensors else None


def factor_values(options: Mapping[str, Any], module: str, neuron_dropout: float | None) -> dict[str, Any]:
    """The fields of `FactorSettings`, from the options of the network module."""
    layer, dropout = options["layer"], options["dropout"]
    warn_dropout(module, neuron_dropout, dropout.dropout)
    return {
        "tucker": layer.use_tucker,
        "scalar": layer.use_scalar,
        "dora": ("output" if layer.wd_on_output else "input") if layer.dora_wd else None,
        "rs_lora": layer.rs_lora,
        "rank_dropout": dropout.rank_dropout or 0.0,
        "rank_dropout_scale": layer.rank_dropout_scale,
        "module_dropout": dropout.module_dropout or 0.0,
    }
