# SPDX-License-Identifier: Apache-2.0
"""The objective that keeps some samples as the untrained model makes them."""

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
    assert asked == ["trained", "untrained"]
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
