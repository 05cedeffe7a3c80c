# SPDX-License-Identifier: Apache-2.0
"""The denoiser of the example. Real families take theirs from diffusers."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 2  # latent pixels of a token's side


class ExampleBlock(nn.Module):
    """Attention and MLP over text and picture together, scaled by the time."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scale = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale1, scale2 = self.scale(time).unsqueeze(1).chunk(2, -1)
        y = self.norm1(x) * (1 + scale1)
        q, k, v = (
            rearrange(linear(y), "b n (h d) -> b h n d", h=self.heads) for linear in (self.to_q, self.to_k, self.to_v)
        )
        x = x + self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x) * (1 + scale2))


class ExampleTransformer(nn.Module):
    """Latents B C h w, noise levels B in 0..1 and text states B T text_width -> a velocity B C h w."""

    def __init__(self, *, channels: int, width: int, text_width: int, blocks: int, heads: int = 2) -> None:
        super().__init__()
        self.example_embedder = nn.Linear(channels * PATCH**2, width)
        self.text_embedder = nn.Linear(text_width, width)
        self.time_embedder = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(ExampleBlock(width, heads) for _ in range(blocks))
        self.out = nn.Linear(width, channels * PATCH**2)

    def forward(self, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        tokens = rearrange(latents, "b c (h i) (w j) -> b (h w) (c i j)", i=PATCH, j=PATCH)
        time = self.time_embedder(t.to(latents.dtype).unsqueeze(1))
        x = torch.cat([self.text_embedder(text), self.example_embedder(tokens)], 1)
        for block in self.blocks:
            x = block(x, time)
        rows = latents.shape[2] // PATCH
        return rearrange(
            self.out(x[:, text.shape[1] :]), "b (h w) (c i j) -> b c (h i) (w j)", h=rows, i=PATCH, j=PATCH
        )
