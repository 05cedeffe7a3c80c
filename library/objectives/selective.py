# SPDX-License-Identifier: Apache-2.0
"""An objective around another one: masks count relative to their area, and what a mask hides, or samples marked so, may
keep the untrained model's prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from library.device import on_device
from library.objectives.base import Objective, Predict, Sampler
from library.objectives.loss import DARK, in_latents
from library.objectives.options import LossOptions
from library.types import Batch, Noised, like


@dataclass(frozen=True)
class SelectiveObjective:
    """`inner` for parts of pictures. With the mask m (h w, in [0, 1]) of a sample, and `inner`'s loss e of each element
    against the target, e0 against the untrained model's prediction, the sample's loss is

        mean(m e)             + W mean((1 - m) e0)      W: --masked_prior_weight, 0 if not given
        mean(m e) / mean(m)   + W mean((1 - m) e0)      with --masked_loss_normalize

    where a mask without a value of at least DARK / 255 makes the first summand 0. In the samples of `Batch.keep_prior`
    (custom_attributes.diff_output_preservation) e is e0. The untrained model is asked only if a batch needs it.
    """

    inner: Objective
    options: LossOptions

    def loss(self, predict: Predict, noised: Noised, batch: Batch) -> Tensor:
        """Weighted loss per sample, (B,) float32. The untrained model predicts first: no activations wait for it."""
        outside = self.options.masked_prior_weight or 0.0 if batch.masks is not None else 0.0
        if not any(batch.keep_prior) and not outside:
            return self._inside(predict, noised, batch)
        prior = predict.untrained(noised)
        pred = predict(noised)
        predict = replace(predict, trained=lambda _: pred)
        kept = replace(noised, target=prior)
        if any(batch.keep_prior):
            keep = like(on_device(torch.tensor(batch.keep_prior), prior.device), prior)
            noised = replace(noised, target=torch.where(keep, prior, noised.target))
        loss = self._inside(predict, noised, batch)
        if outside:
            assert batch.masks is not None
            loss = loss + outside * self.inner.loss(predict, kept, replace(batch, masks=1 - batch.masks))
        return loss

    def _inside(self, predict: Predict, noised: Noised, batch: Batch) -> Tensor:
        """The loss where the masks are white, (B,)."""
        loss = self.inner.loss(predict, noised, batch)
        if batch.masks is None or not self.options.masked_loss_normalize:
            return loss
        masks = in_latents(batch.masks, noised.x_t).flatten(1)
        counts = masks.amax(1) >= DARK / 255
        return torch.where(counts, loss / torch.where(counts, masks.mean(1), 1.0), 0.0)

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
