# SPDX-License-Identifier: Apache-2.0
"""Base class of adapters with a rank and an alpha: LoRA, DyLoRA, LoHa and LoKr.

The scale is alpha / rank. rs_lora (arXiv:2312.03732) scales by alpha / sqrt(rank); since readers divide by the rank,
the file holds alpha * sqrt(rank). use_scalar: a learned number that starts at 0 and is multiplied into one matrix of
the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.adapters.formats.layer_tensors import dora_axis
from library.adapters.layers.weight import WeightLayer
from library.adapters.target_spec import TargetSpec
from library.options import option


@dataclass(frozen=True)
class RankedOptions:
    """How a layer is built."""

    use_tucker: bool = option(False, help="3x3 convolutions in Tucker form, the kernel apart from the columns.")
    use_scalar: bool = option(False, help="A learned factor that starts at 0, instead of a matrix of zeros.")
    dora_wd: bool = option(False, help="DoRA: learn the length of the weight's rows apart from their direction.")
    wd_on_output: bool = option(True, help="DoRA over output rows; false: over input columns, which few programs read.")
    rs_lora: bool = option(False, help="Scale by alpha / sqrt(rank) instead of alpha / rank.")

    @property
    def form(self) -> list[str]:
        """The options given that decide which tensors a file has."""
        return [name for name in ("use_tucker", "use_scalar", "dora_wd", "rs_lora") if getattr(self, name)]

    def problems(self) -> Iterator[str]:
        if not self.wd_on_output and not self.dora_wd:
            yield "wd_on_output has no effect without dora_wd"


@dataclass(frozen=True)
class RankedSettings:
    """How a layer is built and what it drops in training."""

    tucker: bool = False
    scalar: bool = False
    dora: str | None = None
    rs_lora: bool = False
    rank_dropout: float = 0.0
    module_dropout: float = 0.0


def ranked_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `RankedSettings`, from the options of a network module."""
    layer, dropout = options["layer"], options["dropout"]
    return {
        "tucker": layer.use_tucker,
        "scalar": layer.use_scalar,
        "dora": ("output" if layer.wd_on_output else "input") if layer.dora_wd else None,
        "rs_lora": layer.rs_lora,
        "rank_dropout": dropout.rank_dropout or 0.0,
        "module_dropout": dropout.module_dropout or 0.0,
    }


class RankedLayer(WeightLayer):
    """A WeightLayer with a rank, an alpha and perhaps a learned scalar, which the subclass creates in its place."""

    first: ClassVar[tuple[str, ...]]  # tensors that may carry the learned scalar in a file: the first that is there
    length_is_rank: ClassVar[str | None] = None  # a tensor of the file with as many rows as the rank

    def __init__(self, target: TargetSpec, *, rank: int, alpha: float, settings: RankedSettings):
        super().__init__(target, module_dropout=settings.module_dropout, dora=settings.dora)
        self.rank = rank
        # rounded as the file rounds it: a network read back from its file has exactly the same scale
        self.alpha = torch.tensor((alpha or rank) * (math.sqrt(rank) if settings.rs_lora else 1.0)).item()
        self.scale = self.alpha / rank
        self.scalar: nn.Parameter | None = None

    def shrink(self, factors: Sequence[Tensor], norm: Tensor, max_norm: float, *, count: int) -> tuple[Tensor, Tensor]:
        """Scale the `count` matrices that ΔW is a product of, all alike, so that its norm is at most `max_norm`.

        factors: these matrices, or the blocks that they are made of. norm: ‖scale · ΔW‖. Returns as `limit_norm`.
        """
        ratio = max_norm / norm.clamp_min(max_norm)
        for factor in factors:
            factor.mul_((ratio ** (1 / count)).to(factor.dtype))
        return norm * ratio, norm > max_norm

    # ---- files -----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        own = super().tensors()
        if self.scalar is not None:
            name = next(name for name in self.first if name in own)
            own[name] = own[name] * self.scalar.detach()
        return {"alpha": torch.tensor(self.alpha), **own}

    def problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        return self.rank_problem(tensors) or self.form_problem(tensors) or super().problem(tensors)

    def rank_problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        """A rank other than that of the layer, as a message."""
        if self.length_is_rank is None or self.length_is_rank not in tensors:
            return None
        found, own = tensors[self.length_is_rank], self.tensors()[self.length_is_rank]
        if found.dim() != own.dim() or len(found) == self.rank:
            return None
        return f"has rank {len(found)}, this network has {self.rank} (set --network_dim, or use --dim_from_weights)"

    def form_problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        """A form other than that of the layer, as a message."""
        if "dora_scale" in tensors and self.dora is None:
            return "is a DoRA (dora_scale), this network is not (--network_args dora_wd=True)"
        return None

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a file. It has the learned scalar inside one matrix, ours becomes 1; without alpha the scale is 1."""
        super().load_tensors(tensors)
        self.load_alpha(tensors)
        if self.scalar is not None:
            with torch.no_grad():
                self.scalar.fill_(1.0)

    def load_alpha(self, tensors: Mapping[str, Tensor]) -> None:
        """Set alpha and the scale to those of a file."""
        self.alpha = float(tensors["alpha"]) if "alpha" in tensors else float(self.rank)
        self.scale = self.alpha / self.rank


def axis_in(tensors: Mapping[str, Tensor]) -> str | None:
    """The axis of the DoRA magnitudes in a file; None without magnitudes."""
    return dora_axis(tensors["dora_scale"]) if "dora_scale" in tensors else None
