# SPDX-License-Identifier: Apache-2.0
"""Every sampler finds a picture that is known: for a delta distribution the right prediction has a closed form."""

from __future__ import annotations

import pytest
import torch

from library.errors import UserError
from library.objectives.ddpm import DDPMObjective
from library.objectives.options import DDPMOptions, LossOptions
from library.objectives.samplers import SAMPLERS, lms_coefficient, scheduler_class

V = "v_prediction"
TARGET = torch.linspace(-1.5, 1.5, 64).reshape(1, 4, 4, 4)


def signal_and_sigma(objective, t):
    """sqrt(a_t) and sqrt(1 - a_t), also between timesteps (some samplers visit those): linear in log sigma/signal."""
    a = objective.alphas_cumprod.double().clamp(min=2**-24)
    ratio = ((1 - a) / a).sqrt().log()
    low = int(t)
    high = min(low + 1, 999)
    k = torch.exp(ratio[low] + (float(t) - low) * (ratio[high] - ratio[low]))
    return 1 / (1 + k**2).sqrt(), k / (1 + k**2).sqrt()


def run(objective, name, steps=30):
    sampler = objective.sampler(name, steps, size=(4, 4))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TARGET.shape, generator=generator) * sampler.init_noise_sigma
    for t in sampler.timesteps:
        seen = sampler.scale_input(x, t)
        signal, sigma = signal_and_sigma(objective, t)
        noise = (seen - signal * TARGET) / sigma
        pred = signal * noise - sigma * TARGET if objective.prediction_type == V else noise
        x = sampler.step(pred.float(), t, x, generator)
    return x


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize(("prediction_type", "zero_snr"), [("epsilon", False), (V, False), (V, True)])
def test_finds_the_known_picture(name, prediction_type, zero_snr):
    objective = DDPMObjective(DDPMOptions(zero_terminal_snr=zero_snr), LossOptions(), prediction_type=prediction_type)
    found = run(objective, name)
    assert found.dtype == torch.float32
    # 0.08: several samplers end at the first timestep, which still holds sqrt(beta_0) = 0.03 of noise
    assert (found - TARGET).abs().max() < 0.08


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("steps", [2, 7])
def test_few_steps_stay_finite(name, steps):
    objective = DDPMObjective(DDPMOptions(), LossOptions())
    assert torch.isfinite(run(objective, name, steps)).all()


def test_ancestral_noise_comes_from_the_generator():
    objective = DDPMObjective(DDPMOptions(), LossOptions())
    assert torch.equal(run(objective, "euler_a", 5), run(objective, "euler_a", 5))


def test_zero_terminal_snr_starts_at_the_last_timestep():
    objective = DDPMObjective(DDPMOptions(zero_terminal_snr=True), LossOptions(), prediction_type=V)
    assert int(objective.sampler("ddim", 10, size=(4, 4)).timesteps[0]) == 999


def test_unknown_name():
    with pytest.raises(UserError, match=r"unknown key 'eular_a'\. Did you mean 'euler_a'"):
        DDPMObjective(DDPMOptions(), LossOptions()).sampler("eular_a", 10, size=(4, 4))


def test_lms_coefficients():
    # one point: the step itself; two points: Adams-Bashforth 3/2, -1/2 on an even grid; four: 55, -59, 37, -9 over 24
    assert lms_coefficient([3.0, 2.0], 0) == pytest.approx(-1.0)
    assert [lms_coefficient([4.0, 3.0, 2.0], i) for i in range(2)] == pytest.approx([-1.5, 0.5])
    four = [lms_coefficient([5.0, 4.0, 3.0, 2.0, 1.0], i) * -24 for i in range(4)]
    assert four == pytest.approx([55, -59, 37, -9])


def test_lms_scheduler_is_the_one_of_diffusers():
    from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler

    assert issubclass(scheduler_class("LMSDiscreteScheduler"), LMSDiscreteScheduler)
