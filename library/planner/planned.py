# SPDX-License-Identifier: Apache-2.0
"""A run as the planner sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.data.plan import BatchPlan, each_shape
from library.families.family import ModelFamily
from library.learning import DENOISER, Learning, Models, Trainables
from library.memory.choice import MemoryChoice
from library.memory.options import MemoryOptions
from library.memory.quantise import Storage
from library.memory.sharding import splittable
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
    processes: int = 1  # between which the denoiser's weights are split (--shard_base)
    caches_latents: bool = False
    caches_texts: bool = False
    masked_loss: bool = False

    @property
    def shards_learn(self) -> bool:
        """Whether weights that learn are split between processes."""
        return self.processes > 1 and DENOISER in self.learning.changed

    @property
    def pass_dtype(self) -> torch.dtype:
        """Dtype in which weights that learn enter a pass: split ones are gathered in that of the computation."""
        return self.dtype if self.shards_learn and self.autocast else self.trained_dtype

    def split_weights(self, denoiser: nn.Module) -> set[Tensor]:
        """The denoiser's weights of which each process has some rows."""
        if self.processes == 1:
            return set()
        if not self.shards_learn:
            return {*denoiser.parameters()}
        optional = self.family.optional(denoiser)
        return splittable(denoiser, optional, block=self.optimizer.row.block or 1, processes=self.processes)

    def storage(self, part: str) -> Storage:
        """How a model's matrices are kept."""
        return self.learning.storage(part, self.choice)

    def load_dtype(self, part: str) -> torch.dtype:
        """The dtype in which a model is loaded. Weights that learn are loaded as they will be kept, not rounded."""
        return self.trained_dtype if part in self.learning.changed else self.dtype
