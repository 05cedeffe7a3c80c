# SPDX-License-Identifier: Apache-2.0
"""What learns in full training of Stable Diffusion 1.x and 2.x: options of fine_tune.py and of train_db.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.families.finetune_options import FineTuneOptions
from library.options import at_least, option
from library.values import rate


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
