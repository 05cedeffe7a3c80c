# SPDX-License-Identifier: Apache-2.0
"""Options of FLUX.1 and Chroma: which files make the model, what its text encoders read, what full training has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.families.finetune_options import FineTuneOptions
from library.families.options import SeparateAutoencoder
from library.objectives.flow_options import SampledFlowOptions
from library.options import at_least, option, refused

GUIDANCE_SCALE = 3.5  # as sd-scripts has it


@dataclass(frozen=True)
class FluxOptions(SeparateAutoencoder):
    """FLUX.1 dev and schnell, and Chroma."""

    model_type: str = option(
        "flux",
        help="Chroma, FLUX.1 Kontext and FLUX.1 Fill are told apart from FLUX.1 dev here.",
        choices=("flux", "chroma", "kontext", "fill"),
    )
    clip_l: str | None = option(
        None,
        help="CLIP-L: .safetensors file, transformers folder or hub id. Without it, that of the model; not for Chroma.",
        path=True,
    )
    t5xxl: str | None = option(
        None, help="T5-XXL: .safetensors file, transformers folder or hub id. Without it, that of the model.", path=True
    )
    t5xxl_max_token_length: int | None = option(
        None,
        help="Longest caption in tokens of T5, end token included. Without it 512, with FLUX.1 schnell 256.",
        check=at_least(2, 8192),
        zero_is_unset=True,
    )
    apply_t5_attn_mask: bool = option(
        False, help="Hide the padding of captions from T5 and from the model; Chroma always does."
    )
    guidance_scale: float = option(
        GUIDANCE_SCALE,
        help="Guidance that FLUX.1 dev is told in training; 1 trains it as the model it was made of.",
        check=at_least(0),
    )
    controlnet_model_name_or_path: str | None = option(
        None, help="Not for this method.", check=refused("a ControlNet has a script of its own")
    )
    split_mode: bool = option(False, help="Train half of the blocks at a time.", answer="--blocks_to_swap does its job")
    clip_skip: int | None = option(
        None, help="Not for this model.", answer="of CLIP-L only the pooled output is used, which is of its last layer"
    )
    max_token_length: int | None = option(
        None, help="Not for this model.", answer="--t5xxl_max_token_length is the limit here; CLIP-L reads 75 tokens"
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.model_type == "chroma" and self.clip_l:
            yield "--clip_l: Chroma has no CLIP text encoder; leave it out"
        if self.model_type == "fill" and self.task == "edit":
            yield "--task edit: FLUX.1 Fill fills what masks cover and takes no pictures to edit: leave it out"
        if self.task == "edit" and self.model_type == "flux":
            yield "--task edit: FLUX.1 dev and schnell edit no pictures: take FLUX.1 Kontext, with --model_type kontext"


@dataclass(frozen=True)
class FluxFineTuneOptions(FineTuneOptions):
    """What full training of FLUX.1 has besides."""

    double_blocks_to_swap: int | None = option(
        None,
        help="In place of --blocks_to_swap: double blocks whose weights wait in main memory until they are needed.",
        check=at_least(0),
        zero_is_unset=True,
    )
    single_blocks_to_swap: int | None = option(
        None,
        help="In place of --blocks_to_swap: single blocks whose weights wait in main memory until they are needed.",
        check=at_least(0),
        zero_is_unset=True,
    )

    @property
    def swaps_blocks(self) -> bool:
        return bool(self.double_blocks_to_swap or self.single_blocks_to_swap)


@dataclass(frozen=True)
class FluxFlowOptions(SampledFlowOptions):
    """How FLUX.1 and Chroma are trained: which noise levels are drawn, what the loss compares, how it is weighted."""
