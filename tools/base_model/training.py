# SPDX-License-Identifier: Apache-2.0
"""Common parts of the trainings: budget, learning-rate schedule, averaged weights, atomic files, progress lines."""

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of samples, or minutes of training time summed over resumed runs."""

    samples: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.samples is None) == (self.minutes is None):
            raise ValueError("give either samples or minutes")

    def fraction(self, samples: int, minutes: float) -> float:
        """The share of the budget used up, 1 or more when it is spent."""
        return samples / self.samples if self.samples is not None else minutes / self.minutes


@dataclass(frozen=True)
class Schedule:
    """Warm-up, constant, linear decay to zero ("WSD", Hu et al. 2024, arXiv:2404.06395)."""

    peak: float
    warmup_steps: int = 100
    decay_share: float = 0.2  # of the budget

    def rate(self, step: int, fraction: float) -> float:
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        decay = min(1.0, max(0.0, 1.0 - fraction) / self.decay_share)
        return self.peak * warmup * decay


class WeightAverage:
    """Exponential moving average of the parameters; the decay grows to its final value with the steps."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters)
        self._decay = decay
        self.averages = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self._decay, (1 + step) / (20 + step))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self._parameters], 1 - decay)

    @torch.no_grad()
    def load(self, averages: list[Tensor]) -> None:
        for own, loaded in zip(self.averages, averages, strict=True):
            own.copy_(loaded)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        for parameter, average in zip(self._parameters, self.averages):
            parameter.copy_(average)


class Stopwatch:
    """Minutes of training, including those of earlier runs."""

    def __init__(self, earlier_minutes: float = 0.0) -> None:
        self._start = time.monotonic() - 60 * earlier_minutes

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self._start) / 60


class RunningMean:
    """Mean of the values since it was last read."""

    def __init__(self) -> None:
        self._values: list[float] = []

    def add(self, value: float) -> None:
        self._values.append(value)

    def read(self) -> float:
        mean = sum(self._values) / max(1, len(self._values))
        self._values.clear()
        return mean


def save_atomically(state: Any, path: Path) -> None:
    """torch.save so that a kill at any moment leaves either the old or the new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def progress_line(stage: str, samples: int, minutes: float, fraction: float, **values: float) -> str:
    """`unet  12% 24000 samples, 5.1 min, 37 min left, loss 0.0312`."""
    left = minutes * (1 - fraction) / fraction if fraction > 0 else float("nan")
    extra = "".join(f", {name} {value:.4g}" for name, value in values.items())
    return f"{stage} {fraction:4.0%} {samples} samples, {minutes:.1f} min, {left:.0f} min left{extra}"


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `count` items in order."""
    return (slice(start, min(count, start + size)) for start in range(0, count, size))
