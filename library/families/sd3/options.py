# SPDX-License-Identifier: Apache-2.0
"""Options of Stable Diffusion 3 and 3.5 that say which model is trained, and what learns in full training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.families.finetune_options import FineTuneOptions
from library.families.options import FlowModelOptions, token_length
from library.objectives.flow_options import FlowOptions
from library.options import Idle, at_least, between, option, positive
from library.values import rate

T5_TOKENS = 256  # of SD3.5; SD3 medium saw 77 and takes as many

FORMER_SAVE = "text encoders that learn are written beside the checkpoint; what did not learn is in the files given"
NO_T5_PLACE = "T5 is loaded alone to encode the captions and freed before the model is loaded"


@dataclass(frozen=True)
class SD3Options(FlowModelOptions):
    """Stable Diffusion 3 and 3.5."""

    clip_l: str | None = option(
        None, help="CLIP-L: .safetensors file or transformers folder. Without it, that of the model.", path=True
    )
    clip_g: str | None = option(
        None, help="CLIP-G: .safetensors file or transformers folder. Without it, that of the model.", path=True
    )
    t5xxl: str | None = option(
        None, help="T5-XXL: .safetensors file or transformers folder. Without it, that of the model.", path=True
    )
    t5xxl_max_token_length: int = option(
        T5_TOKENS,
        help="Length of what T5 reads, in tokens: longer captions are cut, shorter ones are padded.",
        check=at_least(1, 8192),
        zero_is_unset=True,
    )
    apply_lg_attn_mask: bool = option(False, help="Set the states of CLIP-L and CLIP-G to zero where there is padding.")
    apply_t5_attn_mask: bool = option(
        False, help="Hide padding from T5 and set its states there to zero; cached outputs become as short as captions."
    )
    clip_l_dropout_rate: float = option(
        0.0, help="Share of the samples that train without the output of CLIP-L.", check=between(0, 1)
    )
    clip_g_dropout_rate: float = option(
        0.0, help="Share of the samples that train without the output of CLIP-G.", check=between(0, 1)
    )
    t5_dropout_rate: float = option(
        0.0, help="Share of the samples that train without the output of T5.", check=between(0, 1)
    )
    pos_emb_random_crop_rate: float = option(
        0.0,
        help="Share of the batches that see a random part of the table of positions in place of its middle (SD3.5M).",
        check=between(0, 1),
    )
    enable_scaled_pos_embed: bool = option(
        False,
        help="Stretch the positions of a 1024 x 1024 picture over pictures of other sizes (SD3.5M, experimental).",
    )
    save_clip: bool = option(False, help="Save CLIP-L and CLIP-G.", answer=FORMER_SAVE)
    save_t5xxl: bool = option(False, help="Save T5.", answer=FORMER_SAVE)
    t5xxl_device: str | None = option(None, help="Device of T5.", answer=NO_T5_PLACE)
    t5xxl_dtype: str | None = option(
        None, help="Precision of T5.", answer="T5 computes in --mixed_precision; a file in fp8 or fp16 is read as it is"
    )
    clip_skip: int | None = option(
        None,
        help="Not for this model.",
        check=at_least(0),
        answer="SD3 was trained on the last layer but one of both CLIPs, which is always used",
    )
    max_token_length: int | None = option(
        None,
        help="Not for this model.",
        parse=token_length,
        answer="CLIP reads 75 tokens of a caption here, and T5 --t5xxl_max_token_length",
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.pos_emb_random_crop_rate and self.enable_scaled_pos_embed:
            yield "--pos_emb_random_crop_rate and --enable_scaled_pos_embed exclude each other: use one of them"


@dataclass(frozen=True)
class SD3FineTuneOptions(FineTuneOptions):
    """What learns in full training of SD3 and SD3.5."""

    train_text_encoder: bool = option(False, help="Train CLIP-L and CLIP-G too.")
    train_t5xxl: bool = option(False, help="Train T5 too (it is larger than SD3 medium).")
    learning_rate_te1: float | None = option(
        None, help="Learning rate of CLIP-L; 0 leaves it as it is. Without it, --learning_rate.", check=rate
    )
    learning_rate_te2: float | None = option(
        None, help="Learning rate of CLIP-G; 0 leaves it as it is. Without it, --learning_rate.", check=rate
    )
    learning_rate_te3: float | None = option(
        None, help="Learning rate of T5; 0 leaves it as it is. Without it, --learning_rate.", check=rate
    )
    num_last_block_to_freeze: int | None = option(
        None, help="Leave so many blocks at the end of the model as they are.", check=at_least(0), zero_is_unset=True
    )
    use_t5xxl_cache_only: bool = option(
        False,
        help="Cache the outputs of T5 only.",
        answer="--cache_text_encoder_outputs always caches those encoders that do not learn, and only those",
    )

    def problems(self) -> Iterator[str]:
        if not self.train_text_encoder and (self.learning_rate_te1 or self.learning_rate_te2):
            yield Idle("--learning_rate_te1 and --learning_rate_te2 need --train_text_encoder")
        if not self.train_t5xxl and self.learning_rate_te3:
            yield Idle("--learning_rate_te3 needs --train_t5xxl")


@dataclass(frozen=True)
class SD3FlowOptions(FlowOptions):
    """How SD3 and SD3.5 are trained: which noise levels are drawn and how the loss is weighted."""

    training_shift: float = option(
        1.0, help="Shift of the drawn noise levels; above 1 draws more noise (3 in previews).", check=positive
    )

    @property
    def sampling(self) -> str:
        return "sd3"

    @property
    def shift(self) -> float:
        return self.training_shift

    @property
    def prediction(self) -> str:
        return "sigma_scaled"
