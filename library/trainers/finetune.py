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
from library.families.finetune_options import FineTuneOptions
from library.io.checkpoint import CheckpointForm, extension_of, is_save_of
from library.log import get_logger, process_count
from library.optim.in_backward import check_in_backward, units
from library.optim.optimizers import find_optimizer
from library.trainers.finetune_options import ONE_FORMAT, FineTuneTrainerOptions
from library.trainers.settings import trained_dtype
from library.trainers.trainables import Trainables
from library.trainers.trainer import Trainer

log = get_logger()


class FineTuneTrainer(Trainer):
    """The family says which parts learn, each at which rate, and how a model is written."""

    options: FineTuneTrainerOptions
    project, kind = "finetuning", "Checkpoint"
    encoders_learn = True  # until --stop_text_encoder_training

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

    def before_step(self) -> None:
        """From a given step on, text encoders stay as they are: no gradient, no decay, no momentum."""
        until = self.options.finetune.encoders_until
        if until is None or self.position.step < until or not self.encoders_learn:
            return
        self.encoders_learn = False
        for name in self.learning - {"denoiser"}:
            self.models.encoders[name].requires_grad_(False)
            log.info(f"the text encoder {name} stays as it is from step {until} on")

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

    @property
    def steps_in_backward(self) -> bool:
        return self.options.optimizer.in_backward is not None

    def units(self) -> list[list[nn.Parameter]]:
        return units(self.trainables.groups, self.memory.blocks, self.options.optimizer)

    @property
    def swap_options(self) -> FineTuneOptions:
        return self.options.finetune

    # ---- checks -----------------------------------------------------------------------------------------------------

    def checks(self) -> list[Callable[[], None]]:
        return [
            self.check_rates, self.check_in_backward, self.check_static_graph, self.check_caches, self.check_data,
            self.check_format, self.check_source,
        ]  # fmt: skip

    def check_rates(self) -> None:
        """Something learns."""
        if not self.learning:
            raise UserError("nothing learns: all learning rates are 0 (see --learning_rate)")

    def check_static_graph(self) -> None:
        """The same weights learn in every step, where that is promised."""
        if self.options.distributed.ddp_static_graph and self.options.finetune.encoders_until is not None:
            raise UserError(
                "--ddp_static_graph says that every step uses the same weights, and --stop_text_encoder_training "
                "changes them: leave one of them out"
            )

    def check_in_backward(self) -> None:
        """Weights can be stepped during the backward pass, where that is asked for."""
        options, name = self.options, self.options.optimizer.name
        if options.optimizer.in_backward is not None:
            check_in_backward(
                options.optimizer.in_backward,
                name,
                by_weight=find_optimizer(name)[0].by_weight,
                scaled=options.precision.mixed_precision == "fp16",
                processes=process_count(),
                deepspeed=options.distributed.deepspeed,
            )

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
        configs = load_dataset_config(options.data, bucket_step=self.family.sheet.bucket_step, cache=options.cache)
        subsets = [subset for config in configs for subset in config.subsets]
        wanted = [s.name for s in subsets if s.custom_attributes.get("diff_output_preservation")]
        if wanted:
            raise UserError(
                f"custom_attributes.diff_output_preservation ({first_names(wanted)}) needs the untrained model, "
                "which full training changes: leave it out, or train a network"
            )

    def check_format(self) -> None:
        """Say what of the options does nothing."""
        save = self.options.save
        if self.family.sheet.formats == ("safetensors",) and (save.save_model_as or save.use_safetensors):
            log.info(f"--{'save_model_as' if save.save_model_as else 'use_safetensors'}: {ONE_FORMAT}")
        for line in self.options.finetune.idle():
            log.warning(line)

    def check_source(self) -> None:
        """No save takes the place of the model that the run starts from: each save reads from it again."""
        save, model = self.options.save, self.options.model
        folder = Path(save.output_dir or ".").resolve()
        given = {"--pretrained_model_name_or_path": model.pretrained_model_name_or_path, "--vae": model.vae}
        problems = []
        for flag, name in given.items():
            path = Path(name).resolve() if name else None
            if path and path.parent == folder and is_save_of(path.name, save.output_name, self.extension):
                problems.append(f"--output_name: the run would overwrite {name} of {flag}; give it another name")
        if problems:
            raise UserError(problems)

    # ---- files ------------------------------------------------------------------------------------------------------

    @property
    def format(self) -> str:
        """How the model is written: one of the family's formats."""
        name = self.options.model.pretrained_model_name_or_path
        wanted = self.options.save.format_after(is_file=name is not None and Path(name).is_file())
        return wanted if wanted in self.family.sheet.formats else self.family.sheet.formats[0]

    @property
    def extension(self) -> str:
        return extension_of(self.format)

    def save_model(self, path: Path, metadata: dict[str, str]) -> None:
        precision = self.options.save.save_precision
        models, dtype = self.models, DTYPES[precision] if precision else None
        encoders = {name: module for name, module in models.encoders.items() if name in self.learning}
        form = CheckpointForm(self.format, self.position.epoch, self.position.step)
        self.family.save_as(form, models.denoiser, encoders, path, dtype, metadata)

    def metadata(self) -> None:
        """A checkpoint says what it is, not how it was made."""


class DreamBoothTrainer(FineTuneTrainer):
    """train_db.py: full training under the name of its method."""

    project = "dreambooth"


class LearningModels(nn.ModuleDict):
    """The models that learn, by part. Of their parameters those learn that need a gradient when it is made."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__(modules)
        self._learning = frozenset(name for name, p in self.named_parameters() if p.requires_grad)

    def learning_parameters(self) -> dict[str, nn.Parameter]:
        """Part and path -> parameter; also those that have stopped learning since."""
        return {name: p for name, p in self.named_parameters() if name in self._learning}

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
