# SPDX-License-Identifier: Apache-2.0
"""An objective around another one that keeps the untrained model's prediction: of some samples, or outside of masks."""

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

    For custom_attributes.diff_output_preservation. masked_weight (--masked_prior_weight): where masks are black, the
    same target counts with this weight: inner.loss(masks, target) + masked_weight * inner.loss(1 - masks, prior).
    Batches without such samples and masks have no extra cost.
    """

    inner: Objective
    masked_weight: float = 0.0

    def loss(self, predict: Predict, noised: Noised, batch: Batch) -> Tensor:
        """Weighted loss per sample, (B,) float32. The untrained model predicts first, then the trained one."""
        hidden = 1 - batch.masks if self.masked_weight and batch.masks is not None else None
        if hidden is None and not any(batch.keep_prior):
            return self.inner.loss(predict, noised, batch)
        prior = predict.untrained(noised)
        pred = predict(noised)
        predicted = replace(predict, trained=lambda _: pred)
        keep = like(on_device(torch.tensor(batch.keep_prior), prior.device), prior)
        loss = self.inner.loss(predicted, replace(noised, target=torch.where(keep, prior, noised.target)), batch)
        if hidden is None:
            return loss
        outside = self.inner.loss(predicted, replace(noised, target=prior), replace(batch, masks=hidden))
        return loss + self.masked_weight * outside

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
