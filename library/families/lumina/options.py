# SPDX-License-Identifier: Apache-2.0
"""Options of Lumina-Image 2.0 that say which model is trained and what its text encoder reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.families.options import SeparateAutoencoder
from library.objectives.flow_options import SampledFlowOptions
from library.options import at_least, option, positive, refused

TOKEN_LENGTH = 256  # what Lumina-Image 2.0 was trained with


@dataclass(frozen=True)
class LuminaOptions(SeparateAutoencoder):
    """Lumina-Image 2.0."""

    cached_texts_stay: ClassVar[bool] = True
    gemma2: str | None = option(
        None,
        help="Gemma 2 2B: .safetensors file, transformers folder or hub id. Without it, that of the model.",
        path=True,
    )
    gemma2_max_token_length: int = option(
        TOKEN_LENGTH,
        help="Longest text in tokens, start token and --system_prompt included; what is longer is cut.",
        check=at_least(2, 8192),
        zero_is_unset=True,
    )
    system_prompt: str = option(
        "", help="Put before every caption and prompt, as '<system prompt> <Prompt Start> <caption>'."
    )
    use_flash_attn: bool = option(
        False,
        help="Compute attention with flash kernels.",
        answer="attention goes through PyTorch, which takes its flash kernels wherever they fit; no package is needed",
    )
    use_sage_attn: bool = option(
        False, help="Not for training.", check=refused("SageAttention has no backward pass, so nothing would learn")
    )
    sample_batch_size: int | None = option(
        None,
        help="Previews made at once.",
        check=at_least(1),
        zero_is_unset=True,
        answer="previews are made one after the other: the pictures are the same and take less memory",
    )
    clip_skip: int | None = option(
        None, help="Not for this model.", answer="there is no CLIP here; Gemma 2's last layer but one is always used"
    )
    max_token_length: int | None = option(
        None, help="Not for this model.", answer="--gemma2_max_token_length is the limit here"
    )


@dataclass(frozen=True)
class LuminaFlowOptions(SampledFlowOptions):
    """How Lumina-Image 2.0 is trained: which noise levels are drawn, what the loss compares, how it is weighted."""

    timestep_sampling: str = option(
        "shift",
        help="How noise levels are drawn; shift and nextdit_shift are usual.",
        choices=("sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift"),
    )
    discrete_flow_shift: float = option(
        6.0, help="Shift of the sigma and shift samplings; above 1 draws more noise.", check=positive
    )
    model_prediction_type: str = option(
        "raw",
        help="What the loss compares: raw counts all noise levels alike, sigma_scaled counts noisy ones more.",
        choices=("raw", "additive", "sigma_scaled"),
    )
