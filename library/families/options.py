# SPDX-License-Identifier: Apache-2.0
"""Options that say which model is trained. Each family has its own subclass of `ModelOptions`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, make_dataclass
from typing import ClassVar

from library.options import Choice, option, refused

# A graphical program writes 255 unless told otherwise: three chunks of text, as 225
TOKEN_LENGTHS = {"75": 75, "150": 150, "225": 225, "255": 225}


def token_length(value: object) -> int:
    """75, 150 or 225, as a number or text. Raises ValueError with what is expected."""
    found = TOKEN_LENGTHS.get(str(value).strip())
    if found is None:
        raise ValueError(f"expects 75, 150 or 225, got '{value}'")
    return found


@dataclass(frozen=True)
class Answered:
    """Options that the script of a method takes although they are another method's, and answers."""

    @classmethod
    def named(cls, names: Iterable[str], answer: str) -> type[Answered]:
        """A subclass with these options, all of which are numbers."""
        rows = [(name, float | None, option(None, help="Not for this method.", answer=answer)) for name in names]
        return make_dataclass(cls.__name__, rows, bases=(cls,), frozen=True)


@dataclass(frozen=True)
class ModelOptions:
    """Options of the model that every family has."""

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
    task: str | None = option(None, choices=("edit",), help="What the model learns; edit: to edit pictures.")

    @property
    def own_vae(self) -> str | None:
        """The VAE that takes the place of the model's own."""
        return self.vae

    def choices(self) -> Iterator[Choice]:
        """Values for options of other groups that options of the model stand for."""
        return iter(())

    def problems(self) -> Iterator[str]:
        if not self.pretrained_model_name_or_path:
            yield "--pretrained_model_name_or_path is missing: give a checkpoint file, a diffusers folder or a hub id"


@dataclass(frozen=True)
class FlowModelOptions(ModelOptions):
    """What all transformers have that are trained with flow matching. Options of U-Nets are answered."""

    no_half_vae: bool = option(False, help="Run the VAE in float32 also under mixed precision.")
    disable_mmap_load_safetensors: bool = option(
        False,
        help="Read the model without mapping its file.",
        answer="a tensor is only mapped where it is used as it lies in the file, and no tensor is read twice",
    )
    v2: bool = option(False, help="Not for this model.", check=refused("this is no Stable Diffusion 2.x"))
    v_parameterization: bool = option(
        False, help="Not for this model.", check=refused("it is trained with flow matching")
    )
    weighted_captions: bool = option(
        False, help="Not for this model.", check=refused("brackets are ordinary text for its text encoders")
    )
    clip_skip: int | None = option(
        None, help="Not for this model.", answer="text states are of the layer that the model was trained with"
    )
    max_token_length: int | None = option(
        None, help="Not for this model.", answer="it is for the CLIP of Stable Diffusion"
    )


@dataclass(frozen=True)
class SeparateAutoencoder(FlowModelOptions):
    """Options of models whose autoencoder is given with --ae."""

    vae: str | None = option(None, help="Not for this model.", check=refused("its autoencoder is given with --ae"))
    ae: str | None = option(
        None, help="Autoencoder: file, diffusers folder or hub id. Without it, that of the model.", path=True
    )

    @property
    def own_vae(self) -> str | None:
        return self.ae
