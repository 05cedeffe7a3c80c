# SPDX-License-Identifier: Apache-2.0
"""The flow objective against golden values of sd-scripts 0.10.1 (flow.safetensors) and its formulas written out again.

The golden functions were fed fixed numbers in place of their random draws: input.z for normal, input.u for uniform.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from library.errors import UserError
from library.families.flux.options import FluxFlowOptions
from library.families.lumina.options import LuminaFlowOptions
from library.families.sd3.options import SD3FlowOptions
from library.objectives.base import Predict
from library.objectives.flow import (
    PREDICTIONS,
    FlowObjective,
    constant_shift,
    loss_weights,
    noise_levels,
    resolution_shift,
    shifted,
)
from library.objectives.flow_options import READS
from library.objectives.options import DDPMOptions, LossOptions
from library.options import specs
from library.types import Batch

GOLDEN = load_file(Path(__file__).parents[1] / "data_files" / "objectives" / "flow.safetensors")
OPTIONS = {"flux": FluxFlowOptions, "lumina": LuminaFlowOptions, "sd3": SD3FlowOptions}
SIZES = {"32x48": (32, 48), "64x64": (64, 64), "96x160": (96, 160), "128x128": (128, 128), "192x192": (192, 192)}
SIZE = (64, 64)
LATENTS = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(1234)) * 0.7 + 0.1
T = torch.tensor([0.1, 0.5, 0.95])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch_of(count, **changes):
    weights = changes.pop("loss_weights", torch.ones(count))
    return Batch(names=["x"] * count, captions=[""] * count, loss_weights=weights, **changes)


def flow(options=None, loss=None, shift=1.0):
    return FlowObjective(options or FluxFlowOptions(), loss or LossOptions(), preview_shift=constant_shift(shift))


def same(got, name):
    torch.testing.assert_close(got, GOLDEN[name], rtol=2e-6, atol=1e-7)


# ---- which noise levels are drawn ---------------------------------------------------------------------------------

SIGMA = {"timestep_sampling": "sigma"}
MODES = {  # golden name -> options; the size is the part after "latent"
    "flux.uniform": {"timestep_sampling": "uniform"},
    **{
        f"flux.sigmoid.sigmoid_scale{c:g}": {"timestep_sampling": "sigmoid", "sigmoid_scale": c}
        for c in (0.5, 1.0, 2.0)
    },
    **{
        f"flux.shift.discrete_flow_shift{k:g}": {"timestep_sampling": "shift", "discrete_flow_shift": k}
        for k in (1.0, 3.0, 3.1582, 6.0)
    },
    **{f"flux.flux_shift.latent{size}": {"timestep_sampling": "flux_shift"} for size in SIZES},
    **{f"lumina.nextdit_shift.latent{size}": {"timestep_sampling": "nextdit_shift"} for size in SIZES},
    **{
        f"flux.sigma.{scheme}.discrete_flow_shift{k:g}": {**SIGMA, "weighting_scheme": scheme, "discrete_flow_shift": k}
        for scheme in ("uniform", "logit_normal")
        for k in (1.0, 3.0)
    },
    "flux.sigma.mode1.29.discrete_flow_shift3": {**SIGMA, "weighting_scheme": "mode"},
    **{
        f"sd3.{scheme}.training_shift{k:g}": {"weighting_scheme": scheme, "training_shift": k}
        for scheme in ("uniform", "logit_normal")
        for k in (1.0, 2.0, 3.0)
    },
    "sd3.mode1.29.training_shift1": {"weighting_scheme": "mode"},
    "sd3.uniform.min200_max700.training_shift1": {"min_timestep": 200, "max_timestep": 700},
}


def test_every_golden_mode_is_here():
    others = ("input.", "loss_weighting.", "predtype.", "flux.inference_schedule.")
    assert {name for name in GOLDEN if not name.startswith(others)} == set(MODES)


@pytest.mark.parametrize("name", MODES)
def test_noise_levels(name):
    options = OPTIONS[name.split(".")[0]](**MODES[name])
    size = SIZES[name.split("latent")[1]] if "latent" in name else SIZE
    x = GOLDEN["input.z"] if options.draws_normal else GOLDEN["input.u"]
    same(noise_levels(x, options, size), name)


def test_flux_shift_of_1024_pixels_is_that_of_the_paper_setting():
    assert math.log(resolution_shift((128, 128))) == pytest.approx(1.15)
    assert math.log(resolution_shift((32, 32))) == pytest.approx(0.5)


@pytest.mark.parametrize("sampling", [s for s in READS if s != "sd3"])
def test_range_of_timesteps_stretches_every_sampling(sampling):
    options = LuminaFlowOptions(timestep_sampling=sampling)
    x = GOLDEN["input.z"] if options.draws_normal else GOLDEN["input.u"]
    cut = dataclasses.replace(options, min_timestep=200, max_timestep=700)
    torch.testing.assert_close(noise_levels(x, cut, SIZE), 0.2 + 0.5 * noise_levels(x, options, SIZE))
    one = dataclasses.replace(options, min_timestep=300, max_timestep=300)
    torch.testing.assert_close(noise_levels(x, one, SIZE), torch.full_like(x, 0.3))


@pytest.mark.parametrize("scheme", ["uniform", "logit_normal", "mode"])
@pytest.mark.parametrize("sampling", list(READS))
def test_levels_stay_inside_whatever_is_drawn(sampling, scheme):
    """0 is a possible uniform draw, and "mode" makes 1 of it, one past the table of "sigma"."""
    if sampling == "sd3":
        options = SD3FlowOptions(weighting_scheme=scheme, mode_scale=1.75)
    else:
        options = LuminaFlowOptions(timestep_sampling=sampling, weighting_scheme=scheme, mode_scale=1.75)
    extremes = torch.tensor([-40.0, 0.0, 40.0]) if options.draws_normal else torch.tensor([0.0, 0.5, 1 - 2**-24])
    levels = noise_levels(extremes, options, SIZE)
    assert levels.dtype == torch.float32 and torch.isfinite(levels).all()
    assert levels.min() >= 0 and levels.max() <= 1


def test_logit_normal_mean_and_deviation():
    options = SD3FlowOptions(weighting_scheme="logit_normal", logit_mean=0.5, logit_std=2.0)
    want = (torch.sigmoid(0.5 + 2 * GOLDEN["input.z"]) * 1000).floor() / 1000
    torch.testing.assert_close(noise_levels(GOLDEN["input.z"], options, SIZE), want)


@pytest.mark.parametrize(
    ("options", "make"),
    [
        (FluxFlowOptions(timestep_sampling="flux_shift"), torch.randn),
        (FluxFlowOptions(timestep_sampling="uniform"), torch.rand),
        (FluxFlowOptions(weighting_scheme="logit_normal"), torch.randn),
        (LuminaFlowOptions(), torch.randn),
        (SD3FlowOptions(), torch.rand),
    ],
)
def test_sample_t_draws_from_the_generator(options, make):
    t = flow(options).sample_t(500, (64, 96), seeded(), "cpu")
    assert t.dtype == torch.float32 and t.shape == (500,)
    assert torch.equal(t, noise_levels(make(500, generator=seeded()), options, (64, 96)))
    assert torch.equal(t, flow(options).sample_t(500, (64, 96), seeded(), "cpu"))
    assert not torch.equal(t, flow(options).sample_t(500, (64, 96), seeded(1), "cpu"))


def test_validation_levels():
    assert flow().validation_t() == [0.2, 0.4, 0.6, 0.8]
    cut = FluxFlowOptions(min_timestep=500, max_timestep=600)
    assert flow(cut).validation_t() == pytest.approx([0.52, 0.54, 0.56, 0.58])


# ---- noise --------------------------------------------------------------------------------------------------------


def test_noise_written_out():
    noised = flow().noise(LATENTS.bfloat16(), T, seeded())
    noise, clean = torch.randn(LATENTS.shape, generator=seeded()), LATENTS.bfloat16().float()
    for i, s in enumerate(T.tolist()):
        torch.testing.assert_close(noised.x_t[i], (1 - s) * clean[i] + s * noise[i])
    assert torch.equal(noised.noise, noise) and torch.equal(noised.target, noise - clean)
    assert torch.equal(noised.t, T) and torch.equal(noised.weight, torch.ones(3))
    assert noised.x_t.dtype == noised.target.dtype == torch.float32


@pytest.mark.parametrize("random", [False, True])
def test_input_perturbation_is_not_in_the_target(random):
    options = FluxFlowOptions(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=random)
    noised = flow(options).noise(LATENTS, T, seeded())
    generator = seeded()
    noise = torch.randn(LATENTS.shape, generator=generator)
    strength = 0.1 * torch.rand(1, generator=generator) if random else 0.1
    seen = noise + strength * torch.randn(LATENTS.shape, generator=generator)
    s = T.view(3, 1, 1, 1)
    torch.testing.assert_close(noised.x_t, (1 - s) * LATENTS + s * seen)
    assert torch.equal(noised.target, noise - LATENTS)
    # and a model that says the target has loss 0 in every form
    for form in PREDICTIONS:
        objective = flow(dataclasses.replace(options, model_prediction_type=form))
        assert torch.equal(objective.loss(Predict.of(noised.target), noised, batch_of(3)), torch.zeros(3))


# ---- loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_golden_weights(scheme):
    same(loss_weights(GOLDEN["loss_weighting.sigmas"], scheme), f"loss_weighting.{scheme}")
    same(loss_weights(GOLDEN["predtype.sigmas"], scheme), f"predtype.sigma_scaled.{scheme}.weighting")


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "none", "uniform"])
def test_other_schemes_weigh_alike(scheme):
    assert torch.equal(loss_weights(T, scheme), torch.ones(3))


@pytest.mark.parametrize("form", sorted(PREDICTIONS))
def test_golden_predictions(form):
    out = PREDICTIONS[form](GOLDEN["predtype.model_pred"], GOLDEN["predtype.noisy"], GOLDEN["predtype.sigmas"])
    for scheme in ("uniform", "sigma_sqrt", "cosmap"):
        same(out, f"predtype.{form}.{scheme}.out")


@pytest.mark.parametrize(
    ("options", "weighted"),
    [
        (FluxFlowOptions(weighting_scheme="cosmap"), True),
        (LuminaFlowOptions(weighting_scheme="cosmap"), False),
        (FluxFlowOptions(weighting_scheme="cosmap", model_prediction_type="additive"), False),
        (SD3FlowOptions(weighting_scheme="cosmap"), True),
        (SD3FlowOptions(weighting_scheme="logit_normal"), False),
    ],
)
def test_only_scaled_predictions_are_weighted(options, weighted):
    weight = flow(options).noise(LATENTS, T, seeded()).weight
    want = [2 / (math.pi * (1 - 2 * s + 2 * s * s)) if weighted else 1.0 for s in T.tolist()]
    torch.testing.assert_close(weight, torch.tensor(want))


@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["constant", "exponential"])
@pytest.mark.parametrize("form", sorted(PREDICTIONS))
def test_loss_of_a_batch_written_out(form, schedule, loss_type):
    loss = LossOptions(loss_type=loss_type, huber_schedule=schedule, huber_c=0.3, huber_scale=0.5)
    scheme = "cosmap" if form == "sigma_scaled" else "uniform"
    objective = flow(FluxFlowOptions(model_prediction_type=form, weighting_scheme=scheme), loss)
    noised = objective.noise(LATENTS, T, seeded())
    pred = torch.randn(LATENTS.shape, generator=seeded(5))
    masks = torch.rand(3, 1, 64, 96, generator=seeded(6))
    prior = torch.tensor([1.0, 0.5, 2.0])
    got = objective.loss(Predict.of(pred), noised, batch_of(3, loss_weights=prior, masks=masks))
    for i, s in enumerate(T.tolist()):
        c = 0.5 * (0.3 if schedule == "constant" else 0.3**s)
        difference, weight = pred[i] - (noised.noise[i] - LATENTS[i]), 1.0
        if form == "sigma_scaled":
            difference = (noised.x_t[i] - s * pred[i]) - LATENTS[i]
            weight = 2 / (math.pi * (1 - 2 * s + 2 * s * s))
        soft = (difference**2 + c * c).sqrt() - c
        element = {"l2": difference**2, "l1": difference.abs(), "huber": 2 * c * soft, "smooth_l1": 2 * soft}[loss_type]
        pooled = masks[i, 0].reshape(8, 8, 12, 8).mean(dim=(1, 3))
        torch.testing.assert_close(got[i], (element * pooled).mean() * prior[i] * weight, rtol=1e-5, atol=1e-6)


def test_forms_of_the_prediction_differ_by_a_weight():
    """Decision 0005: additive is raw, sigma_scaled is raw times s squared, and with sigma_sqrt raw again."""
    pred = torch.randn(LATENTS.shape, generator=seeded(5))

    def loss(options):
        objective = flow(options)
        return objective.loss(Predict.of(pred.bfloat16()), objective.noise(LATENTS, T, seeded()), batch_of(3))

    raw = loss(FluxFlowOptions(model_prediction_type="raw"))
    torch.testing.assert_close(loss(FluxFlowOptions(model_prediction_type="additive")), raw)
    torch.testing.assert_close(loss(FluxFlowOptions()), raw * T**2)
    torch.testing.assert_close(loss(SD3FlowOptions()), raw * T**2)
    torch.testing.assert_close(loss(SD3FlowOptions(weighting_scheme="sigma_sqrt")), raw, rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", sorted(PREDICTIONS))
def test_a_replaced_target_is_what_is_learned(form):
    """diff_output_preservation puts the base model's prediction in place of n - x0."""
    objective = flow(FluxFlowOptions(model_prediction_type=form))
    prior = torch.randn(LATENTS.shape, generator=seeded(7))
    noised = dataclasses.replace(objective.noise(LATENTS, T, seeded()), target=prior)
    assert torch.equal(objective.loss(Predict.of(prior), noised, batch_of(3)), torch.zeros(3))
    pred = torch.randn(LATENTS.shape, generator=seeded(8))
    factor = T**2 if form == "sigma_scaled" else 1
    want = ((pred - prior) ** 2).mean(dim=(1, 2, 3)) * factor
    torch.testing.assert_close(objective.loss(Predict.of(pred), noised, batch_of(3)), want, rtol=1e-5, atol=1e-6)


