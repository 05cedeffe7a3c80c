# SPDX-License-Identifier: Apache-2.0
"""The blocks of a U-Net of Stable Diffusion, fine enough to be recomputed, compiled or swapped one by one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from torch import nn


def unet_blocks(unet: nn.Module) -> list[nn.Module]:
    """Every ResNet block, transformer block, downsampler and upsampler, in the order in which they run."""
    down, mid, up = (unet.get_submodule(name) for name in ("down_blocks", "mid_block", "up_blocks"))
    levels = [*down.children(), mid, *up.children()]
    return [block for level in levels for block in _of_level(level, starts_alone=level is mid)]


def _of_level(level: nn.Module, *, starts_alone: bool) -> Iterator[nn.Module]:
    """ResNet blocks and attentions take turns, then the picture is resized. starts_alone: as in the middle, where a
    ResNet block more comes first."""
    parts = {name: [*module.children()] for name, module in level.named_children()}
    resnets, attentions = parts["resnets"], parts.get("attentions", [])
    if starts_alone:
        yield resnets[0]
        turns = [block for pair in zip_longest(attentions, resnets[1:]) for block in pair]
    else:
        turns = [block for pair in zip_longest(resnets, attentions) for block in pair]
    for block in turns:
        if block is not None:
            yield from block.get_submodule("transformer_blocks").children() if block in attentions else (block,)
    yield from parts.get("downsamplers", [])
    yield from parts.get("upsamplers", [])
