# SPDX-License-Identifier: Apache-2.0
"""Full training: the model's own weights learn, and the model is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.data.config import load_dataset_config
from library.errors import UserError, first_names, raise_problems
from library.io.checkpoint import EXTENSIONS, CheckpointForm, is_save_of
from library.learning import DENOISER, Learning, Models, Trainables
from library.log import get_logger, process_count
from library.memory.choice import MemoryChoice
from library.optim.in_backward import check_in_backward
from library.optim.optimizers import find_optimizer
from library.trainers.method import Method
from library.trainers.methods.finetune_options import ONE_FORMAT, FineTuneTrainerOptions
from library.trainers.settings import saved_dtype
from library.types import Position

log = get_logger()


class FineTuneMethod(Method[FineTuneTrainerOptions]):
    """Full training. The family decides which parts learn, at which rates, and how a model is written."""

    project = "finetuning"

    # ---- what learns ------------------------------------------------------------------------------------------------

    @property
    def learning_rates(self) -> dict[str, float]:
        """Part -> its learning rate. A part whose rate is 0 is left out: it stays frozen."""
        general = self.options.optimizer.learning_rate
        parts = self.family.learning_parts(self.options.finetune)
        rates = {name: general if rate is None else rate for name, rate in parts.items()}
        return {name: rate for name, rate in rates.items() if rate != 0}

    def learning(self) -> Learning:
        parts, optimizer = frozenset(self.learning_rates), self.options.optimizer
        in_backward = optimizer if optimizer.in_backward is not None else None
        return Learning(parts, changed=parts, in_backward=in_backward, swap_options=self.options.finetune)

    def build(self, models: Models, choice: MemoryChoice, *, files: bool = True) -> Trainables:
        rates = self.learning_rates
        modules = {name: models.denoiser if name == DENOISER else models.encoders[name] for name in rates}
        groups = self.groups(modules, rates)
        if not groups:
            raise UserError("nothing learns: every block of the model has the learning rate 0")
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        learned = LearningModels(modules)
        learned.train()
        encoders = {name: module for name, module in modules.items() if name != DENOISER}
        return Trainables(
            module=learned,
            groups=groups,
            modules=learned.parts(),
            state=learned.state,
            load=learned.load,
            write=partial(self.write, models.denoiser, encoders),
            kind="Checkpoint",
            before_step=EncoderStop(encoders, self.options.finetune.encoders_until).before_step,
            encoders=frozenset(encoders),
            skips=bool(self.family.optional(models.denoiser)),
            read_from_files=True,
            read_by_save=lambda: [models.denoiser],
            flat=False,  # a second copy of a whole model would not fit where the first just does
        )

    def groups(self, modules: Mapping[str, nn.Module], rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """The optimizer's groups, without empty ones and those with learning rate 0."""
        found: list[dict[str, Any]] = []
        for name, rate in rates.items():
            if name == DENOISER:
                found += self.family.denoiser_groups(modules[name], self.options.finetune, rate)
            else:
                found.append({"params": [*modules[name].parameters()], "lr": rate, "name": name})
        return [group for group in found if group["params"] and group["lr"] != 0]

    # ---- checks -----------------------------------------------------------------------------------------------------

    def checks(self) -> list[Callable[[], None]]:
        return [
            self.check_rates, self.check_in_backward, self.check_static_graph, self.check_caches, self.check_data,
            self.check_format, self.check_source,
        ]  # fmt: skip

    def check_rates(self) -> None:
        """Raises UserError if nothing learns."""
        if not self.learning_rates:
            raise UserError("nothing learns: all learning rates are 0 (see --learning_rate)")

    def check_static_graph(self) -> None:
        """Raises UserError if --ddp_static_graph is given but the weights that learn change."""
        if self.options.distributed.ddp_static_graph and self.options.finetune.encoders_until is not None:
            raise UserError(
                "--ddp_static_graph says that every step uses the same weights, and --stop_text_encoder_training "
                "changes them: leave one of them out"
            )

    def check_in_backward(self) -> None:
        """Raises UserError if weights cannot be stepped during the backward pass but should be."""
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
        """Raises UserError if text outputs are cached although every text encoder is trained."""
        encoders = self.family.encoders
        if self.options.cache.texts and encoders and self.learning_rates.keys() >= {*encoders}:
            raise UserError(
                "--cache_text_encoder_outputs fixes the outputs of the text encoders, which are being trained: "
                "leave it out, or train the denoiser only"
            )

    def check_data(self) -> None:
        """Raises UserError for diff_output_preservation: the untrained model is not available."""
        options = self.options
        configs = load_dataset_config(
            options.data, bucket_step=self.family.sheet.bucket_step, cache=options.cache,
            references=self.family.references is not None,
        )  # fmt: skip
        subsets = [subset for config in configs for subset in config.subsets]
        wanted = [s.name for s in subsets if s.custom_attributes.get("diff_output_preservation")]
        if wanted:
            raise UserError(
                f"custom_attributes.diff_output_preservation ({first_names(wanted)}) needs the untrained model, "
                "which full training changes: leave it out, or train a network"
            )

    def check_format(self) -> None:
        """Log options without effect."""
        save = self.options.save
        if self.family.sheet.formats == ("safetensors",) and (save.save_model_as or save.use_safetensors):
            log.info(f"--{'save_model_as' if save.save_model_as else 'use_safetensors'}: {ONE_FORMAT}")
        for line in self.options.finetune.idle():
            log.warning(line)

    def check_source(self) -> None:
        """Raises UserError if a save would overwrite the initial model, which every save reads again."""
        save, model = self.options.save, self.options.model
        folder = Path(save.output_dir or ".").resolve()
        given = {"--pretrained_model_name_or_path": model.pretrained_model_name_or_path, "--vae": model.vae}
        problems = []
        for flag, name in given.items():
            path = Path(name).resolve() if name else None
            if path and path.parent == folder and is_save_of(path.name, save.output_name, self.extension):
                problems.append(f"--output_name: the run would overwrite {name} of {flag}; give it another name")
        raise_problems(problems)

    # ---- files ------------------------------------------------------------------------------------------------------

    @property
    def format(self) -> str:
        """Format in which the model is written: one of the family's."""
        name = self.options.model.pretrained_model_name_or_path
        wanted = self.options.save.format_after(is_file=name is not None and Path(name).is_file())
        return wanted if wanted in self.family.sheet.formats else self.family.sheet.formats[0]

    @property
    def extension(self) -> str:
        return EXTENSIONS[self.format]

    def write(
        self, denoiser: nn.Module, encoders: dict[str, nn.Module], path: Path, metadata: dict[str, str],
        position: Position,
    ) -> None:  # fmt: skip
        """Write the model in its format, with the text encoders that learned."""
        form = CheckpointForm(self.format, position.epoch, position.step, saved_dtype(self.options.save), metadata)
        self.family.save(denoiser, encoders, path, form)


