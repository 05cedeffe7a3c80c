# SPDX-License-Identifier: Apache-2.0
"""Samplers of previews: diffusers' schedulers under the names that users know."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.errors import UserError, unknown
from library.objectives.base import Sampler

# Sampling divides by the signal, so the last step of a zero-terminal-SNR schedule gets a tiny signal instead of 0.
SMALLEST_ALPHA = 2.0**-24


@dataclass(frozen=True)
class SamplerRow:
    """A sampler: class in diffusers, its settings, whether its step draws noise, whether its spacing can be set."""

    scheduler: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    noisy: bool = False
    spaced: bool = True


LMS = "LMSDiscreteScheduler"
SAMPLERS: dict[str, SamplerRow] = {
    "ddim": SamplerRow("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}, noisy=True),
    "pndm": SamplerRow("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": SamplerRow(LMS),
    "euler": SamplerRow("EulerDiscreteScheduler"),
    "euler_a": SamplerRow("EulerAncestralDiscreteScheduler", noisy=True),
    "heun": SamplerRow("HeunDiscreteScheduler"),
    "dpm_2": SamplerRow("KDPM2DiscreteScheduler"),
    "dpm_2_a": SamplerRow("KDPM2AncestralDiscreteScheduler", noisy=True),
    "dpmsolver": SamplerRow(
        "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    ),
    "dpmsolver++": SamplerRow("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": SamplerRow("DPMSolverSinglestepScheduler", {"lower_order_final": True}, spaced=False),
}
SAMPLERS |= {f"k_{name}": SAMPLERS[name] for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}


class DiffusersSampler:
    """A diffusers scheduler as a `Sampler`. One per picture: multistep methods keep earlier outputs."""

    def __init__(self, scheduler: Any, *, noisy: bool) -> None:
        self.scheduler, self.noisy = scheduler, noisy
        self.timesteps: Tensor = scheduler.timesteps
        self.init_noise_sigma = float(scheduler.init_noise_sigma)

    def scale_input(self, x: Tensor, t: Tensor) -> Tensor:
        """The model's input for the state `x` at `t`."""
        return self.scheduler.scale_model_input(x, t.to(self.timesteps.device))

    def step(self, pred: Tensor, t: Tensor, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """The next state, float32."""
        noise = {"generator": generator} if self.noisy else {}
        return self.scheduler.step(pred.float(), t.to(self.timesteps.device), x.float(), return_dict=False, **noise)[0]


def build_sampler(
    name: str, steps: int, *, alphas_cumprod: Tensor, prediction_type: str, zero_terminal_snr: bool = False
) -> Sampler:
    """A sampler with `steps` steps over the schedule `alphas_cumprod` (T,).

    Spacing: that of Stable Diffusion's published scheduler configuration. With zero terminal SNR, the last timestep
    must be visited ("trailing", Lin et al. 2024, section 3.3). Raises UserError for an unknown name.
    """
    row = SAMPLERS.get(name)
    if row is None:
        raise UserError(unknown("--sample_sampler", name, SAMPLERS))
    spacing: dict[str, Any] = {"timestep_spacing": "leading", "steps_offset": 1}
    if zero_terminal_snr:
        spacing = {"timestep_spacing": "trailing"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers has deprecated "dpmsolver"
        scheduler = scheduler_class(row.scheduler)(
            num_train_timesteps=len(alphas_cumprod),
            trained_betas=sampling_betas(alphas_cumprod).tolist(),
            prediction_type=prediction_type,
            **(spacing if row.spaced else {}),
            **row.settings,
        )
    scheduler.set_timesteps(steps)
    return DiffusersSampler(scheduler, noisy=row.noisy)


# ---- flow models --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowSamplerRow:
    """A sampler of flow models: class in diffusers, its settings, how often it visits each noise level after the first.

    highest: noise level that its formulas get in place of 1, for those that divide by 1 - s.
    """

    scheduler: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    visits: int = 1
    highest: float = 1.0


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW_EULER = FlowSamplerRow("FlowMatchEulerDiscreteScheduler")  # for a flow, DDIM is Euler's method

FLOW_SAMPLERS: dict[str, FlowSamplerRow] = {
    "ddim": FLOW_EULER,
    "euler": FLOW_EULER,
    "k_euler": FLOW_EULER,
    "heun": FlowSamplerRow("FlowMatchHeunDiscreteScheduler", visits=2),
    "dpmsolver++": FlowSamplerRow("DPMSolverMultistepScheduler", FLOW),
    "dpmsingle": FlowSamplerRow("DPMSolverSinglestepScheduler", {**FLOW, "lower_order_final": True}, highest=0.999),
}


class FlowSampler:
    """A diffusers scheduler for flows as a `Sampler`. The steps are taken in order, once."""

    init_noise_sigma = 1.0

    def __init__(self, scheduler: Any, timesteps: Tensor) -> None:
        self.scheduler, self.timesteps = scheduler, timesteps

    def scale_input(self, x: Tensor, t: Tensor) -> Tensor:
        """The state itself: flow models need no scaling."""
        return x

    def step(self, pred: Tensor, t: Tensor, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """The next state, float32. pred: the velocity n - x0."""
        return self.scheduler.step(pred.float(), t, x.float(), return_dict=False)[0]


def build_flow_sampler(name: str, sigmas: Tensor) -> Sampler:
    """A sampler along the noise levels sigmas (steps + 1), falling from 1 to 0.

    Raises UserError for an unknown name.
    """
    row = FLOW_SAMPLERS.get(name)
    if row is None:
        raise UserError(unknown("--sample_sampler", name, FLOW_SAMPLERS))
    scheduler = scheduler_class(row.scheduler)(**row.settings)
    scheduler.set_timesteps(len(sigmas) - 1)
    visited = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(row.visits), sigmas[-1:]])
    # Our noise levels replace the scheduler's own, which differ between classes; steps are counted, not looked up.
    scheduler.sigmas = visited.clamp(max=row.highest)
    scheduler.set_begin_index(0)
    return FlowSampler(scheduler, visited[:-1])


# ---- the schedulers of diffusers ----------------------------------------------------------------------------------


def sampling_betas(alphas_cumprod: Tensor) -> Tensor:
    """Betas, (T,), of the schedule in which every a_t is at least `SMALLEST_ALPHA`."""
    kept = alphas_cumprod.double().clamp(min=SMALLEST_ALPHA)
    return 1 - torch.cat([kept[:1], kept[1:] / kept[:-1]])


def scheduler_class(name: str) -> type:
    """The diffusers class of that name. LMS uses our own coefficients, for which diffusers would need scipy."""
    import diffusers

    return exact_lms_scheduler() if name == LMS else getattr(diffusers, name)


def exact_lms_scheduler() -> type:
    """The LMS scheduler with `lms_coefficient`. Raises UserError when an older diffusers needs scipy."""
    try:
        from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
    except ModuleNotFoundError:
        raise UserError(
            "--sample_sampler lms: this version of diffusers needs scipy for it: pip install scipy"
        ) from None

    class ExactLMSScheduler(LMSDiscreteScheduler):
        def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
            return lms_coefficient([float(s) for s in self.sigmas[t - order + 1 : t + 2]], current_order)

    return ExactLMSScheduler


def lms_coefficient(sigmas: list[float], back: int) -> float:
    """Adams-Bashforth weight of the derivative `back` steps ago, for the step from sigmas[-2] to sigmas[-1].

    It is the integral over that step of the Lagrange polynomial on sigmas[:-1] that is 1 at the point `back` steps ago.
    """
    points = sigmas[:-1][::-1]  # newest first
    center = points[back]
    # in units of the step, from its start: the powers of sigmas near 0 or near 4096 stay well-behaved
    start, width = sigmas[-2], sigmas[-1] - sigmas[-2]
    basis = np.polynomial.Polynomial([1.0])
    for other in points[:back] + points[back + 1 :]:
        basis *= np.polynomial.Polynomial([start - other, width]) / (center - other)
    return float(width * basis.integ()(1.0))
