# SPDX-License-Identifier: Apache-2.0
"""Forward pass of HunyuanImage-2.1 in which the host never waits for the device.

diffusers sorts the tokens of both text encoders by their masks, sample by sample, and reads the masks back to the host
to do so. Text tokens have no positions, so their order does not matter: here they keep their places, and the padding is
masked. Without padding there is no mask, which makes attention faster. The results are the same.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Turns = tuple[Tensor, Tensor]  # cosines and sines of the picture's tokens


def use_device_masks(denoiser: nn.Module) -> None:
    """Make `denoiser`, diffusers' HunyuanImageTransformer2DModel, use the forward pass of this file."""
    embedder = denoiser.get_submodule("time_guidance_embed")
    denoiser.forward, embedder.forward = MethodType(_forward, denoiser), MethodType(_embed, embedder)
    for block in denoiser.get_submodule("single_transformer_blocks").children():
        block.forward = MethodType(_single_block, block)


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

    text, glyphs: states (B, length, width) of Qwen2.5-VL and of ByT5; glyphs is None if nothing is quoted. Masks:
    (B, length) bool, False at padding; None without padding. guidance (B), in thousandths, and timestep_r (B), the time
    at which the step ends, are for the distilled model.
    """
    turns = self.rope(latents)
    time = self.time_guidance_embed(timestep, guidance, timestep_r, latents.dtype)
    joint = self.context_embedder(text, timestep, mask)
    if glyphs is not None:
        mask = _joined((glyph_mask, glyphs), (mask, text))
        glyphs = self.context_embedder_2(glyphs.to(self.context_embedder_2.norm.weight.dtype))
        joint = torch.cat([glyphs, joint], 1)
    rows, columns = latents.shape[-2:]
    picture = self.x_embedder(latents)
    if mask is not None:  # (B, 1, 1, picture + text)
        mask = F.pad(mask, (rows * columns, 0), value=True)[:, None, None]
    for block in (*self.transformer_blocks, *self.single_transformer_blocks):
        picture, joint = block(picture, joint, time, attention_mask=mask, image_rotary_emb=turns)
    picture = self.proj_out(self.norm_out(picture, time))
    return picture.transpose(1, 2).unflatten(2, (rows, columns))


def _embed(
    self: Any, timestep: Tensor, guidance: Tensor | None, timestep_r: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Time embedding (B, width). The sinusoids are computed in float32 and cast to `dtype` for the layers."""
    embed = lambda layer, t: layer(self.time_proj(t).to(dtype))
    time = embed(self.timestep_embedder, timestep)
    if timestep_r is not None:
        time = (time + embed(self.timestep_embedder_r, timestep_r)) / 2
    return time if guidance is None else time + embed(self.guidance_embedder, guidance)


def _joined(*parts: tuple[Tensor | None, Tensor]) -> Tensor | None:
    """The concatenated masks of several states; None if none of them has one."""
    if all(mask is None for mask, _ in parts):
        return None
    return torch.cat([x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask for mask, x in parts], 1)


def _single_block(
    self: Any, picture: Tensor, text: Tensor, time: Tensor, attention_mask: Tensor | None, image_rotary_emb: Turns
) -> tuple[Tensor, Tensor]:
    """A single block in which the MLP and the attention read the same tensor.

    They are one layer in the published model, so an adapter on that layer needs one input. diffusers splits and joins
    the tokens between them.
    """
    from diffusers.models import attention_dispatch, embeddings

    attend: Any = attention_dispatch.dispatch_attention_fn
    turn: Any = embeddings.apply_rotary_emb
    joint, tokens, attn = torch.cat([picture, text], 1), picture.shape[1], self.attn
    x, gate = self.norm(joint, emb=time)
    q, k, v = (layer(x).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
    q, k = (
        torch.cat([turn(y[:, :tokens], image_rotary_emb, sequence_dim=1), y[:, tokens:]], 1)
        for y in (attn.norm_q(q), attn.norm_k(k))
    )
    attended = attend(q, k, v, attn_mask=attention_mask).flatten(2, 3)
    joint = joint + gate.unsqueeze(1) * self.proj_out(torch.cat([attended, self.act_mlp(self.proj_mlp(x))], 2))
    return joint[:, :tokens], joint[:, tokens:]
