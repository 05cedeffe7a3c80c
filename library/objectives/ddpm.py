# SPDX-License-Identifier: Apache-2.0
"""Denoising diffusion with discrete timesteps: SD 1.x, SD 2.x, SDXL.

Below, a_t is the cumulative product that Ho et al. 2020 write as alpha-bar, and SNR_t = a_t / (1 - a_t).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from library.device import on_device
from library.errors import raise_problems
from library.log import get_logger
from library.objectives.base import Predict, Sampler
from library.objectives.loss import MEASURES, huber_thresholds, per_sample
from library.objectives.noise import make_noise, perturb
from library.objectives.options import DDPMOptions, LossOptions
from library.objectives.samplers import build_sampler
from library.types import Batch, Noised, like

NUM_TIMESTEPS = 1000
SNR_CAP = 1000.0  # upper bound of the SNR in some weights: t = 0 is nearly noise-free
VALIDATION_POINTS = 4


# ---- tables over the timesteps ------------------------------------------------------------------------------------


def scaled_linear_betas(count: int = NUM_TIMESTEPS, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Betas of Stable Diffusion, (T,), linear in their square roots (Rombach et al. 2022, published configuration)."""
    return torch.linspace(start**0.5, end**0.5, count) ** 2


def cumulated_alphas(betas: Tensor) -> Tensor:
    """a_t = prod_{s<=t} (1 - beta_s), (T,); Ho et al. 2020, above eq. 4."""
    return torch.cumprod(1 - betas, dim=0)


def zero_terminal_betas(betas: Tensor) -> Tensor:
    """Betas whose last timestep has SNR 0: Lin et al. 2024 ("... Sample Steps Are Flawed"), algorithm 1."""
    root = cumulated_alphas(betas).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))  # the last becomes 0, the first keeps its value
    alphas_cumprod = root**2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


def signal_to_noise(alphas_cumprod: Tensor) -> Tensor:
    """SNR_t, (T,)."""
    return (alphas_cumprod.sqrt() / (1 - alphas_cumprod).sqrt()) ** 2


def snr_weights(snr: Tensor, prediction_type: str, options: DDPMOptions) -> Tensor:
    """Weight of each timestep, (T,): the product of all enabled weightings, 1 without any."""
    is_v = prediction_type == "v_prediction"
    capped = snr.clamp(max=SNR_CAP)
    like_noise = capped / (capped + 1)  # |v error|^2 * this = |noise error|^2 (Salimans & Ho 2022, appendix D)
    weight = torch.ones_like(snr)
    if options.min_snr_gamma:  # Hang et al. 2023 (min-SNR); written so that SNR 0 gives the limit, not 0/0
        gamma = options.min_snr_gamma
        weight = weight * (snr.clamp(max=gamma) / (snr + 1) if is_v else (gamma / snr).clamp(max=1))
    if options.scale_v_pred_loss_like_noise_pred:
        weight = weight * like_noise
    if options.v_pred_like_loss:
        weight = weight * (1 + options.v_pred_like_loss / like_noise)
    if options.debiased_estimation_loss:  # Yu et al. 2023, "Debias the Training of Diffusion Models"
        weight = weight * (1 / (capped + 1) if is_v else capped.rsqrt())
    return weight


@dataclass(frozen=True)
class Tables:
    """Quantities that depend on the timestep only, (T,) float32 each, on one device."""

    signal: Tensor  # sqrt(a_t)
    sigma: Tensor  # sqrt(1 - a_t)
    weight: Tensor
    huber_c: Tensor

    def to(self, device: torch.device) -> Tables:
        return Tables(*(on_device(table, device) for table in (self.signal, self.sigma, self.weight, self.huber_c)))


# ---- the objective ------------------------------------------------------------------------------------------------


