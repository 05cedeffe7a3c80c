# SPDX-License-Identifier: Apache-2.0
"""The interfaces of objectives and samplers. B batch, C channels, h w latent height and width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from library.types import Batch, Noised


class Sampler(Protocol):
    """Denoises a latent: `x = randn * init_noise_sigma`, then one `step` per entry of `timesteps`."""

    timesteps: Tensor  # in the order of use; some samplers visit a timestep twice
    init_noise_sigma: float

    def scale_input(self, x: Tensor, t: Tensor) -> Tensor:
        """The model's input for the state `x` at `t`."""
        ...

    def step(self, pred: Tensor, t: Tensor, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """The next, less noisy state. `pred` is the model's output for `scale_input(x, t)`."""
        ...


@dataclass(frozen=True)
class Predict:
    """Predictions of the model for one batch, B C h w float32. `predict(noised)` is that of the model in training."""

    trained: Callable[[Noised], Tensor]
    untrained: Callable[[Noised], Tensor]  # the model as it was before the training, without gradient

    def __call__(self, noised: Noised) -> Tensor:
        return self.trained(noised)

    @classmethod
    def of(cls, pred: Tensor) -> Predict:
        """A prediction that exists already, for both models."""
        return cls(lambda noised: pred, lambda noised: pred)


class Objective(Protocol):
    """How latents are noised and what the model must predict from them. Pure, with explicit generators."""

    def sample_t(
        self, count: int, size: tuple[int, int], generator: torch.Generator, device: torch.device | str
    ) -> Tensor:
        """Draw timesteps for a batch, (B,), from `generator`, which must be on `device`. size: (h, w) of the latents.

        DDPM: int64 timesteps; flow: float32 noise levels in [0, 1].
        """
        ...

    def noise(self, latents: Tensor, t: Tensor, generator: torch.Generator) -> Noised:
        """Add noise to clean latents (B C h w) for timesteps `t` (B)."""
        ...

    def loss(self, predict: Predict, noised: Noised, batch: Batch) -> Tensor:
        """Weighted loss per sample, (B,) float32. The trainer takes the mean over the batch.

        predict: called for as many predictions as the objective needs, always in the same order.
        """
        ...

    def validation_t(self) -> list[int | float]:
        """The fixed timesteps at which a validation loss is measured."""
        ...

    def sampler(self, name: str, steps: int, *, size: tuple[int, int], shift: float | None = None) -> Sampler:
        """A new sampler for one picture (samplers keep state between steps). Raises UserError for an unknown name.

        size: (h, w) of the latent. shift: shift of the noise levels in place of the model's own; flow only.
        """
        ...
