# SPDX-License-Identifier: Apache-2.0
"""A first convolution that reads further channels: those of a reference picture, beside the noised latents.

Brooks et al. 2023, "InstructPix2Pix", https://arxiv.org/abs/2211.09800, section 3.2: weights of the new channels start
at zero, so that the model computes what it did before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

LATENT_CHANNELS = 4  # of a U-Net that reads noised latents
EDIT_CHANNELS = 8  # ... and those of a reference picture


class GrownConv2d(nn.Conv2d):
    """A convolution with input channels that its file does not have. `first`: how many it has."""

    first: int

    @classmethod
    def grown_from(cls, conv: nn.Conv2d, channels: int) -> GrownConv2d:
        """`conv` with `channels` inputs; the weights of the new ones are zero."""
        assert conv.groups == 1 and conv.padding_mode == "zeros"
        grown = cls(
            channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # type: ignore[arg-type]
            bias=conv.bias is not None, device="meta",
        )  # fmt: skip
        grown.first = conv.in_channels
        grown.weight = nn.Parameter(padded(conv.weight.detach(), channels), requires_grad=conv.weight.requires_grad)
        grown.bias = conv.bias
        return grown.train(conv.training)


def is_grown(shape: Sequence[int], changed: Sequence[int]) -> bool:
    """Whether a weight of this shape has to grow for a change of shape `changed`: the first convolution of a U-Net."""
    new = (*shape[:1], EDIT_CHANNELS, *shape[2:])
    return len(shape) == 4 and shape[1] == LATENT_CHANNELS and tuple(changed) == new


def padded(weight: Tensor, channels: int) -> Tensor:
    """The weight of a convolution, or a change of it, with zeros for further input channels."""
    new = weight.new_zeros(len(weight), channels - weight.shape[1], *weight.shape[2:])
    return torch.cat([weight, new], 1)
