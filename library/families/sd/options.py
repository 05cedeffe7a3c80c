# SPDX-License-Identifier: Apache-2.0
"""Options of Stable Diffusion 1.x and 2.x that say which model is trained, and what learns in full training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.families.finetune_options import FineTuneOptions
from library.families.options import ModelOptions, token_length
from library.options import Idle, at_least, between, option
from library.values import rate


@dataclass(frozen=True)
class UnetOptions(ModelOptions):
    """What Stable Diffusion 1.x, 2.x and XL have in common: how edits are trained (--task edit)."""

    reference_dropout_rate: float = option(
        0.0,
        help="With --task edit: share of the captioned samples that learn without their reference picture. The paper's "
        "5 % each of no caption, no picture and neither: 0.056, with --joint_dropout_rate 0.5 and "
        "--caption_dropout_rate 0.1.",
        check=between(0, 1),
    )
    joint_dropout_rate: float = option(
        0.0,
        help="With --task edit: share of the samples with an empty caption (--caption_dropout_rate) that learn without "
        "their reference picture too.",
        check=between(0, 1),
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        for name in ("reference_dropout_rate", "joint_dropout_rate"):
            if vars(self)[name] and self.task != "edit":
                yield Idle(f"--{name} has no effect without --task edit")


@dataclass(frozen=True)
class SDOptions(UnetOptions):
    """Stable Diffusion 1.x and 2.x."""

    v2: bool = option(False, help="The model is Stable Diffusion 2.x.")
    v_parameterization: bool = option(False, help="The model predicts v instead of the noise (2.x 768-v, for example).")
    clip_skip: int | None = option(
        None,
        help="Use the n-th layer from the end of the text encoder, 1 being the last.",
        check=at_least(1),
        zero_is_unset=True,
    )
    max_token_length: int | None = option(
        None, help="Longest caption in tokens: 75, 150 or 225 (255 is taken as 225). Without it 75.", parse=token_length
    )
    weighted_captions: bool = option(False, help="Read (word:1.2), (word) and [word] in captions as weights.")
    no_half_vae: bool = option(False, help="Run the VAE in float32 also under mixed precision.")
    no_token_padding: bool = option(
        False, help="Train without the padding of captions: those of a batch are as long as its longest."
    )


@dataclass(frozen=True)
class SDFineTuneOptions(FineTuneOptions):
    """Full training of Stable Diffusion 1.x and 2.x."""

    train_text_encoder: bool = option(False, help="Train the text encoder too.")
    learning_rate_te: float | None = option(
        None, help="Learning rate of the text encoder; 0 leaves it as it is. Without it, --learning_rate.",
        check=rate,
    )  # fmt: skip
    diffusers_xformers: bool = option(
        False, help="Attention of xformers.", answer="torch's own attention is used, which is as fast"
    )

    def idle(self) -> Iterator[str]:
        if self.learning_rate_te and not self.train_text_encoder:
            yield "--learning_rate_te: no effect without --train_text_encoder"


@dataclass(frozen=True)
class DreamBoothOptions(SDFineTuneOptions):
    """What train_db.py has: the text encoder learns, unless it is told when to stop."""

    train_text_encoder: bool = option(True, help="Train the text encoder too.")
    stop_text_encoder_training: int | None = option(
        None, help="Leave the text encoder as it is from this step on; -1: from the start. Without it, it learns to "
        "the end.", check=at_least(-1),
    )  # fmt: skip

    @property
    def encoders_until(self) -> int | None:
        return self.stop_text_encoder_training

    def idle(self) -> Iterator[str]:
        learns = self.train_text_encoder and self.stop_text_encoder_training not in (-1, 0)
        if self.learning_rate_te and not learns:
            yield "--learning_rate_te: no effect, the text encoder does not learn"
