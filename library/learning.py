# SPDX-License-Identifier: Apache-2.0
"""What learns in a run: which models, known before they are loaded, and then the weights themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from library.families.family import ModelFamily
from library.families.finetune_options import FineTuneOptions
from library.io.metadata import NetworkFacts
from library.memory.choice import MemoryChoice
from library.memory.quantise import Storage
from library.optim.options import FullOptimizerOptions
from library.optim.working_copy import FindCopy
from library.types import Batch, Position, Tokens

DENOISER = "denoiser"


@dataclass
class Models:
    """The models of a run. What has no more work to do is dropped (None, or an empty dict)."""

    denoiser: nn.Module
    encoders: dict[str, nn.Module] = field(default_factory=dict)
    vae: nn.Module | None = None

    def all(self) -> list[nn.Module]:
        """Every model that is there."""
        return [self.denoiser, *self.encoders.values(), *([self.vae] if self.vae is not None else [])]


@dataclass(frozen=True)
class Learning:
    """Which models a method trains, and what that asks of the others. Known before a model is loaded."""

    parts: frozenset[str]  # models that learn, or whose adapters do: "denoiser" and names of text encoders
    changed: frozenset[str] = frozenset()  # models whose own weights learn
    conditioned: bool = False  # what learns looks at control images: each picture must have one
    merges: bool = False  # adapters become part of the models first; fewer bits before that would round twice
    reads_weights: bool = False  # third-party code may compute with the weights themselves
    in_backward: FullOptimizerOptions | None = None  # how weights are stepped during the backward pass, if they are
    swap_options: FineTuneOptions | None = None  # options that the family may have besides --blocks_to_swap

    @property
    def encoders(self) -> frozenset[str]:
        """Text encoders that learn, or whose adapters do."""
        return self.parts - {DENOISER}

    def storage(self, part: str, choice: MemoryChoice) -> Storage:
        """How a model's matrices are kept. A frozen model in a float32 run keeps the file's half precision."""
        if part in self.changed or self.merges:
            return "plain"
        asked = choice.storage if part == DENOISER else choice.encoder_storage
        if asked == "plain":
            return "plain" if self.reads_weights else "half"
        return cast(Storage, asked)


@dataclass(frozen=True)
class Trainables:
    """The weights that a method trains, and everything that depends on what they are.

    `state` and `load` speak of exactly the tensors that learn.
    """

    module: nn.Module  # holds every trainable parameter
    groups: list[dict[str, Any]]  # the optimizer's: {"params": [...], "lr": float, "name": str}
    modules: dict[str, list[nn.Parameter]]  # published name of each part -> its parameters, for messages
    state: Callable[[], dict[str, Tensor]]
    load: Callable[[dict[str, Tensor]], None]
    write: Callable[[Path, dict[str, str], Position], None]  # the save, whole or not at all: path, metadata, progress
    kind: str  # of the saved files, for their metadata: a key of library.trainers.facts.ENDINGS
    facts: NetworkFacts | None = None  # for the metadata of saved files; None: only modelspec.* entries
    check_format: Callable[[], None] = lambda: None  # raises UserError for what the first save could not write
    encoders: frozenset[str] = frozenset()  # text encoders that gradients flow through
    skips: bool = False  # some parameters may have no gradient in a step, besides those of text encoders
    read_from_files: bool = False  # all that learns is read from the model's files, and so is the same in each process
    flat: bool = True  # many small parameters: clip and step them as one buffer per group
    set_multiplier: Callable[[float], None] = lambda value: None
    set_condition: Callable[[Tensor | None], None] = lambda control: None  # control images, B 3 H W in [-1, 1]
    before_step: Callable[[int], None] = lambda step: None  # called before each optimizer step, counted from 0
    after_step: Callable[[], dict[str, float | Tensor]] = dict  # ... and after it, gradients still there; to be logged
    use_copies: Callable[[FindCopy], None] | None = None  # compute with working copies, which makes them worth having
    epoch_started: Callable[[], None] = lambda: None  # called before the first batch of each epoch
    base_model: Callable[[], AbstractContextManager[Any]] = nullcontext  # inside it the models are untrained
    reads_weights: Callable[[Sequence[nn.Module]], bool] = lambda modules: False  # in a pass, other than by calling
    reads_between_steps: bool = False  # looks at the models' weights after each step
    # modules that do not learn and whose weights the next save reads
    read_by_save: Callable[[], Sequence[nn.Module]] = tuple

    def parameters(self) -> list[nn.Parameter]:
        """Every weight of the optimizer's groups."""
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
        if batch.seed is not None:
            cond, batch = self.family.drop_text(cond, batch.seed), self.family.drop_references(batch, batch.seed)
        self.set_condition(batch.control)  # it stays until the next pass: blocks are recomputed in the backward pass
        return self.family.predict(self.denoiser, x_t, t, cond, batch)
