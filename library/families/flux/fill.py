# SPDX-License-Identifier: Apache-2.0
"""What FLUX.1 Fill is shown: the picture without what the mask covers, and the mask, as further channels of each token.

Black Forest Labs 2024, https://github.com/black-forest-labs/flux (docs/fill.md). A token has 64 numbers of the noisy
latents, 64 of the masked picture's latents and 256 of the mask: 2 x 2 latent pixels of 8 x 8 pixels each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from library.families.flux.parts import FILL_TOKEN, FLUX, LATENT_TOKEN, Layout, flux_sizes
from library.key_tables import Shapes
from library.types import Batch, ReferenceSpec

PIXELS = 8  # along a side of a latent pixel
INPUT = "lora_unet_img_in.lora_down.weight"


def fill_sizes(shapes: Shapes, names: Layout) -> dict[str, object]:
    """What the shapes tell, and that only the noisy latents are predicted."""
    return flux_sizes(shapes, names) | {"out_channels": LATENT_TOKEN}


FILL = replace(FLUX, sizes=fill_sizes, token=FILL_TOKEN)
# --ref PICTURE --ref MASK of a preview; in training both are the sample's own
FILL_PREVIEW = ReferenceSpec(most=2, size=lambda own, target: target, roles=("picture", "mask"))


def picture_and_mask(batch: Batch) -> tuple[Tensor, Tensor]:
    """Pixels of a batch's pictures and masks, B 3 H W each, in [-1, 1]. Without masks, everything is to be filled."""
    assert batch.pixels is not None
    mask = torch.ones_like(batch.pixels[:, :1]) if batch.masks is None else batch.masks
    return batch.pixels, (2 * mask - 1).expand_as(batch.pixels)


def encode_masked(encode: Callable[[Tensor], Tensor], pictures: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(masked picture's latents B 16 h w, mask B 64 h w in {0, 1}) of a picture and a mask, B 3 H W in [-1, 1].

    encode: pixels -> scaled latents. White in the mask, from half the brightness on, is what is filled.
    """
    picture, shown = pictures
    mask = (shown[:, :1] >= 0).to(picture.dtype)
    blocks = rearrange(mask, "b 1 (h i) (w j) -> b (i j) h w", i=PIXELS, j=PIXELS)
    return encode(picture * (1 - mask)), blocks


def problem_of_input(tensors: Mapping[str, Tensor], channels: int) -> str | None:
    """Why an adapter file does not fit a model whose tokens have so many numbers; None if it fits."""
    down = tensors.get(INPUT)
    if down is None or down.shape[1] == channels:
        return None
    kinds = {LATENT_TOKEN: "FLUX.1 dev", FILL_TOKEN: "FLUX.1 Fill"}
    made, own = (kinds.get(count, f"a model of {count} numbers per token") for count in (down.shape[1], channels))
    return f"is for {made}: its layer img_in reads {down.shape[1]} numbers per token, that of {own} {channels}"
