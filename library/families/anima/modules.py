# SPDX-License-Identifier: Apache-2.0
"""The denoiser of Anima: diffusers' transformer of Cosmos-Predict2, and the text conditioner before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class AnimaDenoiser(nn.Module):
    """AnimaTextConditioner (the LLM adapter of published files) and CosmosTransformer3DModel, one after the other."""

    def __init__(self, transformer: nn.Module, text_conditioner: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_conditioner = text_conditioner

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        states: Tensor,
        ids: Tensor,
        states_mask: Tensor | None,
        ids_mask: Tensor | None,
    ) -> Tensor:
        """Velocity B C h w for latents (B C h w) at noise levels (B,).

        states: those of Qwen3 (B, length, width). ids: those of T5's tokenizer (B, other length). Masks: bool, of the
        same lengths, False at padding; None without padding.
        """
        text = self.text_conditioner(states, ids, ids_mask, states_mask)
        # One more channel, for the padding mask: nothing is padded
        frame = F.pad(x, (0, 0, 0, 0, 0, 1)).unsqueeze(2)
        return self.transformer(frame, timestep, text, return_dict=False)[0].squeeze(2)


def build_denoiser(transformer: Mapping[str, Any], conditioner: Mapping[str, Any]) -> nn.Module:
    """Build the module from the configurations of diffusers' two models.

    The transformer itself would add the channel of the padding mask with a function of torchvision. It is built without
    this, with one more input channel. Its weights are the same.
    """
    from diffusers import AnimaTextConditioner, CosmosTransformer3DModel

    config = dict(transformer)
    if config.get("concat_padding_mask", True):
        config |= {"in_channels": config["in_channels"] + 1, "concat_padding_mask": False}
    models: tuple[Any, Any] = (
        CosmosTransformer3DModel.from_config(config),
        AnimaTextConditioner.from_config(dict(conditioner)),
    )
    return AnimaDenoiser(*models)
