# SPDX-License-Identifier: Apache-2.0
"""Single layers of a Stable Diffusion 1.x checkpoint, and adapters merged into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.adapters.formats.conversion import by_module
from library.adapters.surgery.checkpoint_layers import CheckpointLayers
from library.adapters.surgery.checkpoint_merge import Adapter, MergedWeights
from tests.adapters.known_formats import BY_NAME

LINEAR, CONV, NORM = (
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2",
    "lora_unet_mid_block_resnets_0_conv1",
    "lora_unet_mid_block_resnets_0_norm1",
)
PUBLISHED = {
    LINEAR: "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.2",
    CONV: "model.diffusion_model.middle_block.0.in_layers.2",
    NORM: "model.diffusion_model.middle_block.0.in_layers.0",
}


@dataclass(frozen=True)
class Held:
    """Weights in memory, as a file has them."""

    tensors: Mapping[str, Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.tensors.items()}

    def tensor(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        return self.tensors[name].to(device, dtype)


def module_for(name: str, seed: int = 0) -> nn.Module:
    """A layer that is as wide as its input: no shape tells the axes apart."""
    torch.manual_seed(seed)
    if name == NORM:
        return nn.GroupNorm(4, 16)
    return nn.Linear(16, 16) if name == LINEAR else nn.Conv2d(16, 16, 3, padding=1)


def merged(name: str, module: nn.Module, tensors: Mapping[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    """weight and bias of a checkpoint with that layer, and the adapter `name` in it."""
    path = PUBLISHED[name]
    held = Held({f"{path}.{key}": value.detach() for key, value in module.named_parameters()})
    layers = CheckpointLayers(BY_NAME["sd1"], held.shapes)
    weights = MergedWeights(held, layers, [Adapter("x", by_module(tensors), lambda layer: strength)])
    found = {key: weights.tensor(f"{path}.{key}") for key, _ in module.named_parameters()}
    assert weights.moved == {name}
    return found