class DDPMObjective:
    """The model predicts the noise (epsilon, Ho et al. 2020 eq. 14) or the velocity v (Salimans & Ho 2022, appendix D).

    All arithmetic is float32, whatever the dtype of the latents. Loss weights are computed from the betas in use, that
    is after the zero-terminal-SNR change (decision 0002). Raises UserError for options that do not fit the prediction.
    """

    def __init__(
        self,
        options: DDPMOptions,
        loss: LossOptions,
        *,
        prediction_type: str = "epsilon",
        betas: Tensor | None = None,
    ) -> None:
        assert prediction_type in ("epsilon", "v_prediction"), prediction_type
        raise_problems(prediction_problems(options, prediction_type))
        if options.zero_terminal_snr and prediction_type == "epsilon":
            get_logger().warning(
                "--zero_terminal_snr without --v_parameterization: the last timestep is pure noise and teaches nothing"
            )
        self.options, self.loss_options, self.prediction_type = options, loss, prediction_type
        self.betas = (scaled_linear_betas() if betas is None else betas).float().cpu()
        if options.zero_terminal_snr:
            self.betas = zero_terminal_betas(self.betas)
        self.alphas_cumprod = cumulated_alphas(self.betas)
        cpu_tables = Tables(
            signal=self.alphas_cumprod.sqrt(),
            sigma=(1 - self.alphas_cumprod).sqrt(),
            weight=snr_weights(signal_to_noise(self.alphas_cumprod), prediction_type, options),
            huber_c=huber_thresholds(loss, self.alphas_cumprod),
        )
        self._tables = {torch.device("cpu"): cpu_tables}

    def tables(self, device: torch.device) -> Tables:
        """The tables on `device`, copied there once."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def sample_t(
        self, count: int, size: tuple[int, int], generator: torch.Generator, device: torch.device | str
    ) -> Tensor:
        """Timesteps, (B,) int64, uniform over [min_timestep, max_timestep); if both are equal, always that one."""
        low, high = self.options.timestep_range
        return torch.randint(low, max(high, low + 1), (count,), generator=generator, device=device)

    def noise(self, latents: Tensor, t: Tensor, generator: torch.Generator) -> Noised:
        """Add noise to latents (B C h w, any float dtype) for timesteps t (B). The result is float32.

        Order of the draws: those of `make_noise`, then those of `perturb`.
        """
        latents = latents.float()
        noise = make_noise(latents, self.options, generator)
        return self.noised(latents, t, noise, seen=perturb(noise, self.options, generator))

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor, *, seen: Tensor) -> Noised:
        """The part of `noise` without random draws. seen: the noise in the input; noise: the noise in the target."""
        tables = self.tables(latents.device)
        signal, sigma = like(tables.signal[t], latents), like(tables.sigma[t], latents)
        x_t = signal * latents + sigma * seen  # Ho et al. 2020, eq. 4
        target = signal * noise - sigma * latents if self.prediction_type == "v_prediction" else noise
        return Noised(x_t=x_t, t=t, noise=noise, target=target, weight=tables.weight[t])

    def loss(self, predict: Predict, noised: Noised, batch: Batch) -> Tensor:
        """Weighted loss per sample, (B,) float32: mask, mean over C h w, prior weight, SNR weight."""
        pred = predict(noised).float()
        c = like(self.tables(noised.t.device).huber_c[noised.t], pred)
        elements = MEASURES[self.loss_options.loss_type](pred, noised.target, c)
        return per_sample(elements, batch.masks) * batch.loss_weights.to(elements.device) * noised.weight

    def validation_t(self) -> list[int | float]:
        """Timesteps that divide the timestep range into equal parts: 200, 400, 600, 800 by default."""
        low, high = self.options.timestep_range
        return [low + (high - low) * i // (VALIDATION_POINTS + 1) for i in range(1, VALIDATION_POINTS + 1)]

    def sampler(self, name: str, steps: int, *, size: tuple[int, int], shift: float | None = None) -> Sampler:
        """A sampler over the betas of this objective. size and shift are used by flow models only."""
        return build_sampler(
            name,
            steps,
            alphas_cumprod=self.alphas_cumprod,
            prediction_type=self.prediction_type,
            zero_terminal_snr=self.options.zero_terminal_snr,
        )


def prediction_problems(options: DDPMOptions, prediction_type: str) -> list[str]:
    """Options that do not fit the prediction type of the model, one line each."""
    problems = []
    is_v = prediction_type == "v_prediction"
    if options.scale_v_pred_loss_like_noise_pred and not is_v:
        problems.append(
            "--scale_v_pred_loss_like_noise_pred is for v-prediction: give --v_parameterization or leave it out"
        )
    if options.v_pred_like_loss and is_v:
        problems.append("--v_pred_like_loss is for noise-prediction models: leave it or --v_parameterization out")
    if options.zero_terminal_snr and not is_v:
        infinite = {
            "--debiased_estimation_loss": options.debiased_estimation_loss,
            "--v_pred_like_loss": options.v_pred_like_loss,
        }
        for flag in (flag for flag, given in infinite.items() if given):
            problems.append(f"{flag} with --zero_terminal_snr needs --v_parameterization: its last weight is infinite")
    return problems