class DreamBoothMethod(FineTuneMethod):
    """train_db.py: full training under the name of its method."""

    project = "dreambooth"


class EncoderStop:
    """--stop_text_encoder_training: from a given step on, text encoders get no gradient, weight decay or momentum."""

    def __init__(self, encoders: Mapping[str, nn.Module], until: int | None) -> None:
        """until: the step; None: they learn to the end."""
        self.encoders, self.until, self.stopped = encoders, until, False

    def before_step(self, step: int) -> None:
        """Freeze the text encoders at the given step."""
        if self.until is None or step < self.until or self.stopped:
            return
        self.stopped = True
        for name, encoder in self.encoders.items():
            encoder.requires_grad_(False)
            log.info(f"the text encoder {name} stays as it is from step {self.until} on")


class LearningModels(nn.ModuleDict):
    """The models that learn, by part. Parameters learn if they require a gradient when this object is made."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__(modules)
        self._learning = frozenset(name for name, p in self.named_parameters() if p.requires_grad)

    def learning_parameters(self) -> dict[str, nn.Parameter]:
        """Part and path -> parameter, including those that have stopped learning since."""
        return {name: p for name, p in self.named_parameters() if name in self._learning}

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Path of each layer -> its own parameters that learn."""
        found: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.learning_parameters().items():
            found.setdefault(name.rpartition(".")[0], []).append(parameter)
        return found

    def state(self) -> dict[str, Tensor]:
        """The weights that learn. The tensors share memory with the parameters."""
        return {name: p.detach() for name, p in self.learning_parameters().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`, whose names and shapes `tensors` must have."""
        for name, own in self.state().items():
            own.copy_(tensors[name])
