# SPDX-License-Identifier: Apache-2.0
"""Options that say which model is trained. Each family has its own subclass of `ModelOptions`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from library.options import at_least, option

# A graphical program writes 255 unless told otherwise: three chunks of text, as 225
TOKEN_LENGTHS = {"75": 75, "150": 150, "225": 225, "255": 225}


def token_length(value: object) -> int:
    """75, 150 or 225, as a number or text. Raises ValueError with what is expected."""
    found = TOKEN_LENGTHS.get(str(value).strip())
    if found is None:
        raise ValueError(f"expects 75, 150 or 225, got '{value}'")
    return found


@dataclass(frozen=True)
class ModelOptions:
    """What every family has."""

    cached_texts_stay: ClassVar[bool] = False  # caching captions alone says that text encoders do not learn

    pretrained_model_name_or_path: str | None = option(
        None, help="Model to start from: .safetensors or .ckpt file, diffusers folder, or hub id (org/name).", path=True
    )
    vae: str | None = option(
        None, help="VAE to use in place of the model's own: file, diffusers folder or hub id.", path=True
    )
    tokenizer_cache_dir: str | None = option(
        None,
        help="Folder that keeps tokenizers, so that a machine without network can train from a single file.",
        path=True,
    )

    def problems(self) -> Iterator[str]:
        if not self.pretrained_model_name_or_path:
            yield "--pretrained_model_name_or_path is missing: give a checkpoint file, a diffusers folder or a hub id"


@dataclass(frozen=True)
class SDOptions(ModelOptions):
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
