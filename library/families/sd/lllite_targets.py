# SPDX-License-Identifier: Apache-2.0
"""Targets of ControlNet-LLLite in the U-Nets of Stable Diffusion: attention on the way down and in the middle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from library.adapters.layers.lllite import PREFIX
from library.adapters.target_spec import TargetModule, TargetSpec
from library.adapters.targets import AdaptedModels, Selection, Targets
from library.errors import UserError
from library.families.sd.names import unet_module_names
from library.families.sd.targets import CLASSES

LATENT_FACTOR = 8  # pixels per latent pixel along one side
CONTROLLED = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q")  # in this order within each transformer block


@dataclass(frozen=True)
class LLLiteTargets(Targets):
    """The controlled layers, in the order of the blocks, all of one rank."""

    classes = CLASSES
    prefix = PREFIX
    decided_by_file = ()

    @property
    def options(self) -> Mapping[str, type]:
        return {}

    def require_models(self, models: AdaptedModels, network_module: str) -> None:
        if models.denoiser is None or "down_blocks" not in dict(models.denoiser.named_children()):
            raise UserError(f"--network_module {network_module}: this model has no U-Net (SD 1.x, 2.x and XL do)")

    def select(self, options: Mapping[str, Any], dim: int, alpha: float, models: AdaptedModels) -> Selection:
        return Selection(self.in_file(options, models), lambda target: (dim, alpha))

    def in_file(self, options: Mapping[str, Any], models: AdaptedModels) -> list[TargetSpec]:
        assert models.denoiser is not None
        return [*lllite_targets(models.denoiser)]


def lllite_targets(unet: nn.Module) -> Iterator[TargetSpec]:
    """Every layer that is controlled, in the order of the blocks."""
    modules = dict(unet.named_modules())
    for published, ours, stride in _attention_blocks(unet):
        blocks = modules[f"{ours}.transformer_blocks"].named_children()
        for path in [f"transformer_blocks.{index}.{path}" for index, _ in blocks for path in CONTROLLED]:
            name = f"{PREFIX}_{published}.{path}".replace(".", "_")
            target = TargetModule(f"{ours}.{path}", modules[f"{ours}.{path}"])
            yield TargetSpec(name, (target,), "denoiser", stride=stride)


def _attention_blocks(unet: nn.Module) -> Iterator[tuple[str, str, int]]:
    """(published name, our name, stride) of the attention blocks on the way down and in the middle."""
    stride = LATENT_FACTOR
    for name in unet_module_names(unet):
        if name.published.startswith("input_blocks.") and name.published.endswith(".op"):
            stride *= 2
        elif ".attentions." in name.ours[0] and name.published.startswith(("input_blocks.", "middle_block.")):
            yield name.published, name.ours[0], stride


TARGETS = LLLiteTargets()
