# SPDX-License-Identifier: Apache-2.0
"""A run as the planner sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.data.plan import BatchPlan, each_shape
from library.families.family import ModelFamily
from library.learning import Learning, Models, Trainables
from library.memory.choice import MemoryChoice
from library.memory.options import MemoryOptions
from library.memory.quantise import Storage
from library.optim.optimizers import OptimizerChoice
from library.types import Batch

Loss = Callable[[Batch], Tensor]  # a batch -> its mean loss, 0-dim


def largest(epoch: Sequence[BatchPlan]) -> BatchPlan:
    """The batch with the most pixels, references included. epoch: not empty."""

    def pixels(plan: BatchPlan) -> int:
        return sum(width * height for width, height in (plan.bucket, *plan.references)) * len(plan.samples)

    return max(each_shape(epoch), key=pixels)


@dataclass(frozen=True)
class Planned:
    """A checked run whose models are not loaded yet: everything that determines the memory of a step."""

    family: ModelFamily
    learning: Learning
    choice: MemoryChoice  # as the options say, until the planner has chosen
    memory: MemoryOptions
    optimizer: OptimizerChoice
    batch: BatchPlan  # the largest of an epoch
    device: torch.device
    dtype: torch.dtype  # of the computation, and of frozen models
    trained_dtype: torch.dtype  # of the weights that learn
    build: Callable[[Models], Trainables]  # what learns on these models, built without reading a file
    loss_of: Callable[[Models, Trainables, nn.Module], Loss]  # the run's loss, with this module as the StepModule
    bf16_update: str = "plain"  # how weights in bf16 are updated: "stochastic", "kahan" or "plain"
    autocast: bool = False
    averages_weights: bool = False
    deepspeed: bool = False
    caches_latents: bool = False
    caches_texts: bool = False
    masked_loss: bool = False

    def storage(self, part: str) -> Storage:
        """How a model's matrices are kept."""
        return self.learning.storage(part, self.choice)

    def load_dtype(self, part: str) -> torch.dtype:
        """The dtype in which a model is loaded. Weights that learn are loaded as they will be kept, not rounded."""
        return self.trained_dtype if part in self.learning.changed else self.dtype
