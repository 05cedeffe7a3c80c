# SPDX-License-Identifier: Apache-2.0
"""Options of FLUX.2: which files make the model, what its text encoder reads, how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.families.options import SeparateAutoencoder
from library.objectives.flow_options import SampledFlowOptions
from library.options import at_least, option

TEXT_LENGTH = 512  # tokens, padding included, that every model of FLUX.2 was trained with


@dataclass(frozen=True)
class Flux2Options(SeparateAutoencoder):
    """FLUX.2 klein base 4B and 9B, and dev."""

    cached_texts_stay: ClassVar[bool] = True
    text_encoder: str | None = option(
        None,
        help="Qwen3 4B for klein 4B, Qwen3 8B for klein 9B, Mistral Small 3.2 24B for dev: .safetensors file, "
        "transformers folder or hub id. Without it, that of the model.",
        path=True,
    )
    text_encoder_max_token_length: int = option(
        TEXT_LENGTH,
        help="Length of texts in tokens, chat and padding included. The models have seen 512 only.",
        check=at_least(32, 8192),
        zero_is_unset=True,
    )
    guidance_scale: float = option(
        1.0,
        help="Guidance that FLUX.2 dev is told in training; 1 trains it as the model it was made of. Klein has none.",
        check=at_least(0),
    )
    clip_skip: int | None = option(
        None, help="Not for this model.", answer="there is no CLIP here; three inner layers of the encoder are read"
    )
    max_token_length: int | None = option(
        None, help="Not for this model.", answer="--text_encoder_max_token_length is the limit here"
    )


@dataclass(frozen=True)
class Flux2FlowOptions(SampledFlowOptions):
    """How FLUX.2 is trained: which noise levels are drawn, what the loss compares, how it is weighted."""

    timestep_sampling: str = option(
        "flux2_shift",
        help="How noise levels are drawn; flux2_shift and shift are usual.",
        choices=("sigma", "uniform", "sigmoid", "shift", "flux2_shift"),
    )
    model_prediction_type: str = option(
        "raw",
        help="What the loss compares: raw counts all noise levels alike, sigma_scaled counts noisy ones more.",
        choices=("raw", "additive", "sigma_scaled"),
    )
