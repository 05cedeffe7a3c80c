# SPDX-License-Identifier: Apache-2.0
"""One pass of Lumina-Image 2.0 in which the host never waits for the device.

The joint sequence of a sample is its text, its picture, and then the text's padding. diffusers reads the lengths of the
texts back to the host in each pass, to cut and join in loops over the samples. Here the lengths stay where they are:
the order of each sequence is computed as indices. Shapes depend on shapes alone, so that the pass also runs on tensors
without contents, and compiled. The numbers are the same.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from library.device import exact_float


def use_device_lengths(denoiser: nn.Module) -> None:
    """Let diffusers' Lumina2Transformer2DModel `denoiser` run the forward pass of this file."""
    denoiser.forward = MethodType(_forward, denoiser)


def _forward(
    self: Any, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, mask: Tensor | None
) -> Tensor:
    """Velocity B C h w for latents (B C h w) at times (B,) with texts (B, length, width).

    mask: (B, length) bool, False at the padding of shorter texts; None without padding.
    """
    batch, _, height, width = hidden_states.shape
    patch, length = self.config.patch_size, encoder_hidden_states.shape[1]
    rows, columns = height // patch, width // patch
    time, text = self.time_caption_embed(hidden_states, timestep, encoder_hidden_states)
    seen = torch.ones(batch, length, dtype=torch.bool, device=text.device) if mask is None else mask.bool()
    turns = _turns(self.config.axes_dim_rope, self.rope_embedder.theta, seen, rows, columns)

    picture = self.x_embedder(_to_patches(hidden_states, patch))
    for block in self.context_refiner:
        text = block(text, seen, turns[:, :length])
    for block in self.noise_refiner:
        picture = block(picture, None, turns[:, length:], time)

    joint, order, joint_mask = torch.cat([text, picture], 1), None, None
    if mask is not None:
        order, joint_mask = _order(seen, rows * columns)
        joint = torch.where(joint_mask.unsqueeze(-1), _taken(joint, order), 0)
        turns = _taken(turns, order)
    for block in self.layers:
        joint = block(joint, joint_mask, turns, time)

    joint = self.norm_out(joint, time)
    if order is None:
        picture = joint[:, length:]
    else:
        picture = _taken(joint, seen.sum(1, keepdim=True) + torch.arange(rows * columns, device=joint.device))
    return _to_picture(picture, rows, columns, patch)


# ---- the order of the tokens ----------------------------------------------------------------------------------------


def _order(seen: Tensor, patches: int) -> tuple[Tensor, Tensor]:
    """Order of the entries of [padded text, picture] in the joint sequence, and a mask that is False at the padding.

    seen: (B, length) bool. Both results are (B, length + patches).
    """
    length = seen.shape[1]
    own = seen.sum(1, keepdim=True)
    place = torch.arange(length + patches, device=seen.device)
    after = place >= own + patches  # the padding comes last
    order = torch.where(place < own, place, torch.where(after, place - patches, place - own + length))
    return order, ~after


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """Entries of x (B, m, ...) at the indices `order` (B, n), sample by sample: (B, n, ...)."""
    first = torch.arange(len(x), device=x.device).unsqueeze(1) * x.shape[1]
    return x.flatten(0, 1).index_select(0, (first + order).flatten()).unflatten(0, order.shape)


def _to_patches(latents: Tensor, patch: int) -> Tensor:
    """B C h w -> (B, patches, numbers of a patch: row, column, channel)."""
    return rearrange(latents, "b c (rows i) (columns j) -> b (rows columns) (i j c)", i=patch, j=patch)


def _to_picture(x: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """The inverse of `_to_patches`: B C h w."""
    return rearrange(
        x, "b (rows columns) (i j c) -> b c (rows i) (columns j)", rows=rows, columns=columns, i=patch, j=patch
    )


# ---- positions ------------------------------------------------------------------------------------------------------


def _turns(axes: list[int], theta: float, seen: Tensor, rows: int, columns: int) -> Tensor:
    """The rotation of each number pair of a head, as complex numbers: (B, length + patches, pairs).

    A text token lies at (its place, 0, 0), a patch at (length of the text, row, column); padding is turned to 0.
    """
    (batch, length), device = seen.shape, seen.device
    places, down, right = (
        _table(size, count, theta, device) for size, count in zip(axes, (length + 1, max(rows, 1), max(columns, 1)))
    )
    text = torch.cat([places[:-1], down[:1].expand(length, -1), right[:1].expand(length, -1)], 1)
    grid = torch.cat([down.repeat_interleave(columns, 0), right.repeat(rows, 1)], 1)
    begin = places.index_select(0, seen.sum(1)).unsqueeze(1).expand(-1, rows * columns, -1)
    picture = torch.cat([begin, grid.expand(batch, -1, -1)], 2)
    return torch.cat([torch.where(seen.unsqueeze(-1), text, 0), picture], 1)


def _table(size: int, count: int, theta: float, device: torch.device) -> Tensor:
    """(count, size / 2): e^(i p / theta^(2 k / size)) of positions p and pairs k (Su et al. 2021, RoFormer).

    Computed where it is used: a kept table would be cast with the model, or copied in each pass.
    """
    dtype = exact_float(device)
    rates = 1.0 / theta ** (torch.arange(0, size, 2, dtype=dtype, device=device) / size)
    angles = torch.arange(count, device=device).unsqueeze(1) * rates
    return torch.polar(torch.ones_like(angles), angles)
