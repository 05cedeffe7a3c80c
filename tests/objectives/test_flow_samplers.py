# SPDX-License-Identifier: Apache-2.0
"""Samplers of flow models against flows whose solution is known, and their noise levels against golden schedules."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.errors import UserError
from library.families.flux.options import FluxFlowOptions
from library.objectives.flow import FlowObjective, constant_shift, resolution_shift
from library.objectives.options import LossOptions
from library.objectives.samplers import FLOW_SAMPLERS, SAMPLERS

GOLDEN = load_file(Path(__file__).parents[1] / "data_files" / "objectives" / "flow.safetensors")
SCHEDULES = [name for name in GOLDEN if name.startswith("flux.inference_schedule.")]
LATENT_OF = {"seq256": (32, 32), "seq1024": (64, 64), "seq3840": (96, 160), "seq4096": (128, 128)}
PICTURE = torch.linspace(-1.5, 1.5, 64).reshape(1, 4, 4, 4)
NOISE = torch.randn(PICTURE.shape, generator=torch.Generator().manual_seed(3))


def objective(preview_shift=resolution_shift):
    return FlowObjective(FluxFlowOptions(), LossOptions(), preview_shift=preview_shift)


def run(name, steps, velocity, shift=3.0):
    """The loop of previews with a model that says velocity(x, s)."""
    sampler = objective(constant_shift(shift)).sampler(name, steps, size=(4, 4))
    x = NOISE * sampler.init_noise_sigma
    for s in sampler.timesteps:
        assert s.dtype == torch.float32 and 0 < s <= 1
        x = sampler.step(velocity(sampler.scale_input(x, s), s), s, x, None)
    return x


@pytest.mark.parametrize("name", SCHEDULES)
def test_golden_schedules(name):
    _, _, sequence, steps = name.split(".")
    sampler = objective().sampler("euler", int(steps.removeprefix("steps")), size=LATENT_OF[sequence])
    torch.testing.assert_close(sampler.timesteps, GOLDEN[name][:-1])
    torch.testing.assert_close(sampler.scheduler.sigmas, GOLDEN[name])


def test_a_shift_replaces_that_of_the_model():
    plain = objective(constant_shift(1.0)).sampler("euler", 4, size=(64, 64)).timesteps
    assert plain.tolist() == [1.0, 0.75, 0.5, 0.25]
    for preview_shift in (resolution_shift, constant_shift(1.0)):
        sampler = objective(preview_shift).sampler("euler", 4, size=(64, 64), shift=3.0)
        torch.testing.assert_close(sampler.timesteps, torch.tensor([1.0, 0.9, 0.75, 0.5]))


@pytest.mark.parametrize("name", sorted(FLOW_SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_straight_lines_are_followed_exactly(name, steps):
    """Noise and picture given, the velocity is constant and any number of steps ends at the picture."""
    found = run(name, steps, lambda x, s: NOISE - PICTURE)
    assert found.dtype == torch.float32
    # dpmsingle reads 0.999 for the noise level 1
    tolerance = 5e-3 if name == "dpmsingle" else 1e-5
    assert (found - PICTURE).abs().max() < tolerance


@pytest.mark.parametrize("name", sorted(FLOW_SAMPLERS))
def test_the_only_picture_is_found(name):
    """A distribution of one picture: the perfect model says (x - x0) / s."""
    found = run(name, 10, lambda x, s: ((x - PICTURE) / s).bfloat16().float())
    assert (found - PICTURE).abs().max() < 0.03


def gaussian_velocity(x, s, mean=0.5, deviation=0.4):
    """E[n - x0 | x] where x0 is normal: the solution from x at s = 1 to s = 0 is mean + deviation * x."""
    variance = (1 - s) ** 2 * deviation**2 + s**2
    return -mean + (s - (1 - s) * deviation**2) / variance * (x - (1 - s) * mean)


def error(name, steps):
    return float((run(name, steps, gaussian_velocity) - (0.5 + 0.4 * NOISE)).abs().max())


@pytest.mark.parametrize("name", sorted(FLOW_SAMPLERS))
def test_curved_flows_converge(name):
    assert error(name, 80) < 0.05
    assert error(name, 80) < error(name, 20) / 2


@pytest.mark.parametrize("name", ["heun", "dpmsolver++", "dpmsingle"])
def test_second_order_is_better_than_euler(name):
    assert error(name, 40) < error("euler", 40) / 1.5


def test_heun_visits_a_level_twice():
    sampler = objective(constant_shift(1.0)).sampler("heun", 3, size=(4, 4))
    torch.testing.assert_close(sampler.timesteps, torch.tensor([1.0, 2 / 3, 2 / 3, 1 / 3, 1 / 3]))


def test_ddim_is_euler():
    assert torch.equal(run("ddim", 6, gaussian_velocity), run("euler", 6, gaussian_velocity))


def test_euler_written_out():
    sampler = objective(constant_shift(1.0)).sampler("euler", 2, size=(4, 4))
    x = sampler.step(PICTURE, sampler.timesteps[0], NOISE, None)
    torch.testing.assert_close(x, NOISE - 0.5 * PICTURE)


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - set(FLOW_SAMPLERS)))
def test_samplers_that_flows_do_not_have(name, caplog):
    made = objective()
    with caplog.at_level(logging.WARNING, "trainyard"):
        samplers = [made.sampler(name, 4, size=(64, 64)) for _ in range(2)]
    euler = objective().sampler("euler", 4, size=(64, 64))
    assert all(torch.equal(sampler.timesteps, euler.timesteps) for sampler in samplers)
    (record,) = caplog.records  # once, however many pictures are made
    assert record.getMessage().startswith(f"sampler {name} is not for flow models: euler is used")


def test_unknown_sampler_and_shift():
    with pytest.raises(UserError, match=r"unknown key 'eular'\. Did you mean 'euler'"):
        objective().sampler("eular", 4, size=(64, 64))
    with pytest.raises(UserError, match="--fs 0: the shift of a preview must be greater than 0"):
        objective().sampler("euler", 4, size=(64, 64), shift=0)


def test_flow_names_are_names_that_users_can_give():
    assert set(FLOW_SAMPLERS) <= set(SAMPLERS)
    assert math.isclose(objective().preview_shift((128, 128)), math.exp(1.15))
