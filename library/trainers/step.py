# SPDX-License-Identifier: Apache-2.0
"""The training step, in reading order: latents, timesteps, noise, text, prediction, target and loss, backward pass,
optimizer step. `Pass` is the part up to the loss, which validation shares; `Step` is all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.device import seed_everything
from library.exchange import add_up
from library.families.family import ModelFamily
from library.learning import Models, Trainables
from library.objectives.base import Objective, Predict
from library.rng import derive_seed, torch_generator
from library.trainers.memory import Memory
from library.trainers.out_of_memory import Retry, changing_weights, encoded
from library.trainers.updates import Updates
from library.types import Batch, Cond, Noised, Tokens


@dataclass(frozen=True)
class Pass:
    """The forward pass of a batch, from its pictures to the predictions requested by the objective."""

    family: ModelFamily
    objective: Objective
    models: Models
    trainables: Trainables
    model: nn.Module  # the StepModule, as accelerate prepared it
    device: torch.device
    dtype: torch.dtype  # of the computation
    around: Callable[[], AbstractContextManager[None]] = nullcontext  # surrounds each prediction

    def noised(self, batch: Batch, generator: torch.Generator, t: Tensor | None = None) -> Noised:
        """The batch's latents with noise. t: (B), fixed in validation, drawn otherwise."""
        latents = self.latents(batch)
        if t is None:
            height, width = latents.shape[-2:]
            t = self.objective.sample_t(batch.size, (height, width), generator, self.device)
        return self.objective.noise(latents, t, generator)

    def latents(self, batch: Batch) -> Tensor:
        """Scaled latents (B C h w, float32), from the cache or from the VAE."""
        if batch.latents is not None:
            return batch.latents.float()
        assert batch.pixels is not None and self.models.vae is not None
        with torch.no_grad():
            encode = partial(self.family.encode_image, self.models.vae)
            return encoded(encode, batch.pixels, batch.latent_seeds).float()

    def with_references(self, batch: Batch) -> Batch:
        """The batch with the latents of its reference pictures, from the cache or from the VAE."""
        found, vae = batch.references, self.models.vae
        shown = () if found else self.family.shown(batch)
        if shown:
            assert vae is not None
            encode = partial(encoded, lambda pixels, seeds: self.family.encode_reference(vae, pixels))
            with torch.no_grad():
                found = self.family.encode_references(lambda pixels: encode(pixels, batch.latent_seeds), shown)
        return replace(batch, references=tuple(latents.float() for latents in found))

    def tokens(self, batch: Batch) -> Tokens:
        """The tokens of the captions, on the device."""
        return self.family.tokenize_with(batch.captions, [*zip(*batch.reference_pixels)]).to(self.device)

    def predict(self, batch: Batch) -> Predict:
        """The model's predictions for this batch, as functions that the objective calls."""
        self.trainables.set_multiplier(batch.network_multiplier)

        def trained(noised: Noised) -> Tensor:
            complete = self.with_references(batch)
            tokens = self.tokens(batch) if self.models.encoders else None
            with self.around():
                return self.model(noised.x_t.to(self.dtype), noised.t, complete, tokens).float()

        def untrained(noised: Noised) -> Tensor:
            with torch.no_grad(), self.trainables.base_model():
                return trained(noised)

        return Predict(trained, untrained)

    def mean_loss(self, batch: Batch, generator: torch.Generator, t: Tensor | None = None) -> Tensor:
        """The mean loss of a batch, without a backward pass."""
        noised = self.noised(batch, generator, t)
        return self.objective.loss(self.predict(batch), noised, batch).mean()


@dataclass(frozen=True)
class StepResult:
    """The numbers of an optimizer step. Tensors are 0-dim and still on the device."""

    loss: Tensor  # mean over the micro-batches of all processes
    own_loss: Tensor  # this process's part of it
    grad_norm: Tensor  # before clipping
    others: dict[str, float | Tensor]  # learning rates and values logged by the method


@dataclass(frozen=True)
class Step:
    """The optimizer step of a run.

    Noise, timesteps and dropout depend only on the seed and `Batch.position`: the number of processes that share the
    batches of a step does not change them.
    """

    forward: Pass
    updates: Updates
    memory: Memory
    retry: Retry
    accelerator: Accelerator
    seed: int

    def take(self, batches: Sequence[Batch], step: int, average_loss: float | None) -> StepResult:
        """Take optimizer step `step`, counted from 0, over its micro-batches.

        average_loss: of the previous steps, if the schedule follows it. Raises DoesNotFit and HalfDone.
        """
        trainables = self.forward.trainables
        trainables.before_step(step)

        def accumulate() -> Tensor:
            total = torch.zeros((), device=self.forward.device)
            for batch in batches:
                total += self.learn(batch, is_last=batch is batches[-1])
            return total

        loss = self.retry(accumulate, largest_batch=max(batch.size for batch in batches), step=step)
        mean_loss = loss.clone()
        if self.accelerator.num_processes > 1:
            add_up(mean_loss)
        with changing_weights(step):
            grad_norm = self.updates.step()
            rates = self.updates.rates()
            self.updates.scheduler.step(average_loss)
            more = trainables.after_step()
            self.updates.finish_step(step)
        return StepResult(mean_loss, loss, grad_norm, {**rates, **more})

    def learn(self, batch: Batch, *, is_last: bool) -> Tensor:
        """Backward pass of one micro-batch. Returns its mean loss times its share of the step."""
        forward, total = self.forward, torch.zeros((), device=self.forward.device)
        generator = torch_generator(self.seed, "noise", batch.position, 0, device=forward.device)
        seed_everything(derive_seed(self.seed, "dropout", batch.position, 0))
        there = replace(batch, seed=derive_seed(self.seed, "family", batch.position)).to(forward.device)
        noised = forward.noised(there, generator)
        parts = list(self.parts(there, noised, batch.cond))
        for index, (part, noised) in enumerate(parts):
            with self.updates.backward(is_last=is_last and index == len(parts) - 1):
                losses = forward.objective.loss(forward.predict(part), noised, part)  # per sample
                loss = losses.sum() * (batch.share / batch.size)
                self.accelerator.backward(loss * self.updates.loss_factor)
            total += loss.detach()
        return total

    def parts(self, batch: Batch, noised: Noised, cond: Cond | None) -> Iterator[tuple[Batch, Noised]]:
        """Split the batch into parts of `memory.most_samples`, with the same samples, noise and timesteps.

        cond: of the batch, on the host, where the length of each text can be read without waiting for the device.
        """
        most, family = self.memory.most_samples, self.forward.family
        if most is None or batch.size <= most:
            yield batch, noised
            return
        conds = family.split_cond(cond) if cond is not None else None
        for start in range(0, batch.size, most):
            rows = slice(start, start + most)
            joined = family.join_conds(conds[rows]) if conds is not None else None  # padded to its own longest
            part = replace(batch.part(rows), cond=joined, seed=derive_seed(batch.seed or 0, start))
            yield part.to(self.forward.device), noised.part(rows)
