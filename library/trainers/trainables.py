# SPDX-License-Identifier: Apache-2.0
"""What learns in a run, and the one module whose forward pass is a training prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from library.families.family import ModelFamily
from library.types import Batch, Tokens


@dataclass
class Models:
    """The models of a run. What has no more work to do is dropped (None, or an empty list)."""

    denoiser: nn.Module
    encoders: dict[str, nn.Module] = field(default_factory=dict)
    vae: nn.Module | None = None

    def all(self) -> list[nn.Module]:
        return [self.denoiser, *self.encoders.values(), *([self.vae] if self.vae is not None else [])]


@dataclass(frozen=True)
class Trainables:
    """What a method trains. `state` and `load` speak of exactly the tensors that learn."""

    module: nn.Module  # holds every trainable parameter
    groups: list[dict[str, Any]]  # {"params": [...], "lr": float, "name": str}, the optimizer's groups
    modules: dict[str, list[nn.Parameter]]  # published name of each part -> its parameters, for messages
    state: Callable[[], dict[str, Tensor]]
    load: Callable[[dict[str, Tensor]], None]
    encoders: frozenset[str] = frozenset()  # text encoders that gradients flow through
    flat: bool = True  # many small parameters: clip and step them as one buffer per group
    set_multiplier: Callable[[float], None] = lambda value: None
    set_condition: Callable[[Tensor | None], None] = lambda control: None  # control images, B 3 H W in [-1, 1]
    before_step: Callable[[int], None] = lambda step: None  # called before each optimizer step, counted from 0
    after_step: Callable[[], dict[str, float | Tensor]] = dict  # ... and after it, gradients still there; to be logged
    epoch_started: Callable[[], None] = lambda: None  # called before the first batch of each epoch
    base_model: Callable[[], AbstractContextManager[Any]] = (
        nullcontext  # inside it the model is what it was at the start
    )
    reads_weights: Callable[[Sequence[nn.Module]], bool] = lambda modules: False  # in a pass, other than by calling
    reads_between_steps: bool = False  # looks at the models' weights after each step

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.groups for p in group["params"]]


class StepModule(nn.Module):
    """Denoiser, text encoders and what learns as one module: what DDP and DeepSpeed wrap, and autocast surrounds.

    forward(x_t, t, batch, tokens): tokens are None when all text outputs come with the batch.
    """

    def __init__(self, family: ModelFamily, models: Models, trainables: Trainables) -> None:
        super().__init__()
        self.family = family
        self.denoiser = models.denoiser
        self.encoders = nn.ModuleDict(models.encoders)
        self.trained = trainables.module
        self.learning = trainables.encoders
        self.set_condition = trainables.set_condition

    def forward(self, x_t: Tensor, t: Tensor, batch: Batch, tokens: Tokens | None) -> Tensor:
        cond = dict(batch.cond or {})
        for name, encoder in self.encoders.items():
            assert tokens is not None
            with torch.set_grad_enabled(name in self.learning and torch.is_grad_enabled()):
                cond |= self.family.encode_part(name, encoder, tokens)
        if self.trained.training:
            cond = self.family.drop_text(cond)
        self.set_condition(batch.control)  # it stays until the next pass: blocks are recomputed in the backward pass
        return self.family.predict(self.denoiser, x_t, t, cond, batch)


class GradientWatch:
    """Remembers which modules ever received a gradient, until the first save."""

    def __init__(self, modules: Mapping[str, Sequence[nn.Parameter]]) -> None:
        learning = {name: [p for p in parameters if p.requires_grad] for name, parameters in modules.items()}
        self.silent = {name for name, parameters in learning.items() if parameters}
        self._hooks = {
            name: [p.register_post_accumulate_grad_hook(lambda _, n=name: self._heard(n)) for p in parameters]
            for name, parameters in learning.items()
        }

    def _heard(self, name: str) -> None:
        self.silent.discard(name)
        for handle in self._hooks.pop(name, ()):
            handle.remove()

    def stop(self) -> list[str]:
        """End watching; the names of the modules none of whose parameters ever received a gradient."""
        for handles in self._hooks.values():
            for handle in handles:
                handle.remove()
        self._hooks.clear()
        return sorted(self.silent)
