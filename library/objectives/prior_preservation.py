# SPDX-License-Identifier: Apache-2.0
"""An objective around another one that trains some samples to keep the untrained model's prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from library.device import on_device
from library.objectives.base import Objective, Predict, Sampler
from library.types import Batch, Noised, like


@dataclass(frozen=True)
class PriorPreservation:
    """`inner` with the untrained model's prediction as the target of the samples in `Batch.keep_prior`.

    For custom_attributes.diff_output_preservation. Batches without such samples have no extra cost.
    """

    inner: Objective

    def loss(self, predict: Predict, noised: Noised, batch: Batch) -> Tensor:
        """Weighted loss per sample, (B,) float32. The trained model predicts first, then the untrained one."""
        if not any(batch.keep_prior):
            return self.inner.loss(predict, noised, batch)
        pred, prior = predict(noised), predict.untrained(noised)
        keep = like(on_device(torch.tensor(batch.keep_prior), prior.device), prior)
        kept = replace(noised, target=torch.where(keep, prior, noised.target))
        return self.inner.loss(replace(predict, trained=lambda _: pred), kept, batch)

    # ---- delegated to `inner` ----------------------------------------------------------------------------------------

    def sample_t(
        self, count: int, size: tuple[int, int], generator: torch.Generator, device: torch.device | str
    ) -> Tensor:
        return self.inner.sample_t(count, size, generator, device)

    def noise(self, latents: Tensor, t: Tensor, generator: torch.Generator) -> Noised:
        return self.inner.noise(latents, t, generator)

    def validation_t(self) -> list[int | float]:
        return self.inner.validation_t()

    def sampler(self, name: str, steps: int, *, size: tuple[int, int], shift: float | None = None) -> Sampler:
        return self.inner.sampler(name, steps, size=size, shift=shift)