def test_noise_level_zero_teaches_nothing_and_stays_finite():
    objective = flow(SD3FlowOptions(weighting_scheme="sigma_sqrt"))
    noised = objective.noise(LATENTS, torch.zeros(3), seeded())
    pred = torch.randn(LATENTS.shape, generator=seeded(5)).requires_grad_()
    loss = objective.loss(Predict.of(pred), noised, batch_of(3))
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(3)) and torch.equal(pred.grad, torch.zeros_like(pred))


@pytest.mark.parametrize("sampling", list(READS))
def test_nothing_waits_for_the_device(sampling):
    """Fake tensors have no values: reading one on the host, or a shape that depends on one, would raise."""
    more = {"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True, "weighting_scheme": "cosmap"}
    if sampling == "sd3":
        options = SD3FlowOptions(**more)
    else:
        options = LuminaFlowOptions(timestep_sampling=sampling, model_prediction_type="sigma_scaled", **more)
    objective = flow(options, LossOptions(loss_type="huber", huber_schedule="exponential"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        t = objective.sample_t(2, (8, 8), seeded(), "cpu")
        noised = objective.noise(torch.empty(2, 4, 8, 8), t, seeded())
        loss = objective.loss(Predict.of(torch.empty(2, 4, 8, 8)), noised, batch_of(2, masks=torch.empty(2, 1, 64, 64)))
        with pytest.raises(DataDependentOutputException):
            loss.sum().item()
    assert loss.shape == (2,)


# ---- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_snr_schedule_is_refused(loss_type):
    with pytest.raises(
        UserError, match=f"--loss_type {loss_type} with --huber_schedule snr .* exponential or constant"
    ):
        flow(loss=LossOptions(loss_type=loss_type))
    flow(loss=LossOptions(loss_type="l1"))  # snr is the default: it only matters where it is read


@pytest.mark.parametrize("options", [FluxFlowOptions, LuminaFlowOptions, SD3FlowOptions])
def test_defaults_have_no_problems(options):
    assert list(options().problems()) == []


def test_usual_recipes_have_no_problems():
    for options in (
        FluxFlowOptions(timestep_sampling="shift", discrete_flow_shift=3.1582, model_prediction_type="raw"),
        FluxFlowOptions(timestep_sampling="sigmoid", sigmoid_scale=0.8, model_prediction_type="raw"),
        FluxFlowOptions(weighting_scheme="logit_normal", logit_mean=0.2, logit_std=0.8),
        FluxFlowOptions(weighting_scheme="cosmap", timestep_sampling="flux_shift"),
        LuminaFlowOptions(timestep_sampling="nextdit_shift", model_prediction_type="raw"),
        SD3FlowOptions(weighting_scheme="mode", mode_scale=0.8, training_shift=3.0),
        SD3FlowOptions(weighting_scheme="sigma_sqrt"),
    ):
        assert list(options.problems()) == []


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            FluxFlowOptions(sigmoid_scale=2.0),
            "--sigmoid_scale has no effect with --timestep_sampling sigma: leave it out, or give one of "
            "sigmoid, shift, flux_shift",
        ),
        (FluxFlowOptions(timestep_sampling="uniform", sigmoid_scale=0.5), "--sigmoid_scale has no effect with"),
        (
            FluxFlowOptions(timestep_sampling="sigmoid", discrete_flow_shift=2.0),
            "--discrete_flow_shift has no effect with --timestep_sampling sigmoid: leave it out, or give one of "
            "sigma, shift",
        ),
        (
            LuminaFlowOptions(timestep_sampling="nextdit_shift", discrete_flow_shift=3.0),
            "--discrete_flow_shift has no effect with --timestep_sampling nextdit_shift",
        ),
        (
            FluxFlowOptions(timestep_sampling="shift", weighting_scheme="logit_normal"),
            "--weighting_scheme logit_normal has no effect with --timestep_sampling shift",
        ),
        (
            FluxFlowOptions(model_prediction_type="raw", weighting_scheme="sigma_sqrt"),
            "--weighting_scheme sigma_sqrt has no effect with --model_prediction_type raw",
        ),
        (LuminaFlowOptions(weighting_scheme="cosmap"), "give --model_prediction_type sigma_scaled"),
        (SD3FlowOptions(logit_mean=0.5), "--logit_mean has no effect without --weighting_scheme logit_normal"),
        (
            SD3FlowOptions(weighting_scheme="mode", logit_std=0.5),
            "--logit_std has no effect without --weighting_scheme logit_normal",
        ),
        (FluxFlowOptions(mode_scale=1.0), "--mode_scale has no effect without --weighting_scheme mode"),
        (SD3FlowOptions(min_timestep=800, max_timestep=200), "--min_timestep 800 is above --max_timestep 200"),
        (FluxFlowOptions(ip_noise_gamma_random_strength=True), "has no effect without --ip_noise_gamma"),
    ],
)
def test_options_without_effect(options, line):
    (problem,) = options.problems()
    assert line in problem


