# SPDX-License-Identifier: Apache-2.0
"""What sets the parts of Chroma apart from those of FLUX.1: its transformer, and T5 as the only text encoder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from library.families.chroma.patches import patch_chroma
from library.families.flux.parts import FLUX, T5, T5_SOURCE, Layout
from library.key_tables import Shapes
from library.weights.sizes import depth, shape_of

# early files kept what the guidance layer took the place of
EXTRAS = (
    r"(vector_in|time_in|guidance_in)\..+",
    r".+\.(img_mod|txt_mod|modulation)\..+",
    r"final_layer\.adaLN_modulation\..+",
    r"time_text_embed\..+",
)
GUIDANCE = "distilled_guidance_layer."  # the same in published and in diffusers' names


def chroma_sizes(shapes: Shapes, names: Layout) -> dict[str, Any]:
    """What the shapes tell of the guidance layer, which makes the modulations of all blocks."""
    inner, channels = shape_of(shapes, f"{GUIDANCE}in_proj.weight", 2)
    return {
        "approximator_num_channels": channels,
        "approximator_hidden_dim": inner,
        "approximator_layers": depth(shapes, f"{GUIDANCE}layers.{{}}."),
    }


def build_chroma(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import ChromaTransformer2DModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers about diffusers
        return ChromaTransformer2DModel.from_config(dict(config))


CHROMA = replace(
    FLUX,
    family="chroma",
    what="Chroma transformer",
    build=build_chroma,
    patch=patch_chroma,
    sizes=chroma_sizes,
    encoders={T5: replace(T5_SOURCE, folder="text_encoder")},
    extras=EXTRAS,
    answers={"flux": "a FLUX.1 model: leave out --model_type chroma"},
)
