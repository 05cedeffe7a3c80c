# SPDX-License-Identifier: Apache-2.0
"""From a batch to the loss of each sample: steps 2 to 7 of docs/architecture.md, for training and validation alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from library.device import on_device
from library.families.family import ModelFamily
from library.objectives.base import Objective
from library.trainers.shortage import encoded
from library.trainers.trainables import Models, Trainables
from library.types import Batch, Cond, Noised, Tokens, like


@dataclass(frozen=True)
class Forward:
    """The pass of one batch through everything. `model` is the StepModule, as accelerate prepared it."""

    family: ModelFamily
    objective: Objective
    models: Models
    trainables: Trainables
    model: nn.Module
    device: torch.device
    dtype: torch.dtype  # of the computation
    around: Callable[[], AbstractContextManager[None]]  # of each prediction: what becomes of its activations

    def noised(self, batch: Batch, generator: torch.Generator, t: Tensor | None = None) -> Noised:
        """Noise on the batch's latents. `t` (B) is fixed in validation, drawn otherwise."""
        latents = self.latents_of(batch)
        if t is None:
            height, width = latents.shape[-2:]
            t = self.objective.sample_t(batch.size, (height, width), generator, self.device)
        return self.objective.noise(latents, t, generator)

    def mean_loss(self, batch: Batch, generator: torch.Generator, t: Tensor | None = None) -> Tensor:
        """The mean loss of the batch as a whole."""
        return self.losses(batch, self.noised(batch, generator, t)).mean()

    def losses(self, batch: Batch, noised: Noised) -> Tensor:
        """The loss of each sample (B), weighted."""
        self.trainables.set_multiplier(batch.network_multiplier)
        pred = self.predict(noised, batch)
        if any(batch.keep_prior):
            noised = self.with_prior_target(noised, batch)
        return self.objective.loss(pred, noised, batch)

    def parts(
        self, batch: Batch, noised: Noised, most: int | None, cond: Cond | None
    ) -> Iterator[tuple[Batch, Noised]]:
        """The batch in parts of at most `most` samples: the same samples, noise and timesteps.

        cond: the batch's, as it was loaded: how long each text is can be seen on the host only.
        """
        if most is None or batch.size <= most:
            yield batch, noised
            return
        conds = self.family.split_cond(cond) if cond is not None else None
        for start in range(0, batch.size, most):
            rows = slice(start, start + most)
            joined = self.family.join_conds(conds[rows]) if conds is not None else None  # padded to its own longest
            yield replace(batch.part(rows), cond=joined).to(self.device), noised.part(rows)

    def latents_of(self, batch: Batch) -> Tensor:
        if batch.latents is not None:
            return batch.latents.float()
        assert batch.pixels is not None and self.models.vae is not None
        with torch.no_grad():
            encode = partial(self.family.encode_image, self.models.vae)
            return encoded(encode, batch.pixels, batch.latent_seeds).float()

    def with_references(self, batch: Batch) -> Batch:
        """The batch with the latents of its reference pictures, from the cache or encoded here."""
        found, vae = batch.references, self.models.vae
        if batch.reference_pixels and not found:
            assert vae is not None
            with torch.no_grad():
                encode = partial(encoded, lambda pixels, seeds: self.family.encode_reference(vae, pixels))
                found = tuple(encode(pixels, batch.latent_seeds) for pixels in batch.reference_pixels)
        return replace(batch, references=tuple(latents.float() for latents in found))

    def tokens(self, batch: Batch) -> Tokens:
        """What the text encoders get, on the device."""
        return self.family.tokenize_with(batch.captions, [*zip(*batch.reference_pixels)]).to(self.device)

    def predict(self, noised: Noised, batch: Batch) -> Tensor:
        batch = self.with_references(batch)
        tokens = self.tokens(batch) if self.models.encoders else None
        with self.around():
            return self.model(noised.x_t.to(self.dtype), noised.t, batch, tokens).float()

    def with_prior_target(self, noised: Noised, batch: Batch) -> Noised:
        """custom_attributes.diff_output_preservation: these samples learn what the untrained model says."""
        with torch.no_grad(), self.trainables.base_model():
            prior = self.predict(noised, batch)
        keep = like(on_device(torch.tensor(batch.keep_prior), self.device), prior)
        return replace(noised, target=torch.where(keep, prior, noised.target))
