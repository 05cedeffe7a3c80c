# SPDX-License-Identifier: Apache-2.0
"""The options of full training. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from library.io.options import SaveOptions
from library.models.finetune_options import FineTuneOptions
from library.options import option
from library.trainers.options import TrainerOptions

FORMATS = ("ckpt", "safetensors", "diffusers", "diffusers_safetensors")
ONE_FORMAT = "this model is always saved as .safetensors, under the names in which it was published"


def only_safetensors(value: Any) -> str:
    """Every format that other models can be saved in means the one that there is."""
    return "safetensors" if value in FORMATS else str(value)


@dataclass(frozen=True)
class CheckpointOptions(SaveOptions):
    """Where, when and how the model is written. 0 means the same as not given."""

    save_model_as: str = option(
        "safetensors", choices=FORMATS, parse=only_safetensors, help="Format of the model.", answer=ONE_FORMAT
    )
    use_safetensors: bool = option(False, help="Save as .safetensors.", answer=ONE_FORMAT)


@dataclass(frozen=True)
class FineTuneTrainerOptions(TrainerOptions):
    """Full training."""

    save: CheckpointOptions
    finetune: FineTuneOptions
