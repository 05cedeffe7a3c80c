# SPDX-License-Identifier: Apache-2.0
"""Options of the objective: noise, timesteps, and the measure and weights of the loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options import Idle, at_least, between, option, positive


@dataclass(frozen=True)
class NoisingOptions:
    """What every objective has: the range of timesteps and the perturbation of the input."""

    min_timestep: int | None = option(None, help="Lowest timestep to train (0).", check=between(0, 999))
    max_timestep: int | None = option(
        None, help="End of the timesteps to train, itself excluded (1000).", check=between(1, 1000), zero_is_unset=True
    )
    ip_noise_gamma: float | None = option(
        None, help="Extra noise in the model's input that it need not predict (0.1 is usual).", check=at_least(0)
    )
    ip_noise_gamma_random_strength: bool = option(
        False, help="Draw the strength of --ip_noise_gamma anew for every batch, between 0 and the given value."
    )

    @property
    def timestep_range(self) -> tuple[int, int]:
        """(lowest timestep, end): the end is excluded unless both are equal."""
        low = 0 if self.min_timestep is None else self.min_timestep
        high = 1000 if self.max_timestep is None else self.max_timestep
        return low, high

    def problems(self) -> Iterator[str]:
        """Combinations that make no sense."""
        low, high = self.timestep_range
        if low > high:
            yield f"--min_timestep {low} is above --max_timestep {high}"
        if self.ip_noise_gamma_random_strength and not self.ip_noise_gamma:
            yield Idle("--ip_noise_gamma_random_strength has no effect without --ip_noise_gamma")


@dataclass(frozen=True)
class DDPMOptions(NoisingOptions):
    """Noise, timesteps and SNR weights of the models trained with discrete DDPM steps (SD 1.x, SD 2.x, SDXL)."""

    noise_offset: float | None = option(
        None, help="Shift the noise of each channel as a whole; 0.05 to 0.1 helps dark and bright pictures."
    )
    noise_offset_random_strength: bool = option(
        False, help="Draw the strength of --noise_offset anew for every batch, between 0 and the given value."
    )
    adaptive_noise_scale: float | None = option(
        None, help="Add this times the absolute channel mean of the latents to --noise_offset."
    )
    multires_noise_iterations: int | None = option(
        None, help="Add noise at this many coarser resolutions (6 to 10 is usual).", check=at_least(0)
    )
    multires_noise_discount: float = option(
        0.3, help="Strength of each coarser noise resolution relative to the one before.", check=between(0, 1)
    )
    zero_terminal_snr: bool = option(
        False, help="Change the noise schedule so that the last timestep is pure noise; meant for --v_parameterization."
    )
    min_snr_gamma: float | None = option(
        None, help="Cap the weight of easy timesteps at this signal-to-noise ratio (5 is usual).", check=at_least(0)
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, help="Weight a v-prediction loss over the timesteps as noise prediction would."
    )
    v_pred_like_loss: float | None = option(
        None, help="Add this much of a v-prediction weighted loss to a noise-prediction model.", check=at_least(0)
    )
    debiased_estimation_loss: bool = option(
        False, help="Weight the loss by one over the root of the signal-to-noise ratio."
    )

    def problems(self) -> Iterator[str]:
        """Combinations that make no sense."""
        yield from super().problems()
        if self.adaptive_noise_scale and not self.noise_offset:
            yield Idle(
                "--adaptive_noise_scale adds to --noise_offset and has no effect without it: give --noise_offset too"
            )
        if self.noise_offset_random_strength and not self.noise_offset:
            yield Idle("--noise_offset_random_strength has no effect without --noise_offset")


@dataclass(frozen=True)
class LossOptions:
    """How the difference between prediction and target is measured."""

    loss_type: str = option("l2", help="How a difference is measured.", choices=("l2", "l1", "huber", "smooth_l1"))
    huber_schedule: str = option(
        "snr",
        help="How the Huber threshold changes over the timesteps (snr: with the signal-to-noise ratio).",
        choices=("constant", "exponential", "snr"),
    )
    huber_c: float = option(
        0.1, help="Huber threshold at the noisiest timestep; smaller is nearer to l1.", check=positive
    )
    huber_scale: float = option(
        1.0, help="Factor on the threshold of the constant and exponential schedules.", check=positive
    )
    masked_loss_normalize: bool = option(
        False, help="Divide the loss of a masked picture by the mean of its mask, so that small masks teach as much."
    )
    masked_prior_weight: float | None = option(
        None,
        help="Where a mask is black, keep what the untrained model predicts: weight of that loss (1 is usual).",
        check=at_least(0),
        zero_is_unset=True,
    )

    def mask_flags(self) -> list[str]:
        """The given options that need masks."""
        return [f"--{name}" for name in ("masked_loss_normalize", "masked_prior_weight") if vars(self)[name]]

    def problems(self) -> Iterator[str]:
        """Combinations that make no sense."""
        if self.loss_type in ("huber", "smooth_l1") and self.huber_schedule == "snr" and self.huber_scale != 1:
            yield Idle("--huber_scale has no effect with --huber_schedule snr: give constant or exponential")
        if self.loss_type in ("huber", "smooth_l1") and self.huber_schedule == "exponential" and self.huber_c > 1:
            yield f"--huber_c {self.huber_c}: the exponential schedule falls from 1 to --huber_c: give at most 1"
