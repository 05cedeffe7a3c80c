# SPDX-License-Identifier: Apache-2.0
"""One pass of HunyuanImage-2.1 in which the host never waits for the device.

diffusers sorts the tokens of both text encoders by their masks, sample by sample, and reads the masks back to the host for
that. The order has no influence, as text tokens have no position: here they stay where they are, and the padding
is hidden. Without padding there is no mask, and attention is quicker. The numbers are the same.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def use_device_masks(denoiser: nn.Module) -> None:
    """Let diffusers' HunyuanImageTransformer2DModel `denoiser` run the forward pass of this file."""
    denoiser.forward = MethodType(_forward, denoiser)


def _forward(
    self: Any,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    mask: Tensor | None,
    glyphs: Tensor | None = None,
    glyph_mask: Tensor | None = None,
    *,
    guidance: Tensor | None = None,
    timestep_r: Tensor | None = None,
) -> Tensor:
    """Velocity B C h w for latents (B C h w) at times (B) of 0 to 1000.

    text, glyphs: states (B, length, width) of Qwen2.5-VL and of ByT5, the latter None where nothing is quoted. Masks:
    (B, length) bool, False at padding; None without padding. guidance (B), in thousandths, and timestep_r (B), where
    the step ends: of the distilled model.
    """
    turns = self.rope(latents)
    time = self.time_guidance_embed(timestep, guidance=guidance, timestep_r=timestep_r)
    joint = self.context_embedder(text, timestep, mask)
    if glyphs is not None:
        mask = _joined((glyph_mask, glyphs), (mask, text))
        joint = torch.cat([self.context_embedder_2(glyphs), joint], 1)
    rows, columns = latents.shape[-2:]
    picture = self.x_embedder(latents)
    if mask is not None:  # (B, 1, 1, picture + text)
        mask = F.pad(mask, (rows * columns, 0), value=True)[:, None, None]
    for block in (*self.transformer_blocks, *self.single_transformer_blocks):
        picture, joint = block(picture, joint, time, attention_mask=mask, image_rotary_emb=turns)
    picture = self.proj_out(self.norm_out(picture, time))
    return picture.transpose(1, 2).unflatten(2, (rows, columns))


def _joined(*parts: tuple[Tensor | None, Tensor]) -> Tensor | None:
    """The masks of several states side by side; None where all have none."""
    if all(mask is None for mask, _ in parts):
        return None
    whole = lambda states: states.new_ones(states.shape[:2], dtype=torch.bool)
    return torch.cat([whole(states) if mask is None else mask for mask, states in parts], 1)
