# SPDX-License-Identifier: Apache-2.0
"""Flow matching along straight lines from pictures to noise: FLUX.1, FLUX.2, Chroma, SD3, Lumina-Image 2.0, SANA.

s is the noise level ("sigma"), 0 for a clean latent x0 and 1 for noise n: x_s = (1 - s) x0 + s n. The model predicts
the velocity n - x0 (Liu et al. 2022, "Flow Straight and Fast", eq. 1; Esser et al. 2024, "Scaling Rectified Flow
Transformers", eq. 13).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from library.errors import UserError, raise_problems
from library.log import get_logger
from library.objectives.base import Predict, Sampler
from library.objectives.flow_options import FlowOptions, huber_problems
from library.objectives.loss import MEASURES, per_sample, scheduled_threshold
from library.objectives.noise import draw, perturb
from library.objectives.options import LossOptions
from library.objectives.samplers import FLOW_SAMPLERS, SAMPLERS, build_flow_sampler
from library.types import Batch, Noised, like

NUM_TIMESTEPS = 1000  # options give noise levels in thousandths, and "sigma" and SD3 draw them so
SMALLEST_SIGMA = 1e-6  # lower bound in weights that divide by sigma: SD3 may draw 0
VALIDATION_POINTS = 4

LatentSize = tuple[int, int]  # (h, w) of a latent
Shift = Callable[[LatentSize], float]  # latent size -> factor k of `shifted`


# ---- shifts -------------------------------------------------------------------------------------------------------


def shifted(s: Tensor, k: float) -> Tensor:
    """Noise levels shifted towards 1 for k > 1: k s / (1 + (k - 1) s), Esser et al. 2024, eq. 23."""
    return s * k / (1 + (k - 1) * s)


def constant_shift(k: float) -> Shift:
    """The same factor for every size; 1 means no shift."""
    return lambda size: k


def resolution_shift(size: LatentSize) -> float:
    """FLUX.1's factor e^mu: mu is linear in the tokens of 2 x 2 latent pixels, 0.5 at 256 and 1.15 at 4096."""
    tokens = (size[0] // 2) * (size[1] // 2)
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


# ---- distribution of noise levels ---------------------------------------------------------------------------------


def density(x: Tensor, options: FlowOptions) -> Tensor:
    """Map random numbers x to the distribution of --weighting_scheme over 0..1 (Esser et al. 2024, section 3.1)."""
    if options.weighting_scheme == "logit_normal":  # eq. 19
        return torch.sigmoid(options.logit_mean + options.logit_std * x)
    if options.weighting_scheme == "mode":  # eq. 20
        return 1 - x - options.mode_scale * (torch.cos(math.pi / 2 * x) ** 2 - 1 + x)
    return x


def _from_table(u: Tensor, k: float) -> Tensor:
    """Entry floor(1000 u) of the table 1, 0.999, ..., 0.001, shifted by k."""
    index = (u * NUM_TIMESTEPS).floor().clamp(0, NUM_TIMESTEPS - 1)
    return shifted((NUM_TIMESTEPS - index) / NUM_TIMESTEPS, k)


def _sigmoid(x: Tensor, options: FlowOptions) -> Tensor:
    return torch.sigmoid(options.steepness * x)


# `FlowOptions.sampling` -> (random numbers, options, latent size) -> noise levels, before the range of timesteps
SAMPLINGS: dict[str, Callable[[Tensor, FlowOptions, LatentSize], Tensor]] = {
    "sigma": lambda x, options, size: _from_table(density(x, options), options.shift),
    "uniform": lambda x, options, size: x,
    "sigmoid": lambda x, options, size: _sigmoid(x, options),
    "shift": lambda x, options, size: shifted(_sigmoid(x, options), options.shift),
    "flux_shift": lambda x, options, size: shifted(_sigmoid(x, options), resolution_shift(size)),
    # FLUX.2's latents are one pixel per token
    "flux2_shift": lambda x, options, size: shifted(_sigmoid(x, options), resolution_shift((2 * size[0], 2 * size[1]))),
    "nextdit_shift": lambda x, options, size: shifted(x, resolution_shift(size)),
    "sd3": lambda x, options, size: shifted(density(x, options), options.shift),
}
WHOLE_TIMESTEPS = ("sd3",)  # samplings whose noise levels are finally rounded down to thousandths


def noise_levels(x: Tensor, options: FlowOptions, size: LatentSize) -> Tensor:
    """Noise levels, (B,) float32 in [0, 1], from x (B): normal numbers if `options.draws_normal`, else uniform ones.

    The part of `FlowObjective.sample_t` without random draws. The distribution is scaled to the range of timesteps.
    """
    low, high = options.timestep_range
    t = SAMPLINGS[options.sampling](x, options, size) * (high - low) + low
    return (t.floor() if options.sampling in WHOLE_TIMESTEPS else t) / NUM_TIMESTEPS


# ---- form of the prediction ---------------------------------------------------------------------------------------

# `FlowOptions.prediction` -> (velocity, x_s, s) -> the quantity that the loss compares (decision 0005)
PREDICTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "raw": lambda velocity, x_s, s: velocity,
    "additive": lambda velocity, x_s, s: velocity + x_s,
    "sigma_scaled": lambda velocity, x_s, s: x_s - s * velocity,  # the clean latent
}


