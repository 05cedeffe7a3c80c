# SPDX-License-Identifier: Apache-2.0
"""The DDPM objective against the golden tables and against its formulas written out again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from library.errors import UserError
from library.objectives.base import Predict
from library.objectives.ddpm import (
    DDPMObjective,
    cumulated_alphas,
    scaled_linear_betas,
    signal_to_noise,
    snr_weights,
    zero_terminal_betas,
)
from library.objectives.loss import MEASURES, apply_mask, huber_thresholds
from library.objectives.options import DDPMOptions, LossOptions
from library.types import Batch

FILES = Path(__file__).parents[1] / "data_files" / "objectives"
TABLES = json.loads((FILES / "tables.json").read_text())
LOSSES = json.loads((FILES / "losses.json").read_text())
LATENTS = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(1234)) * 0.7 + 0.1
BETAS = scaled_linear_betas()
SNR = signal_to_noise(cumulated_alphas(BETAS))
FIXED_SNR = signal_to_noise(cumulated_alphas(zero_terminal_betas(BETAS)))
V = "v_prediction"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch_of(count, **changes):
    weights = changes.pop("loss_weights", torch.ones(count))
    return Batch(names=["x"] * count, captions=[""] * count, loss_weights=weights, **changes)


def same(table, name, atol=1e-10):
    want = torch.tensor(TABLES[name])
    torch.testing.assert_close(table[TABLES["timesteps"]], want, rtol=2e-6, atol=atol)


# ---- tables -------------------------------------------------------------------------------------------------------


def test_betas_and_snr():
    same(BETAS, "betas")
    same(cumulated_alphas(BETAS), "alphas_cumprod")
    same(SNR, "snr")


def test_zero_terminal_snr():
    fixed = zero_terminal_betas(BETAS)
    same(
        fixed, "ztsnr.betas", atol=5e-7
    )  # 1 - ratio in float32: a few units in the last place of 1, as processors round
    same(cumulated_alphas(fixed), "ztsnr.alphas_cumprod")
    assert cumulated_alphas(fixed)[-1] == 0 and cumulated_alphas(fixed)[0] == cumulated_alphas(BETAS)[0]


@pytest.mark.parametrize(
    ("name", "prediction_type", "given"),
    [
        *((f"min_snr_gamma{g}.eps", "epsilon", {"min_snr_gamma": g}) for g in (1, 5, 20)),
        *((f"min_snr_gamma{g}.v", V, {"min_snr_gamma": g}) for g in (1, 5, 20)),
        ("debiased.eps", "epsilon", {"debiased_estimation_loss": True}),
        ("debiased.v", V, {"debiased_estimation_loss": True}),
        ("scale_v_pred_loss_like_noise_pred", V, {"scale_v_pred_loss_like_noise_pred": True}),
        ("v_pred_like_loss0.5.eps", "epsilon", {"v_pred_like_loss": 0.5}),
        (
            "combined.v.snr5+scale_v+debiased",
            V,
            {"min_snr_gamma": 5, "scale_v_pred_loss_like_noise_pred": True, "debiased_estimation_loss": True},
        ),
    ],
)
def test_snr_weights(name, prediction_type, given):
    same(snr_weights(SNR, prediction_type, DDPMOptions(**given)), name)
    # and the objective uses that table
    objective = DDPMObjective(DDPMOptions(**given), LossOptions(), prediction_type=prediction_type)
    t = torch.tensor(TABLES["timesteps"])
    weight = objective.noise(torch.zeros(len(t), 4, 2, 2), t, seeded()).weight
    torch.testing.assert_close(weight, torch.tensor(TABLES[name]), rtol=2e-6, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("debiased.v", {"debiased_estimation_loss": True}),
        ("min_snr_gamma5.v", {"min_snr_gamma": 5}),
        ("scale_v_pred", {"scale_v_pred_loss_like_noise_pred": True}),
    ],
)
def test_weights_follow_the_changed_betas(name, given):
    """Decision 0002."""
    objective = DDPMObjective(DDPMOptions(zero_terminal_snr=True, **given), LossOptions(), prediction_type=V)
    same(objective.tables(torch.device("cpu")).weight, f"ztsnr_fix_before_prepare.{name}")


def test_min_snr_at_snr_zero_is_the_limit():
    weight = snr_weights(FIXED_SNR, "epsilon", DDPMOptions(min_snr_gamma=5))
    assert weight[-1] == 1 and torch.isfinite(weight).all()


def test_no_weighting_is_one():
    assert torch.equal(snr_weights(SNR, "epsilon", DDPMOptions()), torch.ones(1000))


@pytest.mark.parametrize("name", [n for n in TABLES if n.startswith("huber/")])
def test_huber_thresholds(name):
    words = name.removeprefix("huber/").split(".", 2)
    c, scale = words[2].removeprefix("c").split(".scale")
    options = LossOptions(loss_type=words[0], huber_schedule=words[1], huber_c=float(c), huber_scale=float(scale))
    same(huber_thresholds(options, cumulated_alphas(BETAS)), name)


# ---- loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_measures(name):
    given = {k: torch.tensor(v) for k, v in LOSSES["measures"].items()}
    loss = MEASURES[name](given["pred"], given["target"], given["huber_c"].view(-1, 1, 1, 1))
    torch.testing.assert_close(loss, given[name], rtol=1e-6, atol=1e-8)


def test_mask_is_resized_by_area():
    given = {k: torch.tensor(v) for k, v in LOSSES["masked"].items()}
    torch.testing.assert_close(apply_mask(given["loss"], given["alpha_masks"][:, None]), given["masked_from_alpha"])


@pytest.mark.parametrize("loss_type", sorted(MEASURES))
def test_loss_of_a_batch_written_out(loss_type):
    options = LossOptions(loss_type=loss_type, huber_schedule="exponential", huber_c=0.3)
    objective = DDPMObjective(DDPMOptions(min_snr_gamma=5), options)
    t = torch.tensor([3, 500, 999])
    noised = objective.noise(LATENTS, t, seeded())
    pred = torch.randn(LATENTS.shape, generator=seeded(5))
    masks = torch.rand(3, 1, 64, 96, generator=seeded(6))
    weights = torch.tensor([1.0, 0.5, 2.0])
    got = objective.loss(Predict.of(pred), noised, batch_of(3, loss_weights=weights, masks=masks))
    for i in range(3):
        c = 0.3 ** (int(t[i]) / 1000)
        difference = pred[i] - noised.noise[i]
        soft = (difference**2 + c * c).sqrt() - c
        element = {"l2": difference**2, "l1": difference.abs(), "huber": 2 * c * soft, "smooth_l1": 2 * soft}[loss_type]
        pooled = masks[i, 0].reshape(8, 8, 12, 8).mean(dim=(1, 3))
        snr = float(SNR[t[i]])
        want = (element * pooled).mean() * weights[i] * min(snr, 5) / snr
        torch.testing.assert_close(got[i], want, rtol=1e-5, atol=1e-7)


def test_nothing_waits_for_the_device():
    """Fake tensors have no values: reading one on the host, or a shape that depends on one, would raise."""
    options = DDPMOptions(
        min_snr_gamma=5,
        noise_offset=0.1,
        noise_offset_random_strength=True,
        adaptive_noise_scale=0.1,
        multires_noise_iterations=6,
        ip_noise_gamma=0.1,
        ip_noise_gamma_random_strength=True,
    )
    objective = DDPMObjective(options, LossOptions(loss_type="huber"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        t = objective.sample_t(2, (8, 8), seeded(), "cpu")
        noised = objective.noise(torch.empty(2, 4, 8, 8), t, seeded())
        loss = objective.loss(Predict.of(torch.empty(2, 4, 8, 8)), noised, batch_of(2, masks=torch.empty(2, 1, 64, 64)))
        with pytest.raises(DataDependentOutputException):
            loss.sum().item()
    assert loss.shape == (2,)


def test_loss_reads_half_precision_predictions_in_float32():
    objective = DDPMObjective(DDPMOptions(), LossOptions())
    noised = objective.noise(LATENTS, torch.tensor([10, 20, 30]), seeded())
    loss = objective.loss(Predict.of(torch.zeros_like(LATENTS, dtype=torch.bfloat16)), noised, batch_of(3))
    torch.testing.assert_close(loss, (noised.noise**2).mean(dim=(1, 2, 3)))


# ---- noise --------------------------------------------------------------------------------------------------------


def test_plain_noise():
    t = torch.tensor([0, 400, 999])
    noised = DDPMObjective(DDPMOptions(), LossOptions()).noise(LATENTS, t, seeded())
    noise = torch.randn(LATENTS.shape, generator=seeded())
    a = cumulated_alphas(BETAS)[t].view(3, 1, 1, 1)
    torch.testing.assert_close(noised.x_t, a.sqrt() * LATENTS + (1 - a).sqrt() * noise)
    assert torch.equal(noised.target, noise) and torch.equal(noised.noise, noise) and torch.equal(noised.t, t)
    assert torch.equal(noised.weight, torch.ones(3))


def test_v_prediction_target():
    t = torch.tensor([0, 400, 999])
    objective = DDPMObjective(DDPMOptions(zero_terminal_snr=True), LossOptions(), prediction_type=V)
    noised = objective.noise(LATENTS, t, seeded())
    a = cumulated_alphas(zero_terminal_betas(BETAS))[t].view(3, 1, 1, 1)
    torch.testing.assert_close(noised.target, a.sqrt() * noised.noise - (1 - a).sqrt() * LATENTS)
    assert torch.equal(noised.x_t[2], noised.noise[2])  # pure noise at the last timestep
    assert torch.equal(noised.target[2], -LATENTS[2])


@pytest.mark.parametrize(("random", "adaptive"), [(False, None), (True, None), (False, 0.2), (False, -0.5)])
def test_offset_noise(random, adaptive):
    options = DDPMOptions(noise_offset=0.1, noise_offset_random_strength=random, adaptive_noise_scale=adaptive)
    noised = DDPMObjective(options, LossOptions()).noise(LATENTS, torch.tensor([5, 5, 5]), seeded())
    generator = seeded()
    noise = torch.randn(LATENTS.shape, generator=generator)
    strength = 0.1 * torch.rand(1, generator=generator) if random else torch.tensor(0.1)
    if adaptive:
        strength = (strength + adaptive * LATENTS.mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0)
    want = noise + strength * torch.randn(3, 4, 1, 1, generator=generator)
    torch.testing.assert_close(noised.noise, want)
    assert torch.equal(noised.target, noised.noise)


def test_multires_noise():
    options = DDPMOptions(multires_noise_iterations=6, multires_noise_discount=0.9)
    objective = DDPMObjective(options, LossOptions())
    noised = objective.noise(LATENTS, torch.tensor([5, 5, 5]), seeded(8))
    torch.testing.assert_close(noised.noise.std(), torch.tensor(1.0))
    assert torch.equal(noised.noise, objective.noise(LATENTS, torch.tensor([5, 5, 5]), seeded(8)).noise)
    # the coarse levels make neighbours alike
    pairs = torch.stack([noised.noise[..., :-1].flatten(), noised.noise[..., 1:].flatten()])
    assert torch.corrcoef(pairs)[0, 1] > 0.1


def test_multires_levels_and_sum():
    from library.objectives.noise import add_levels, multires_levels

    levels = multires_levels((64, 48), 8, seed=5)
    assert levels[0] == (64, 48) and 1 in levels[-1] and all(1 not in level for level in levels[:-1])
    for i, (height, _) in enumerate(levels[1:], start=1):
        assert int(64 / 4**i) <= height <= 64 / 2**i
    noise, one, two = torch.randn(1, 1, 4, 4, generator=seeded()), torch.ones(1, 1, 4, 4), torch.full((1, 1, 1, 1), 2.0)
    summed = noise + one + 0.5 * two
    torch.testing.assert_close(add_levels(noise, [one, two], 0.5), summed / summed.std())


@pytest.mark.parametrize("random", [False, True])
def test_input_perturbation_is_not_in_the_target(random):
    options = DDPMOptions(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=random)
    t = torch.tensor([700, 700, 700])
    noised = DDPMObjective(options, LossOptions()).noise(LATENTS, t, seeded())
    generator = seeded()
    noise = torch.randn(LATENTS.shape, generator=generator)
    strength = 0.1 * torch.rand(1, generator=generator) if random else 0.1
    seen = noise + strength * torch.randn(LATENTS.shape, generator=generator)
    a = cumulated_alphas(BETAS)[700]
    torch.testing.assert_close(noised.x_t, a.sqrt() * LATENTS + (1 - a).sqrt() * seen)
    assert torch.equal(noised.target, noise)


def test_half_precision_latents_are_noised_in_float32():
    noised = DDPMObjective(DDPMOptions(), LossOptions()).noise(LATENTS.bfloat16(), torch.tensor([1, 2, 3]), seeded())
    assert noised.x_t.dtype == noised.target.dtype == torch.float32


# ---- timesteps ----------------------------------------------------------------------------------------------------


def test_timesteps_are_uniform_over_the_range():
    objective = DDPMObjective(DDPMOptions(min_timestep=200, max_timestep=210), LossOptions())
    t = objective.sample_t(5000, (8, 8), seeded(), "cpu")
    counts = torch.bincount(t, minlength=1000)
    assert t.dtype == torch.int64 and int(t.min()) == 200 and int(t.max()) == 209
    assert counts[200:210].min() > 400
    assert torch.equal(t, objective.sample_t(5000, (8, 8), seeded(), "cpu"))


def test_equal_bounds_train_one_timestep():
    objective = DDPMObjective(DDPMOptions(min_timestep=300, max_timestep=300), LossOptions())
    assert objective.sample_t(4, (8, 8), seeded(), "cpu").tolist() == [300] * 4


def test_validation_timesteps():
    assert DDPMObjective(DDPMOptions(), LossOptions()).validation_t() == [200, 400, 600, 800]
    assert DDPMObjective(DDPMOptions(max_timestep=500), LossOptions()).validation_t() == [100, 200, 300, 400]


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (DDPMOptions(min_timestep=800, max_timestep=200), "--min_timestep 800 is above --max_timestep 200"),
        (DDPMOptions(adaptive_noise_scale=0.1), "give --noise_offset too"),
        (DDPMOptions(noise_offset_random_strength=True), "no effect without --noise_offset"),
        (DDPMOptions(ip_noise_gamma_random_strength=True), "no effect without --ip_noise_gamma"),
        (LossOptions(loss_type="huber", huber_schedule="exponential", huber_c=2.0), "give at most 1"),
    ],
)
def test_combinations_that_make_no_sense(options, line):
    (problem,) = options.problems()
    assert line in problem


def test_options_that_fit_have_no_problems():
    assert list(DDPMOptions().problems()) == list(LossOptions().problems()) == []


@pytest.mark.parametrize(
    ("given", "prediction_type", "line"),
    [
        ({"scale_v_pred_loss_like_noise_pred": True}, "epsilon", "give --v_parameterization or leave it out"),
        ({"v_pred_like_loss": 0.5}, V, "leave it or --v_parameterization out"),
        ({"zero_terminal_snr": True, "debiased_estimation_loss": True}, "epsilon", "needs --v_parameterization"),
    ],
)
def test_options_that_do_not_fit_the_prediction(given, prediction_type, line):
    with pytest.raises(UserError, match=line):
        DDPMObjective(DDPMOptions(**given), LossOptions(), prediction_type=prediction_type)


def test_huber_scale_without_effect():
    (problem,) = LossOptions(loss_type="huber", huber_scale=2.0).problems()
    assert problem == "--huber_scale has no effect with --huber_schedule snr: give constant or exponential"
    assert list(LossOptions(loss_type="huber", huber_schedule="constant", huber_scale=2.0).problems()) == []
    assert list(LossOptions(huber_scale=2.0).problems()) == []  # graphical programs give it whatever the loss
