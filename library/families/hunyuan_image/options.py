# SPDX-License-Identifier: Apache-2.0
"""Options of HunyuanImage-2.1 that say which model is trained, and how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from library.families.options import FlowModelOptions
from library.objectives.flow_options import SampledFlowOptions
from library.options import Choice, Idle, at_least, option, positive

TOKEN_LENGTH = 1000  # what HunyuanImage-2.1 was trained with


@dataclass(frozen=True)
class HunyuanImageOptions(FlowModelOptions):
    """HunyuanImage-2.1, base and distilled."""

    cached_texts_stay: ClassVar[bool] = True
    text_encoder: str | None = option(
        None,
        help="Qwen2.5-VL 7B: .safetensors file, transformers folder or hub id. Without it, that of the model.",
        path=True,
    )
    byt5: str | None = option(
        None,
        help="ByT5 small, trained on glyphs, which reads what captions quote: .safetensors file, transformers folder "
        "or hub id. Without it, that of the model.",
        path=True,
    )
    text_encoder_max_token_length: int = option(
        TOKEN_LENGTH,
        help="Longest caption in tokens of Qwen2.5-VL, its end token included; what is longer is cut.",
        check=at_least(2, 8192),
        zero_is_unset=True,
    )
    guidance_scale: float = option(
        1.0,
        help="Guidance that the distilled model is told in training; 1 trains it as the model it was made of.",
        check=at_least(0),
    )
    fp8_scaled: bool = option(
        False, help="Keep the frozen denoiser in 8-bit floats, with scales: the same as --fp8_base_unet."
    )
    fp8_vl: bool = option(
        False,
        help="With --fp8_scaled: keep the text encoders in 8-bit floats as well, as --fp8_base does.",
    )
    text_encoder_cpu: bool = option(
        False,
        help="Run the text encoders on the processor.",
        answer="each is loaded alone to encode the captions and freed before the model is loaded",
    )
    vae_chunk_size: int | None = option(
        None,
        help="Rows of a picture that the VAE convolves at once.",
        check=at_least(1),
        zero_is_unset=True,
        answer="the VAE works on whole pictures; --vae_batch_size 1 and --cache_latents keep its memory small",
    )
    attn_mode: str | None = option(
        None,
        help="Implementation of attention.",
        choices=("torch", "xformers", "flash", "sageattn", "sdpa"),
        answer="attention goes through PyTorch, which takes its flash kernels wherever they fit; no package is needed",
    )
    split_attn: bool = option(
        False,
        help="Compute attention picture by picture.",
        answer="texts are cut to the longest of a batch and padding is hidden: the results are the same",
    )
    max_token_length: int | None = option(
        None,
        help="Not for this model.",
        answer="--text_encoder_max_token_length is the limit here; ByT5 reads 128 bytes of what is quoted",
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.attn_mode == "sageattn":
            yield "--attn_mode sageattn: SageAttention has no backward pass, so nothing would learn; leave it out"
        if self.fp8_vl and not self.fp8_scaled:
            yield Idle("--fp8_vl has no effect without --fp8_scaled: a file in fp8 is kept as it is")

    def choices(self) -> Iterator[Choice]:
        if self.fp8_scaled:
            name = "fp8_base" if self.fp8_vl else "fp8_base_unet"
            yield Choice(name, True, f"--{name} is chosen: it is what --fp8_scaled asks for")


@dataclass(frozen=True)
class HunyuanImageFlowOptions(SampledFlowOptions):
    """How HunyuanImage-2.1 is trained: which noise levels are drawn, what the loss compares, how it is weighted."""

    discrete_flow_shift: float = option(
        5.0, help="Shift of the sigma and shift samplings; above 1 draws more noise.", check=positive
    )
    model_prediction_type: str = option(
        "raw",
        help="What the loss compares: raw counts all noise levels alike, sigma_scaled counts noisy ones more.",
        choices=("raw", "additive", "sigma_scaled"),
    )
