# SPDX-License-Identifier: Apache-2.0
"""The options of full training. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
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

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.finetune.bf16_update and not self.precision.full_bf16:
            yield "--bf16_update has no effect without --full_bf16: weights are kept in float32"

    @property
    def bf16_update(self) -> str:
        """How weights in bf16 are updated: "stochastic", "kahan" or "none"."""
        if not self.precision.full_bf16 or self.distributed.deepspeed:  # DeepSpeed keeps float32 weights by itself
            return "none"
        return self.finetune.bf16_update or "stochastic"