@pytest.mark.parametrize("options", [FluxFlowOptions, LuminaFlowOptions, SD3FlowOptions])
@pytest.mark.parametrize(
    ("name", "unused", "value", "reason"),
    [
        ("noise_offset", 0, "0.05", "plain noise"),
        ("noise_offset_random_strength", False, "true", "plain noise"),
        ("adaptive_noise_scale", "0.0", "0.02", "plain noise"),
        ("multires_noise_iterations", "0", 6, "plain noise"),
        ("zero_terminal_snr", "false", True, "pure noise already"),
        ("min_snr_gamma", 0, 5, "--weighting_scheme"),
        ("debiased_estimation_loss", False, True, "--weighting_scheme"),
        ("scale_v_pred_loss_like_noise_pred", False, True, "a velocity of their own"),
        ("v_pred_like_loss", 0.0, 0.5, "a velocity of their own"),
    ],
)
def test_options_of_ddpm_are_refused(options, name, unused, value, reason):
    spec = specs({"objective": options})[name]
    assert not spec.read(unused)  # as graphical programs write options that are not used
    with pytest.raises(ValueError, match=f"has no meaning here: .*{reason}"):
        spec.read(value)


def test_a_discount_alone_passes():
    assert specs({"objective": FluxFlowOptions})["multires_noise_discount"].read("0.1") == 0.1


def test_every_option_of_ddpm_has_a_line():
    """One configuration file may be used with scripts of several architectures."""
    for options in OPTIONS.values():
        assert set(specs({"": DDPMOptions})) <= set(specs({"": options}))


def test_shift_of_levels():
    assert shifted(torch.tensor([0.0, 0.25, 1.0]), 3.0).tolist() == [0.0, 0.5, 1.0]
    assert constant_shift(3.0)((1, 1)) == constant_shift(3.0)((128, 128)) == 3.0


def test_latents_of_any_number_of_axes():
    """Noise, target and loss of what an architecture keeps as tokens (B N C) or frames (B C f h w)."""
    for shape in ((3, 6, 4), (3, 4, 2, 6, 8)):
        latents = torch.randn(shape, generator=seeded())
        noised = flow().noise(latents, T, seeded())
        for i, s in enumerate(T):
            torch.testing.assert_close(noised.x_t[i], (1 - s) * latents[i] + s * noised.noise[i])
        assert torch.count_nonzero(flow().loss(Predict.of(noised.target), noised, batch_of(3))) == 0
