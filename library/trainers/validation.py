# SPDX-License-Identifier: Apache-2.0
"""The loss over held-out pictures at fixed timesteps and with fixed noise: comparable between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from library.data.dataset import TrainingData
from library.data.plan import BatchPlan
from library.rng import torch_generator
from library.trainers.options import TrainOptions
from library.trainers.signals import Passes
from library.trainers.step import Pass


@dataclass(frozen=True)
class Validation:
    """The validation of a run. plans: batches of held-out pictures; if empty, validation is never due."""

    options: TrainOptions
    plans: Sequence[BatchPlan]
    data: TrainingData
    forward: Pass
    seed: int
    total_steps: int
    passes: Passes

    def is_due(self, step: int, epoch: int, *, epoch_ended: bool) -> bool:
        """Whether to validate after `step` steps and `epoch` whole epochs. It is always due at the end of the run."""
        options = self.options
        by_step = options.validate_every_n_steps is not None and step % options.validate_every_n_steps == 0
        every_epochs = options.validate_every_n_epochs or (1 if options.validate_every_n_steps is None else None)
        by_epoch = epoch_ended and every_epochs is not None and epoch % every_epochs == 0
        return bool(len(self.plans)) and (by_step or by_epoch or step == self.total_steps)

    @torch.no_grad()
    def loss(self) -> float | None:
        """Mean loss over batches and timesteps; None if the run is asked to stop first. Raises FailedElsewhere."""
        with self.passes.all_or_none():
            return self._loss()

    def _loss(self) -> float | None:
        device, losses = self.forward.device, []
        for index, plan in enumerate(self.plans[: self.options.max_validation_steps]):
            batch = self.data.load(plan, step=0).to(device)
            for value in self.forward.objective.validation_t():
                if self.passes.stopped():
                    return None
                generator = torch_generator(self.seed, "validation", index, device=device)
                t = torch.full((batch.size,), value, device=device)
                losses.append(self.forward.mean_loss(batch, generator, t))
        return torch.stack(losses).mean().item()
