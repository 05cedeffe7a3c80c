# SPDX-License-Identifier: Apache-2.0
"""The objective that trains parts of pictures and keeps others as the untrained model makes them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from library.families.flux.options import FluxFlowOptions
from library.objectives.base import Predict
from library.objectives.flow import FlowObjective, constant_shift
from library.objectives.options import LossOptions
from library.objectives.selective import SelectiveObjective
from library.types import Batch, Noised

INNER = FlowObjective(FluxFlowOptions(model_prediction_type="raw"), LossOptions(), preview_shift=constant_shift(1.0))


def case(keep: list[bool]) -> tuple[Noised, Batch]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(len(keep), 4, 8, 8, generator=generator)
    noised = INNER.noise(latents, torch.full((len(keep),), 0.4), generator)
    return noised, Batch(["n"] * len(keep), ["c"] * len(keep), torch.ones(len(keep)), keep_prior=keep)


def test_samples_that_are_kept_have_the_untrained_prediction_as_their_target() -> None:
    noised, batch = case([True, False, True])
    pred, prior, asked = torch.ones_like(noised.x_t), torch.full_like(noised.x_t, 3.0), []

    def say(name: str, value: Tensor) -> Tensor:
        asked.append(name)
        return value

    predict = Predict(lambda n: say("trained", pred), lambda n: say("untrained", prior))
    found = SelectiveObjective(INNER, LossOptions()).loss(predict, noised, batch)
    assert asked == ["untrained", "trained"]
    target = torch.stack([prior[0], noised.target[1], prior[2]])
    assert torch.equal(found, INNER.loss(Predict.of(pred), replace(noised, target=target), batch))
    assert found[0] == found[2] > 0


def test_without_such_samples_it_is_the_objective_inside() -> None:
    noised, batch = case([False, False])

    def never(noised: Noised) -> Tensor:
        raise AssertionError("the untrained model was asked")

    pred = torch.zeros_like(noised.x_t)
    found = SelectiveObjective(INNER, LossOptions()).loss(Predict(lambda n: pred, never), noised, batch)
    assert torch.equal(found, INNER.loss(Predict.of(pred), noised, batch))


OPTIONS = {
    "neither": LossOptions(),
    "normalize": LossOptions(masked_loss_normalize=True),
    "prior": LossOptions(masked_prior_weight=0.7),
    "both": LossOptions(masked_loss_normalize=True, masked_prior_weight=0.7),
}


@pytest.mark.parametrize("how", OPTIONS)
def test_formula_of_masks(how: str) -> None:
    """Masks of any grey; a white one, a black one, and one that a JPEG file makes of black."""
    noised, batch = case([False, True, False, False, False])
    generator = torch.Generator().manual_seed(5)
    pred, prior = (torch.randn(noised.x_t.shape, generator=generator) for _ in range(2))
    grey = torch.rand(5, 1, 16, 16, generator=generator) ** 4
    grey[2], grey[3], grey[4] = 1.0, 0.0, 7 / 255
    batch = replace(batch, masks=grey)
    found = SelectiveObjective(INNER, OPTIONS[how]).loss(Predict(lambda n: pred, lambda n: prior), noised, batch)
    for i in range(5):
        m = grey[i, 0].view(8, 2, 8, 2).mean((1, 3))
        e, e0 = (pred[i] - noised.target[i]) ** 2, (pred[i] - prior[i]) ** 2
        if i == 1:
            e = e0  # the sample is kept as it is
        inside = (m * e).mean()
        if "prior" not in how and how != "neither":
            inside = inside / m.mean() if i < 3 else torch.zeros(())
        outside = 0.7 * ((1 - m) * e0).mean() if how in ("prior", "both") else 0.0
        assert torch.allclose(found[i], inside + outside, rtol=1e-5), i
    assert torch.isfinite(found).all()


def test_a_black_mask_has_no_gradient() -> None:
    noised, batch = case([False, False])
    masks = torch.zeros(2, 1, 8, 8)
    masks[1, 0, 0, 0] = 1  # 1 of 64 pixels teaches as much as a whole picture
    pred = torch.zeros_like(noised.x_t, requires_grad=True)
    objective = SelectiveObjective(INNER, LossOptions(masked_loss_normalize=True))
    loss = objective.loss(Predict.of(pred), noised, replace(batch, masks=masks))
    loss.sum().backward()
    assert loss[0] == 0 and float(loss[1].detach()) == pytest.approx(
        float((noised.target[1, :, 0, 0] ** 2).mean()), rel=1e-5
    )
    assert pred.grad is not None and not pred.grad[0].any() and not pred.grad[1, :, 1:].any()
    assert pred.grad[1, :, 0, 0].all()


def test_batches_without_masks_do_not_ask_the_untrained_model() -> None:
    noised, batch = case([False, False])

    def never(noised: Noised) -> Tensor:
        raise AssertionError("the untrained model was asked")

    pred = torch.zeros_like(noised.x_t)
    found = SelectiveObjective(INNER, OPTIONS["both"]).loss(Predict(lambda n: pred, never), noised, batch)
    assert torch.equal(found, INNER.loss(Predict.of(pred), noised, batch))
