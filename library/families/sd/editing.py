# SPDX-License-Identifier: Apache-2.0
"""Editing pictures with the U-Nets of Stable Diffusion 1.x, 2.x and XL: InstructPix2Pix.

Brooks et al. 2023, https://arxiv.org/abs/2211.09800. The first convolution reads the latents of the picture to edit as
four more channels, behind the noised ones. As in the published pipelines, they are the mean of the VAE's posterior,
neither scaled nor noised.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from library.device import on_device
from library.rng import torch_generator
from library.types import Batch, ReferenceSpec, like
from library.weights.grown_input import EDIT_CHANNELS, GrownConv2d

REFERENCES = ReferenceSpec(most=1, size=lambda own, target: target, scale=1.5)


def grow_input(unet: nn.Module) -> None:
    """Give a U-Net of 4 input channels the 4 of a reference picture. Their weights are zero."""
    conv = unet.get_submodule("conv_in")
    assert isinstance(conv, nn.Conv2d)
    unet.add_module("conv_in", GrownConv2d.grown_from(conv, EDIT_CHANNELS))
    configured: Any = unet  # a diffusers module
    configured.register_to_config(in_channels=EDIT_CHANNELS)


def with_reference(x_t: Tensor, batch: Batch | None) -> Tensor:
    """The U-Net's input, B 8 h w. Without a reference picture its channels are zero, as where it is dropped."""
    reference = batch.references[0] if batch is not None and batch.references else torch.zeros_like(x_t)
    return torch.cat([x_t, reference.to(x_t)], 1)


def without_some(batch: Batch, seed: int, *, captioned: float, uncaptioned: float) -> Batch:
    """The batch with zeros in place of some reference pictures, the same for every `seed`.

    captioned, uncaptioned: the share of samples with a caption, and with an empty one, that lose theirs.
    """
    if not batch.references or not (captioned or uncaptioned):
        return batch
    rates = torch.tensor([captioned if caption else uncaptioned for caption in batch.captions])
    device = batch.references[0].device
    generator = torch_generator(seed, "references", device=device)
    kept = torch.rand(batch.size, device=device, generator=generator) >= on_device(rates, device)
    return replace(batch, references=tuple(latents * like(kept, latents) for latents in batch.references))
