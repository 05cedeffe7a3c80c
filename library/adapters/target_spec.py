# SPDX-License-Identifier: Apache-2.0
"""Targets of adapters: published layers, and the modules of ours that they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Component = Literal["denoiser", "text_encoder"]


@dataclass(frozen=True, eq=False)
class TargetModule:
    """One module that an adapter changes, or some of its output rows."""

    path: str  # dotted path inside the model, as published
    module: nn.Module
    rows: slice | None = None  # output rows (channels) that belong to the target; None: all

    @property
    def width(self) -> int:
        """How many output rows the target covers."""
        return self.full_width if self.rows is None else self.rows.stop - self.rows.start

    @property
    def full_width(self) -> int:
        """Output rows of the module: features, channels, or the length of a norm's weight."""
        if isinstance(self.module, (nn.Linear, nn.Conv2d)):
            return self.module.out_features if isinstance(self.module, nn.Linear) else self.module.out_channels
        assert isinstance(self.module.weight, Tensor)
        return self.module.weight.shape[0]

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight's rows, found without the weight, which a quantised module makes at each use."""
        if isinstance(self.module, nn.Linear):
            return torch.Size((self.width, self.module.in_features))
        if isinstance(self.module, nn.Conv2d):
            inputs = self.module.in_channels // self.module.groups
            return torch.Size((self.width, inputs, *self.module.kernel_size))
        return torch.Size((self.width,))


@dataclass(frozen=True)
class ReachedLayer:
    """A published layer, and whether a network changes it."""

    modules: tuple[nn.Module, ...]  # ours
    changed: bool


@dataclass(frozen=True, eq=False)
class TargetSpec:
    """A published layer: its name in adapter files, and our modules for it in the order of its rows."""

    name: str  # e.g. lora_unet_down_blocks_0_attentions_0_proj_in
    modules: tuple[TargetModule, ...]
    part: Component
    block: int | None = None  # index among the architecture's blocks, for ranks and learning rates per block
    encoder: int = 0  # which text encoder
    split: bool = False  # an adapter of its own for each module, fused on save
    path: str = ""  # its dotted path in the published model
    stride: int = 0  # pixels per token along one side of a picture, where a kind of adapters needs it
    whole_path: bool = False  # what `matches` asks

    @property
    def width(self) -> int:
        return sum(m.width for m in self.modules)

    def matches(self, pattern: re.Pattern[str]) -> bool:
        """Whether a regular expression of --network_args means this layer: it is somewhere in the name.

        whole_path: it must match the dotted path from start to end instead, as networks.lora_anima has it.
        """
        return bool(pattern.fullmatch(self.path) if self.whole_path else pattern.search(self.name))

    @property
    def weight(self) -> Tensor:
        """The weight of the published layer, as it is stored."""
        parts = []
        for module in self.modules:
            assert isinstance(module.module.weight, Tensor)
            weight = module.module.weight.detach()
            parts.append(weight if module.rows is None else weight[module.rows])
        return torch.cat(parts)

    def own_rows(self, index: int) -> slice:
        """The rows of the target that module `index` produces."""
        start = sum(m.width for m in self.modules[:index])
        return slice(start, start + self.modules[index].width)
