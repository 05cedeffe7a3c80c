# SPDX-License-Identifier: Apache-2.0
"""Positions of SD3's patches for pictures of several sizes.

SD3 adds a table of position embeddings, side x side patches large, to the patches of a picture (Esser et al. 2024,
"Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", https://arxiv.org/abs/2403.03206, section
5.3.2). A picture sees the middle of the table. Two other ways to choose what it sees, for training in several
resolutions, replace the model's own way when it is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from library.rng import python_rng


def use_random_crop(denoiser: nn.Module, rate: float) -> None:
    """Crop the table of positions at a random place, with probability `rate` for each batch, and not at its middle.

    `choose_crop` says for each pass what is seen.
    """
    _embedding(denoiser).cropped_pos_embed = _RandomCrop(_embedding(denoiser), rate)


def choose_crop(denoiser: nn.Module, seed: int | None) -> None:
    """Choose the place for the next pass, after `use_random_crop`. None: the middle, for validation and previews."""
    _embedding(denoiser).cropped_pos_embed.seed = seed


def use_scaled_positions(denoiser: nn.Module, base: int) -> None:
    """Stretch the positions of a picture of base x base patches over pictures of other sizes.

    A picture of base x base patches sees what it always saw. One of another area sees the same values at the same
    relative places, interpolated linearly between the entries of the table; the longer side reaches further out.
    """
    _embedding(denoiser).cropped_pos_embed = _ScaledPositions(_embedding(denoiser), base)


def _embedding(denoiser: nn.Module) -> Any:
    """diffusers' PatchEmbed: it asks its `cropped_pos_embed(h, w)` for the positions (1, patches, width)."""
    return denoiser.get_submodule("pos_embed")


class _Positions:
    """`table` is side x side x width."""

    def __init__(self, embedding: Any) -> None:
        self.embedding = embedding

    @property
    def table(self) -> Tensor:
        side = self.embedding.pos_embed_max_size
        return self.embedding.pos_embed.view(side, side, -1)

    def patches(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of a latent of this size. Raises ValueError when the table is too small for it."""
        side = self.embedding.pos_embed_max_size
        rows, columns = (n // self.embedding.patch_size for n in (height, width))
        if max(rows, columns) > side:
            raise ValueError(f"the model knows positions of {side} x {side} patches, the latent has {rows} x {columns}")
        return rows, columns


class _RandomCrop(_Positions):
    def __init__(self, embedding: Any, rate: float) -> None:
        super().__init__(embedding)
        self.rate = rate
        self.seed: int | None = None

    def __call__(self, height: int, width: int) -> Tensor:
        rows, columns = self.patches(height, width)
        table = self.table
        free = (len(table) - rows, len(table) - columns)
        top, left = (n // 2 for n in free)
        if self.seed is not None:
            rng = python_rng(self.seed, "positions")  # on the host: no device has to be asked
            if rng.random() < self.rate:
                top, left = (rng.randint(0, n) for n in free)
        return table[top : top + rows, left : left + columns].reshape(1, rows * columns, -1)


class _ScaledPositions(_Positions):
    def __init__(self, embedding: Any, base: int) -> None:
        super().__init__(embedding)
        self.base = base

    def __call__(self, height: int, width: int) -> Tensor:
        rows, columns = self.patches(height, width)
        step = self.base / (rows * columns) ** 0.5  # entries of the table from one patch to the next
        table = self.table
        row, down = self._places(rows, step)
        column, right = self._places(columns, step)
        corner = lambda i, j: table[(row + i)[:, None], (column + j)[None, :]].float()
        above = torch.lerp(corner(0, 0), corner(0, 1), right.view(1, -1, 1))
        below = torch.lerp(corner(1, 0), corner(1, 1), right.view(1, -1, 1))
        part = torch.lerp(above, below, down.view(-1, 1, 1))
        return part.reshape(1, rows * columns, -1).to(table.dtype)

    def _places(self, count: int, step: float) -> tuple[Tensor, Tensor]:
        """Where `count` patches lie on one axis, around the middle of a base picture: entry, and share of the next."""
        table = self.table
        side = len(table)
        middle = (side - self.base) // 2 + (self.base - 1) / 2
        places = middle + (torch.arange(count, device=table.device) - (count - 1) / 2) * step
        places = places.clamp(0, side - 1)
        low = places.long().clamp(max=side - 2)
        return low, places - low
