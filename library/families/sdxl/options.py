# SPDX-License-Identifier: Apache-2.0
"""Options of Stable Diffusion XL that say which model is trained, and what learns in full training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.families.finetune_options import FineTuneOptions
from library.families.options import token_length
from library.families.sd.options import UnetOptions
from library.families.sdxl.names import BLOCK_COUNT
from library.options import Idle, at_least, option, refused
from library.values import number, rate, shown


def block_rates(value: object) -> tuple[float, ...]:
    """`1e-5,0,...` as 23 rates, none below 0. Raises ValueError with what is expected."""
    items = value if isinstance(value, (list, tuple)) else str(value).split(",")
    if len(items) != BLOCK_COUNT:
        raise ValueError(f"needs {BLOCK_COUNT} values with commas, got {len(items)}")
    try:
        rates = tuple(number(item) for item in items)
    except ValueError:
        raise ValueError(f"expects numbers with commas, got {shown(str(value))}") from None
    if not all(rate >= 0 for rate in rates):
        raise ValueError(f"expects rates of at least 0, got {shown(str(value))}")
    return rates


@dataclass(frozen=True)
class SDXLOptions(UnetOptions):
    """Stable Diffusion XL."""

    v_parameterization: bool = option(False, help="The model predicts v instead of the noise, as some anime models do.")
    max_token_length: int | None = option(
        None, help="Longest caption in tokens: 75, 150 or 225 (255 is taken as 225). Without it 75.", parse=token_length
    )
    weighted_captions: bool = option(False, help="Read (word:1.2), (word) and [word] in captions as weights.")
    no_half_vae: bool = option(
        False, help="Run the VAE in float32 also under mixed precision: the published one overflows in fp16."
    )
    clip_skip: int | None = option(
        None,
        help="Not for this model.",
        check=at_least(0),
        answer="SDXL was trained on the last layer but one of both text encoders, which is always used",
    )
    disable_mmap_load_safetensors: bool = option(
        False,
        help="Read the model without mapping its file.",
        answer="a tensor is only mapped where it is used as it lies in the file, and no tensor is read twice",
    )
    v2: bool = option(False, help="Not for this model.", check=refused("SDXL is no Stable Diffusion 2.x"))


@dataclass(frozen=True)
class SDXLFineTuneOptions(FineTuneOptions):
    """What learns in full training of SDXL."""

    train_text_encoder: bool = option(False, help="Train both text encoders too.")
    learning_rate_te1: float | None = option(
        None, help="Learning rate of CLIP-L; 0 leaves it as it is. Without it, --learning_rate.", check=rate
    )
    learning_rate_te2: float | None = option(
        None, help="Learning rate of CLIP-G; 0 leaves it as it is. Without it, --learning_rate.", check=rate
    )
    block_lr: tuple[float, ...] | None = option(
        None,
        help="Learning rates of the U-Net's 23 blocks in place of --learning_rate, with commas: time and label "
        "embeddings, 9 input blocks, 3 middle ones, 9 output blocks, the last layers. 0 leaves a block as it is.",
        parse=block_rates,
    )
    diffusers_xformers: bool = option(
        False, help="Attention of xformers.", answer="torch's own memory-efficient attention is used"
    )

    def problems(self) -> Iterator[str]:
        if not self.train_text_encoder and (self.learning_rate_te1 or self.learning_rate_te2):
            yield Idle("--learning_rate_te1 and --learning_rate_te2 need --train_text_encoder")
