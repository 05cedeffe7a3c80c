# SPDX-License-Identifier: Apache-2.0
"""Full training: the model's own weights learn, and the model is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.data.config import load_dataset_config
from library.device import DTYPES
from library.errors import UserError, first_names
from library.trainers.finetune_options import FineTuneTrainerOptions
from library.trainers.settings import trained_dtype
from library.trainers.trainables import Trainables
from library.trainers.trainer import Trainer


class FineTuneTrainer(Trainer):
    """The family says which parts learn, each at which rate, and how a model is written."""

    options: FineTuneTrainerOptions
    project, kind = "finetuning", "Checkpoint"
    kind = "Checkpoint"

    # ---- what learns ------------------------------------------------------------------------------------------------

    @property
    def learning_rates(self) -> dict[str, float]:
        """Part -> its learning rate. A part whose rate is 0 is left out: it stays frozen."""
        general = self.options.optimizer.learning_rate
        parts = self.family.learning_parts(self.options.finetune)
        rates = {name: general if rate is None else rate for name, rate in parts.items()}
        return {name: rate for name, rate in rates.items() if rate != 0}

    @property
    def learning(self) -> frozenset[str]:
        return frozenset(self.learning_rates)

    def load_dtype(self, part: str) -> torch.dtype:
        """Weights that learn are loaded as they will be kept: a detour over half precision would round them."""
        return trained_dtype(self.options.precision) if part in self.learning else self.dtype

    def build_trainables(self) -> Trainables:
        models, rates = self.models, self.learning_rates
        modules = {name: models.denoiser if name == "denoiser" else models.encoders[name] for name in rates}
        groups: list[dict[str, Any]] = []
        for name, rate in rates.items():
            if name == "denoiser":
                groups += self.family.denoiser_groups(models.denoiser, self.options.finetune, rate)
            else:
                groups.append({"params": [*modules[name].parameters()], "lr": rate, "name": name})
        groups = [group for group in groups if group["params"] and group["lr"] != 0]
        if not groups:
            raise UserError("nothing learns: every block of the model has the learning rate 0")
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        self.learned = LearningModels(modules)
        self.learned.train()
        return Trainables(
            module=self.learned,
            groups=groups,
            modules=self.learned.parts(),
            state=self.learned.state,
            load=self.learned.load,
            encoders=self.learning - {"denoiser"},
            flat=False,  # a second copy of a whole model would not fit where the first just does
        )

    # ---- checks -----------------------------------------------------------------------------------------------------

    def checks(self) -> list[Callable[[], None]]:
        return [self.check_rates, self.check_caches, self.check_data]

    def check_rates(self) -> None:
        """Something learns."""
        if not self.learning:
            raise UserError("nothing learns: all learning rates are 0 (see --learning_rate)")

    def check_caches(self) -> None:
        """Cached text outputs leave something to cache."""
        encoders = self.family.encoders
        if self.options.cache.texts and encoders and self.learning.issuperset(encoders):
            raise UserError(
                "--cache_text_encoder_outputs fixes the outputs of the text encoders, which are being trained: "
                "leave it out, or train the denoiser only"
            )

    def check_data(self) -> None:
        """No picture wants to be kept as the untrained model makes it: that model is gone."""
        options = self.options
        configs = load_dataset_config(options.data, bucket_step=self.family.bucket_step, cache=options.cache)
        subsets = [subset for config in configs for subset in config.subsets]
        wanted = [s.name for s in subsets if s.custom_attributes.get("diff_output_preservation")]
        if wanted:
            raise UserError(
                f"custom_attributes.diff_output_preservation ({first_names(wanted)}) needs the untrained model, "
                "which full training changes: leave it out, or train a network"
            )

    # ---- files ------------------------------------------------------------------------------------------------------

    def save_model(self, path: Path, metadata: dict[str, str]) -> None:
        precision = self.options.save.save_precision
        models, dtype = self.models, DTYPES[precision] if precision else None
        encoders = {name: module for name, module in models.encoders.items() if name in self.learning}
        self.family.save(models.denoiser, encoders, path, dtype, metadata)

    def metadata(self) -> None:
        """A checkpoint says what it is, not how it was made."""


class LearningModels(nn.ModuleDict):
    """The models that learn, by part. Of their parameters those learn that need a gradient."""

    def learning_parameters(self) -> dict[str, nn.Parameter]:
        """Part and path -> parameter."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Path of each layer -> its own parameters that learn."""
        found: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.learning_parameters().items():
            found.setdefault(name.rpartition(".")[0], []).append(parameter)
        return found

    def state(self) -> dict[str, Tensor]:
        """Exactly what learns. The tensors are the parameters' own, not copies."""
        return {name: p.detach() for name, p in self.learning_parameters().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`. Raises UserError when the state is of other weights."""
        own = self.state()
        wrong = sorted(name for name in own.keys() | tensors.keys() if not _equal_shape(name, own, tensors))
        if wrong:
            raise UserError(f"--resume: the state holds other weights than those that learn now: {first_names(wrong)}")
        torch._foreach_copy_([*own.values()], [tensors[name] for name in own])


def _equal_shape(name: str, one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return name in one and name in other and one[name].shape == other[name].shape
