# SPDX-License-Identifier: Apache-2.0
"""Options of SANA that say which model is trained, what its text encoder reads, and how noise levels are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.families.options import FlowModelOptions
from library.objectives.flow_options import SampledFlowOptions
from library.options import at_least, option, positive

TOKEN_LENGTH = 300  # what SANA was trained with


@dataclass(frozen=True)
class SanaOptions(FlowModelOptions):
    """SANA and SANA-1.5."""

    cached_texts_stay: ClassVar[bool] = True
    gemma2: str | None = option(
        None,
        help="Gemma 2 2B-it: .safetensors file, transformers folder or hub id. Without it, that of the model.",
        path=True,
    )
    gemma2_max_token_length: int = option(
        TOKEN_LENGTH,
        help="Longest caption in tokens, start token included; what is longer is cut.",
        check=at_least(2, 4096),
        zero_is_unset=True,
    )
    complex_human_instruction: str | None = option(
        None,
        help="Text before every caption that is not empty. Without it, the instruction that SANA was trained with; "
        "'' for none.",
    )
    clip_skip: int | None = option(
        None, help="Not for this model.", answer="there is no CLIP here; Gemma 2's last layer is always used"
    )
    max_token_length: int | None = option(
        None, help="Not for this model.", answer="--gemma2_max_token_length is the limit here"
    )


@dataclass(frozen=True)
class SanaFlowOptions(SampledFlowOptions):
    """How SANA is trained: which noise levels are drawn, what the loss compares, how it is weighted."""

    timestep_sampling: str = option(
        "shift",
        help="How noise levels are drawn; shift is what SANA was trained with.",
        choices=("sigma", "uniform", "sigmoid", "shift"),
    )
    discrete_flow_shift: float = option(
        3.0, help="Shift of the sigma and shift samplings; above 1 draws more noise.", check=positive
    )
    model_prediction_type: str = option(
        "raw",
        help="What the loss compares: raw counts all noise levels alike, sigma_scaled counts noisy ones more.",
        choices=("raw", "additive", "sigma_scaled"),
    )
