# SPDX-License-Identifier: Apache-2.0
"""LoRA-FA (arXiv:2308.03303): a LoRA whose down matrix stays as it was drawn; only the up matrix learns.

Without training it needs no gradient, no optimizer state and no activations as wide as the layer's input. A file holds
both matrices and is a LoRA like any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.kind import AdapterKind
from library.adapters.layers.lora import LoRALayer, LoraLayerOptions, LoraSettings, lora_settings
from library.adapters.layers.norm import NormLayer
from library.adapters.options import DropoutOptions, PatternOptions
from library.adapters.target_spec import TargetSpec


class LoRAFALayer(LoRALayer):
    """LoRALayer whose down matrix is a buffer: not trained, but part of the state of a resumed run."""

    def __init__(self, target: TargetSpec, *, rank: int, alpha: float, settings: LoraSettings | None = None):
        super().__init__(target, rank=rank, alpha=alpha, settings=settings)
        drawn = torch.empty(self.lora_down.shape)
        # normal, not uniform: directions that are never trained shall be as different as possible
        drawn.normal_(std=math.sqrt(2 / (drawn[0].numel() + rank)))
        del self.lora_down
        self.register_buffer("lora_down", drawn)

    @classmethod
    def from_tensors(cls, target: TargetSpec, tensors: Mapping[str, Tensor], settings: LoraSettings) -> AdapterLayer:
        rank = len(tensors["lora_down.weight"])
        return cls(target, rank=rank, alpha=rank, settings=settings)

    @torch.no_grad()
    def limit_norm(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Limit the norm as LoRA does, but scale the up matrix alone."""
        drawn = self.lora_down.clone()
        limited = super().limit_norm(max_norm)
        # what the down matrix was multiplied with belongs to the up matrix; all elements have the same ratio
        ratio = self.lora_down.norm() / drawn.norm()
        self.lora_down.copy_(drawn)
        self.lora_up.mul_(ratio.to(self.lora_up.dtype))
        return limited


LORA_FA = AdapterKind(
    options={"dropout": DropoutOptions, "patterns": PatternOptions},
    readers=(LoRAFALayer, NormLayer),
    settings=lambda options, dropout: lora_settings({"layer": LoraLayerOptions(), **options}, dropout),
    make=lambda target, rank, alpha, settings: LoRAFALayer(target, rank=rank, alpha=alpha, settings=settings),
)
