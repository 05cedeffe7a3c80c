# SPDX-License-Identifier: Apache-2.0
"""The options of full training. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.families.finetune_options import FineTuneOptions
from library.families.sd.options import DreamBoothOptions
from library.io.options import SaveOptions
from library.optim.options import IN_BACKWARD, FullOptimizerOptions
from library.options import Choice, option
from library.trainers.options import TrainerOptions

FORMATS = ("ckpt", "safetensors", "diffusers", "diffusers_safetensors")
ONE_FORMAT = "this model is always saved as .safetensors, under the names in which it was published"
SAFE = {"ckpt": "safetensors", "diffusers": "diffusers_safetensors"}  # what --use_safetensors makes of a format


@dataclass(frozen=True)
class CheckpointOptions(SaveOptions):
    """Where, when and how the model is written. 0 means the same as not given."""

    save_model_as: str = option(  # no `| None`: SaveOptions knows a text only
        None,
        choices=FORMATS,
        help="Format of the model: one file, or a folder as diffusers has it. Without it, what was given to start from "
        "is followed: ckpt after a file, diffusers after a folder. Where a model has one format only, that is used.",
    )
    use_safetensors: bool = option(False, help="Write safetensors in place of pickles, in a file or a folder.")

    def format_after(self, *, is_file: bool) -> str:
        """The format that is asked for by a run that starts from a file or from a folder: one of FORMATS."""
        kind = self.save_model_as or ("ckpt" if is_file else "diffusers")
        return SAFE.get(kind, kind) if self.use_safetensors else kind


@dataclass(frozen=True)
class FineTuneTrainerOptions(TrainerOptions):
    """Full training."""

    optimizer: FullOptimizerOptions
    save: CheckpointOptions
    finetune: FineTuneOptions

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.loss.masked_prior_weight:
            yield (
                "--masked_prior_weight needs the untrained model, which full training changes: leave it out, or train "
                "a network"
            )

    def choices(self) -> Iterator[Choice]:
        """Weights that learn can only wait in main memory when each is stepped while it is on the card."""
        yield from super().choices()
        swaps = self.memory.blocks_to_swap is not None or self.finetune.swaps_blocks
        if swaps and self.optimizer.in_backward is None and not self.distributed.deepspeed:
            line = f"--fused_backward_pass is chosen, which --blocks_to_swap needs: weights are stepped {IN_BACKWARD}"
            yield Choice("fused_backward_pass", True, line)


@dataclass(frozen=True)
class DreamBoothTrainerOptions(FineTuneTrainerOptions):
    """train_db.py: full training, a text encoder that learns, and when it stops."""

    finetune: DreamBoothOptions
