# SPDX-License-Identifier: Apache-2.0
"""DyLoRA (arXiv:2210.07558): a LoRA that works at every smaller rank too.

The ranks are blocks of `unit`. Each training pass draws a block: it learns, those below it take part but are frozen
(no gradient), those above it are left out. So block k is trained to improve on blocks 0 to k - 1, and a file cut
behind any block is a LoRA. The output is scaled by alpha / rank * sqrt(rank / ranks in use), as sd-scripts does.

At inference, and in the file, it is a plain LoRA of the full rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.kind import AdapterKind
from library.adapters.layers.ranked import RankedLayer, RankedSettings
from library.adapters.layers.weight import applied
from library.adapters.options import BlockOptions, LoraPlusOptions, NoDropoutOptions, PatternOptions, warn_dropout
from library.adapters.target_spec import TargetSpec
from library.errors import UserError
from library.log import get_logger
from library.options import at_least, option


@dataclass(frozen=True)
class DyloraOptions:
    """The ranks of DyLoRA."""

    unit: int | None = option(None, help="Ranks that learn together (1); it divides --network_dim.", check=at_least(1))
    dyloRA: int | None = option(None, help="Another name of unit.", check=at_least(1))
    conv_dim: int | None = option(None, help="Adapt 3x3 convolutions too; must equal --network_dim.", check=at_least(1))
    conv_alpha: float | None = option(None, help="No effect: convolutions have --network_alpha.")

    @property
    def ranks_per_block(self) -> int:
        return self.unit or self.dyloRA or 1

    def problems(self) -> Iterator[str]:
        if None not in (self.unit, self.dyloRA) and self.unit != self.dyloRA:
            yield f"unit={self.unit} and dyloRA={self.dyloRA} are two names of one thing"


@dataclass(frozen=True)
class DyloraSettings(RankedSettings):
    """How a DyLoRA layer is built."""

    unit: int = 1  # ranks that learn together


class DyLoRALayer(RankedLayer):
    """ΔW = up · down, times alpha / rank. Each block of ranks has parameters of its own.

    The gradient of a block that does not learn is None, not 0, so that optimizers leave it and its moments alone.
    """

    marks: ClassVar[set[str]] = {"lora_down.weight", "lora_up.weight"}
    saved: ClassVar[tuple[str, ...]] = ("alpha", "lora_down.weight", "lora_up.weight")
    plus: ClassVar[tuple[str, ...]] = ("lora_up",)
    sparse: ClassVar[bool] = True
    length_is_rank: ClassVar[str | None] = "lora_down.weight"

    def __init__(self, target: TargetSpec, *, rank: int, alpha: float, settings: DyloraSettings | None = None):
        settings = settings or DyloraSettings()
        super().__init__(target, rank=rank, alpha=alpha, settings=settings)
        if rank % settings.unit:
            raise UserError(f"--network_args: unit={settings.unit} does not divide the rank {rank} of {target.name}")
        self.unit = settings.unit
        _, inputs, *kernel = target.modules[0].shape
        count, ones = rank // self.unit, [1] * len(kernel)
        self.lora_down = nn.ParameterList(torch.empty(self.unit, inputs, *kernel) for _ in range(count))
        self.lora_up = nn.ParameterList(torch.zeros(target.width, self.unit, *ones) for _ in range(count))
        for down in self.lora_down:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))

    @classmethod
    def from_tensors(cls, target: TargetSpec, tensors: Mapping[str, Tensor], settings: DyloraSettings) -> AdapterLayer:
        """A layer of the file's rank. Raises UserError when it is not a multiple of the unit."""
        rank = len(tensors["lora_down.weight"])
        return cls(target, rank=rank, alpha=rank, settings=settings)

    # ---- forward ---------------------------------------------------------------------------------------------------

    def change(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        if not self.training:
            return super().change(x, y, index)
        used = self.used_ranks()
        delta = self.gate(self._product(x, index, used)).to(y.dtype)
        scale = self.scale * math.sqrt(self.rank / used)
        return torch.add(y, self.place(delta, index), alpha=scale * self.multiplier)

    def used_ranks(self) -> int:
        """Number of ranks in this pass, drawn from torch's generator; the same for all modules of the target."""
        drawn = self.shared.value("ranks", lambda: torch.randint(len(self.lora_down), ()))
        return (int(drawn) + 1) * self.unit

    def delta(self, x: Tensor, index: int = 0) -> Tensor:
        """up(down(x)) with all ranks."""
        return self._product(x, index, self.rank)

    def _product(self, x: Tensor, index: int, used: int) -> Tensor:
        """up(down(x)) with the first `used` ranks."""
        inner = self.shared.value(self, lambda: self._inner(x, used))
        rows = self.target.own_rows(index)
        up = torch.cat([block[rows] for block in self._blocks(self.lora_up, used)], 1).to(inner.dtype)
        return F.conv2d(inner, up) if self.is_conv else F.linear(inner, up)

    def _inner(self, x: Tensor, used: int) -> Tensor:
        down = torch.cat(self._blocks(self.lora_down, used)).to(x.dtype)
        return applied(down, x, self.target.modules[0].module)

    def _blocks(self, blocks: nn.ParameterList, used: int) -> list[Tensor]:
        """The blocks of the first `used` ranks; in training only the last one learns."""
        last = used // self.unit - 1
        found = [*blocks][: last + 1]
        return [block.detach() if self.training and i < last else block for i, block in enumerate(found)]

    # ---- weights ---------------------------------------------------------------------------------------------------

    def _whole(self) -> tuple[Tensor, Tensor]:
        """All ranks as two matrices in the file's shapes."""
        return torch.cat([*self.lora_down]).detach(), torch.cat([*self.lora_up], 1).detach()

    def delta_weight(self, index: int = 0) -> Tensor:
        down, up = self._whole()
        up = up[self.target.own_rows(index)]
        return (up.float().flatten(1) @ down.float().flatten(1)).reshape(self.target.modules[index].shape)

    @torch.no_grad()
    def limit_norm(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Both matrices times sqrt(max / norm) where the norm of the change at full rank is above max."""
        down, up = (matrix.float().flatten(1) for matrix in self._whole())
        norm = ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt() * self.scale
        return self.shrink((*self.lora_down, *self.lora_up), norm, max_norm, count=2)

    # ---- files -----------------------------------------------------------------------------------------------------

    def named_tensors(self) -> dict[str, nn.Parameter]:
        blocks = {f"lora_down.{i}": block for i, block in enumerate(self.lora_down)}
        return blocks | {f"lora_up.{i}": block for i, block in enumerate(self.lora_up)}

    def tensors(self) -> dict[str, Tensor]:
        down, up = self._whole()
        return {"alpha": torch.tensor(self.alpha), "lora_down.weight": down, "lora_up.weight": up}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            downs = tensors["lora_down.weight"].split(self.unit)
            ups = tensors["lora_up.weight"].split(self.unit, 1)
            for own, value in zip((*self.lora_down, *self.lora_up), (*downs, *ups), strict=True):
                own.copy_(value)
        self.load_alpha(tensors)


# ---- the kind -----------------------------------------------------------------------------------------------------


def dylora_settings(options: Mapping[str, Any], neuron_dropout: float | None) -> DyloraSettings:
    dropout = options["dropout"]
    warn_dropout("networks.dylora", neuron_dropout, dropout.dropout)
    return DyloraSettings(unit=options["ranks"].ranks_per_block, module_dropout=dropout.module_dropout or 0.0)


def dylora_blocks(options: Mapping[str, Any], dim: int, alpha: float) -> BlockOptions:
    """Rank and alpha of convolutions, which are those of the other layers. Raises UserError for another rank."""
    ranks: DyloraOptions = options["ranks"]
    if ranks.conv_dim not in (None, dim):
        raise UserError(f"--network_args: conv_dim must equal --network_dim, which is {dim}; got {ranks.conv_dim}")
    if ranks.conv_alpha not in (None, alpha):
        get_logger().warning("--network_args: conv_alpha: no effect, convolutions have --network_alpha")
    return BlockOptions(conv_dim=ranks.conv_dim, conv_alpha=None if ranks.conv_dim is None else alpha)


DYLORA = AdapterKind(
    options={
        "ranks": DyloraOptions, "dropout": NoDropoutOptions, "plus": LoraPlusOptions, "patterns": PatternOptions,
    },
    readers=(DyLoRALayer,),
    settings=dylora_settings,
    make=lambda target, rank, alpha, settings: DyLoRALayer(target, rank=rank, alpha=alpha, settings=settings),
    blocks=dylora_blocks,
)  # fmt: skip
