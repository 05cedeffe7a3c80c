# SPDX-License-Identifier: Apache-2.0
"""Options of models that are trained by flow matching. A family has a subclass of its own in its options.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields

from library.objectives.options import LossOptions, NoisingOptions
from library.options import Idle, between, option, positive, refused

WEIGHTINGS = ("sigma_sqrt", "cosmap")  # of --weighting_scheme: these weight the loss
DENSITIES = ("logit_normal", "mode")  # of --weighting_scheme: these say how often each noise level is drawn

# --timestep_sampling -> the options that it reads; "sd3" is the one that SD3 has
READS: dict[str, tuple[str, ...]] = {
    "sigma": ("weighting_scheme", "discrete_flow_shift"),
    "uniform": (),
    "sigmoid": ("sigmoid_scale",),
    "shift": ("sigmoid_scale", "discrete_flow_shift"),
    "flux_shift": ("sigmoid_scale",),
    "flux2_shift": ("sigmoid_scale",),
    "nextdit_shift": (),
    "sd3": ("weighting_scheme", "training_shift"),
}

PLAIN_NOISE = "flow models start from plain noise; leave it out"
NO_SNR = "flow models have no such timestep weights; see --weighting_scheme"
NO_V = "flow models predict a velocity of their own; leave it out"


@dataclass(frozen=True)
class FlowOptions(NoisingOptions, ABC):
    """What every flow model has. `sampling`, `shift`, `steepness` and `prediction` are what `FlowObjective` reads."""

    weighting_scheme: str = option(
        "uniform",
        help="Which noise levels count more (sigma_sqrt, cosmap) or are drawn more often (logit_normal, mode).",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"),
    )
    logit_mean: float = option(0.0, help="Mean of --weighting_scheme logit_normal; above 0 draws more noise.")
    logit_std: float = option(1.0, help="Standard deviation of --weighting_scheme logit_normal.", check=positive)
    mode_scale: float = option(
        1.29, help="How much --weighting_scheme mode prefers the middle noise levels.", check=between(-1, 1.75)
    )
    noise_offset: float | None = option(None, help="Not for flow models.", check=refused(PLAIN_NOISE))
    noise_offset_random_strength: bool = option(False, help="Not for flow models.", check=refused(PLAIN_NOISE))
    adaptive_noise_scale: float | None = option(None, help="Not for flow models.", check=refused(PLAIN_NOISE))
    multires_noise_iterations: int | None = option(None, help="Not for flow models.", check=refused(PLAIN_NOISE))
    multires_noise_discount: float = option(
        0.3, help="Of --multires_noise_iterations, which is not for flow models.", check=between(0, 1)
    )
    zero_terminal_snr: bool = option(
        False, help="Not for flow models.", check=refused("the last noise level of a flow is pure noise already")
    )
    min_snr_gamma: float | None = option(None, help="Not for flow models.", check=refused(NO_SNR))
    debiased_estimation_loss: bool = option(False, help="Not for flow models.", check=refused(NO_SNR))
    scale_v_pred_loss_like_noise_pred: bool = option(False, help="Not for flow models.", check=refused(NO_V))
    v_pred_like_loss: float | None = option(None, help="Not for flow models.", check=refused(NO_V))

    @property
    @abstractmethod
    def sampling(self) -> str:
        """How noise levels are drawn: a key of `READS`."""

    @property
    @abstractmethod
    def shift(self) -> float:
        """Factor of the shift of the noise levels, for the samplings that read one."""

    @property
    def steepness(self) -> float:
        """Factor on the normal number whose sigmoid is the noise level, for the samplings that read it."""
        return 1.0

    @property
    @abstractmethod
    def prediction(self) -> str:
        """What is compared: "raw", "additive" or "sigma_scaled" (decision 0005)."""

    @property
    def draws_normal(self) -> bool:
        """True: a noise level is made of a standard normal number; False: of a uniform one."""
        read = READS[self.sampling]
        return "sigmoid_scale" in read or ("weighting_scheme" in read and self.weighting_scheme == "logit_normal")

    @property
    def weights_loss(self) -> bool:
        """True: --weighting_scheme may weight the loss."""
        return self.prediction == "sigma_scaled"

    def problems(self) -> Iterator[str]:
        """Options without effect, and combinations that make no sense."""
        yield from super().problems()
        scheme = self.weighting_scheme
        if scheme in DENSITIES and "weighting_scheme" not in READS[self.sampling]:
            yield Idle(
                f"--weighting_scheme {scheme} has no effect with --timestep_sampling {self.sampling}, "
                "which has its own density: leave it out, or give --timestep_sampling sigma"
            )
        if scheme in WEIGHTINGS and not self.weights_loss:
            yield Idle(
                f"--weighting_scheme {scheme} has no effect with --model_prediction_type {self.prediction}: "
                "leave it out, or give --model_prediction_type sigma_scaled"
            )
        belongs = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}
        for name, owner in belongs.items():
            if self._changed(name) and scheme != owner:
                yield Idle(f"--{name} has no effect without --weighting_scheme {owner}")

    def _changed(self, name: str) -> bool:
        """True when an option has another value than its default."""
        return getattr(self, name) != next(f.default for f in fields(self) if f.name == name)


@dataclass(frozen=True)
class SampledFlowOptions(FlowOptions):
    """Options of flow models whose users choose how noise levels are drawn: --timestep_sampling."""

    timestep_sampling: str = option(
        "sigma",
        help="How noise levels are drawn; shift and flux_shift are usual.",
        choices=("sigma", "uniform", "sigmoid", "shift", "flux_shift"),
    )
    sigmoid_scale: float = option(
        1.0, help="Spread of the sigmoid, shift and flux_shift samplings; below 1 is narrower.", check=positive
    )
    discrete_flow_shift: float = option(
        3.0, help="Shift of the sigma and shift samplings; above 1 draws more noise.", check=positive
    )
    model_prediction_type: str = option(
        "sigma_scaled",
        help="What the loss compares: raw counts all noise levels alike, sigma_scaled counts noisy ones more.",
        choices=("raw", "additive", "sigma_scaled"),
    )

    @property
    def sampling(self) -> str:
        return self.timestep_sampling

    @property
    def shift(self) -> float:
        return self.discrete_flow_shift

    @property
    def steepness(self) -> float:
        return self.sigmoid_scale

    @property
    def prediction(self) -> str:
        return self.model_prediction_type

    def problems(self) -> Iterator[str]:
        """Options without effect, and combinations that make no sense."""
        yield from super().problems()
        for name in ("sigmoid_scale", "discrete_flow_shift"):
            if self._changed(name) and name not in READS[self.sampling]:
                others = ", ".join(sampling for sampling in READS if name in READS[sampling])
                yield Idle(
                    f"--{name} has no effect with --timestep_sampling {self.sampling}: "
                    f"leave it out, or give one of {others}"
                )


def huber_problems(loss: LossOptions) -> Iterator[str]:
    """What of the loss does not fit a flow, one line each."""
    if loss.loss_type in ("huber", "smooth_l1") and loss.huber_schedule == "snr":
        yield (
            f"--loss_type {loss.loss_type} with --huber_schedule snr needs the noise schedule of DDPM models: "
            "give --huber_schedule exponential or constant"
        )
