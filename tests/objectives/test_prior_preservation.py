# SPDX-License-Identifier: Apache-2.0
"""The objective that keeps some samples, or what is outside of masks, as the untrained model makes them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from library.families.flux.options import FluxFlowOptions
from library.objectives.base import Predict
from library.objectives.flow import FlowObjective, constant_shift
from library.objectives.options import LossOptions
from library.objectives.prior_preservation import PriorPreservation
from library.types import Batch, Noised

INNER = FlowObjective(FluxFlowOptions(), LossOptions(), preview_shift=constant_shift(1.0))


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
    found = PriorPreservation(INNER).loss(predict, noised, batch)
    assert asked == ["untrained", "trained"]
    target = torch.stack([prior[0], noised.target[1], prior[2]])
    assert torch.equal(found, INNER.loss(Predict.of(pred), replace(noised, target=target), batch))
    assert found[0] == found[2] > 0


def test_without_such_samples_it_is_the_objective_inside() -> None:
    noised, batch = case([False, False])

    def never(noised: Noised) -> Tensor:
        raise AssertionError("the untrained model was asked")

    pred = torch.zeros_like(noised.x_t)
    found = PriorPreservation(INNER).loss(Predict(lambda n: pred, never), noised, batch)
    assert torch.equal(found, INNER.loss(Predict.of(pred), noised, batch))


def test_outside_of_masks_the_untrained_prediction_is_kept() -> None:
    """mean(m e(target)) + W mean((1 - m) e(prior)), written out; also with sums divided by what each part shows."""
    noised, batch = case([False, False, False])
    masks = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(1)).round()
    masks[1], masks[2] = 1, 0
    pred, prior = torch.randn_like(noised.x_t), torch.randn_like(noised.x_t)
    shown = masks.reshape(3, 1, 8, 8, 8, 8).mean(dim=(3, 5))
    inside, outside = shown * (pred - noised.target) ** 2, (1 - shown) * (pred - prior) ** 2
    for normalize in (False, True):
        loss = LossOptions(masked_loss_normalize=normalize)
        inner = FlowObjective(FluxFlowOptions(model_prediction_type="raw"), loss, preview_shift=constant_shift(1.0))
        predict = Predict(lambda n: pred, lambda n: prior)
        found = PriorPreservation(inner, 0.25).loss(predict, noised, replace(batch, masks=masks))
        for i in range(3):
            first, second = inside[i].mean(), outside[i].mean()
            if normalize:
                first = inside[i].sum() / (4 * shown[i].sum()) if i != 2 else torch.zeros(())
                second = outside[i].sum() / (4 * (1 - shown[i]).sum()) if i != 1 else torch.zeros(())
            torch.testing.assert_close(found[i], first + 0.25 * second)


def test_a_batch_without_masks_asks_the_untrained_model_for_nothing() -> None:
    noised, batch = case([False])

    def never(noised: Noised) -> Tensor:
        raise AssertionError("the untrained model was asked")

    pred = torch.zeros_like(noised.x_t)
    found = PriorPreservation(INNER, 0.5).loss(Predict(lambda n: pred, never), noised, batch)
    assert torch.equal(found, INNER.loss(Predict.of(pred), noised, batch))