def loss_weights(s: Tensor, scheme: str) -> Tensor:
    """Loss weights of noise levels s under --weighting_scheme, in the shape of s."""
    if scheme == "sigma_sqrt":
        return s.clamp(min=SMALLEST_SIGMA) ** -2
    if scheme == "cosmap":  # Esser et al. 2024, eq. 21
        return 2 / (math.pi * (1 - 2 * s + 2 * s**2))
    return torch.ones_like(s)


# ---- the objective ------------------------------------------------------------------------------------------------


class FlowObjective:
    """The model predicts the velocity n - x0 of rectified flow.

    All arithmetic is float32, whatever the dtype of the latents. `Noised.t` is the noise level s in [0, 1] and
    `Noised.target` is n - x0, whatever --model_prediction_type says; `loss` converts both sides into that form.

    preview_shift: latent size (h, w) -> factor k that shifts the noise levels of previews unless the prompt gives one:
    `resolution_shift` for FLUX.1 dev, `constant_shift(1.0)` for schnell, `constant_shift(3.0)` for SD3. Raises
    UserError for a loss that is not defined for flows.
    """

    def __init__(self, options: FlowOptions, loss: LossOptions, *, preview_shift: Shift) -> None:
        raise_problems(huber_problems(loss))
        self.options, self.loss_options, self.preview_shift = options, loss, preview_shift
        self._replaced: set[str] = set()  # requested samplers that only other models have

    def sample_t(self, count: int, size: LatentSize, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """Noise levels, (B,) float32 in [0, 1], distributed by --timestep_sampling for this latent size."""
        make = torch.randn if self.options.draws_normal else torch.rand
        return noise_levels(make(count, generator=generator, device=device), self.options, size)

    def noise(self, latents: Tensor, t: Tensor, generator: torch.Generator) -> Noised:
        """Add noise to latents (B C h w, any float dtype) for noise levels t (B). The result is float32.

        Order of the draws: noise, then those of `perturb`.
        """
        latents = latents.float()
        noise = draw(tuple(latents.shape), generator)
        return self.noised(latents, t, noise, seen=perturb(noise, self.options, generator))

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor, *, seen: Tensor) -> Noised:
        """The part of `noise` without random draws. seen: the noise in the input; noise: the noise in the target."""
        s = like(t, latents)
        scheme = self.options.weighting_scheme if self.options.weights_loss else "none"
        return Noised(
            x_t=(1 - s) * latents + s * seen,
            t=t,
            noise=noise,
            target=noise - latents,
            weight=loss_weights(t, scheme),
        )

    def loss(self, predict: Predict, noised: Noised, batch: Batch) -> Tensor:
        """Weighted loss per sample, (B,) float32: mask, mean over C h w, prior weight, weight of the noise level.

        Prediction and target are transformed alike, so that a perfect prediction has loss 0 (decision 0005).
        """
        pred = predict(noised).float()
        s = like(noised.t, pred)
        form = PREDICTIONS[self.options.prediction]
        measure = MEASURES[self.loss_options.loss_type]
        elements = measure(
            form(pred, noised.x_t, s),
            form(noised.target, noised.x_t, s),
            scheduled_threshold(self.loss_options, s),
        )
        return per_sample(elements, batch.masks) * batch.loss_weights.to(elements.device) * noised.weight

    def validation_t(self) -> list[int | float]:
        """Noise levels that divide the range of timesteps into equal parts: 0.2, 0.4, 0.6, 0.8 by default."""
        low, high = self.options.timestep_range
        parts = VALIDATION_POINTS + 1
        return [(low + (high - low) * i / parts) / NUM_TIMESTEPS for i in range(1, parts)]

    def sampler(self, name: str, steps: int, *, size: LatentSize, shift: float | None = None) -> Sampler:
        """A sampler from noise level 1 down to 0 in `steps` steps, evenly spaced before the shift.

        Samplers that only other models have, which graphical programs write unasked, are replaced by Euler's method,
        with a warning. Raises UserError for an unknown name and for a shift that is not greater than 0.
        """
        if name in SAMPLERS and name not in FLOW_SAMPLERS:
            if name not in self._replaced:
                works = ", ".join(FLOW_SAMPLERS)
                get_logger().warning(f"sampler {name} is not for flow models: euler is used (there are {works})")
            self._replaced.add(name)
            name = "euler"
        k = self.preview_shift(size) if shift is None else shift
        if k <= 0:
            raise UserError(f"--fs {k}: the shift of a preview must be greater than 0")
        return build_flow_sampler(name, shifted(torch.linspace(1, 0, steps + 1), k))
