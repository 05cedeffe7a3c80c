# SPDX-License-Identifier: Apache-2.0
"""LoRA and every other adapter network: the frozen models get adapters, the adapters learn and are saved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from library.adapters.adapter_network import AdapterNetwork
from library.adapters.foreign.plugin_network import foreign_error
from library.adapters.formats.conversion import read_adapter
from library.adapters.formats.recognition import parse
from library.adapters.layer_network import encoder_rate
from library.errors import UserError, raise_problems, retold
from library.families.adapters import adapter_tables, load_network_module, tables_of
from library.families.registry import misfit
from library.io.metadata import NetworkFacts
from library.learning import DENOISER, Learning, Models, Trainables
from library.log import get_logger
from library.memory.choice import MemoryChoice
from library.memory.quantise import quantise
from library.trainers.method import Method
from library.trainers.methods.network_files import NetworkFile
from library.trainers.options import NetworkTrainerOptions

log = get_logger()
FEW_RANKS = 1024  # never refused


class NetworkMethod(Method[NetworkTrainerOptions]):
    """`--network_module`: a built-in one, or any with create_network(...) and create_network_from_weights(...)."""

    project = "network_train"

    def explained(self, error: Exception) -> str | None:
        return foreign_error(self.network_module, error)

    def checks(self) -> list[Callable[[], None]]:
        return [
            self.check_module, self.check_encoders, self.check_control, self.check_edits, self.check_files,
            self.check_caches,
        ]  # fmt: skip

    def check_module(self) -> None:
        """Raises UserError if the network module is for other models, cannot be imported or rejects --network_args."""
        problem = misfit(self.family.name, self.network_module)
        if problem is not None:
            raise UserError(problem)
        problems = self.rank_problems()
        try:
            load_network_module(self.network_module).check_arguments(self.network_args)
        except UserError as error:
            problems += error.problems
        raise_problems(problems)

    def rank_problems(self) -> list[str]:
        """Problem of a rank above that of every layer of the denoiser; third-party modules and LoKr may use such."""
        dim, kinds = self.options.network.network_dim, self.family.sheet.networks
        if dim is None or self.network_module not in kinds.values() or self.network_module == kinds.get("lokr"):
            return []
        try:
            part = self.family.part("denoiser")
        except UserError:  # `family.check` says it
            return []
        shapes = [shape for name, shape in part.file.shapes.items() if name.startswith(part.prefix) and len(shape) > 1]
        widest = max([side for shape in shapes for side in shape], default=0)
        if dim <= max(widest, FEW_RANKS):
            return []
        return [f"--network_dim {dim}: no layer of the denoiser is wider than {widest}, and a higher rank adds nothing"]

    def check_encoders(self) -> None:
        """Raises UserError or warns if options of text encoders are given but none may learn."""
        asked = self.family.sheet.asked_encoders
        if any(asked.get(name) != "" for name in self.family.encoders):
            return
        if self.options.network.network_train_text_encoder_only:
            raise UserError("--network_train_text_encoder_only: the text encoder of this model is never trained here")
        if self.options.network.text_encoder_lr:
            log.warning("--text_encoder_lr: no effect, the text encoder of this model is never trained here")

    def check_control(self) -> None:
        """Raises UserError for options without meaning for a network that looks at control images."""
        options = self.options.network
        names = ("base_weights", "scale_weight_norms", "network_train_text_encoder_only")
        given = [f"--{name}" for name in names if vars(options)[name]]
        given += ["--lora_format"] if options.lora_format not in (None, "kohya") else []
        if self.conditioned and given:
            raise UserError(f"{name} has no meaning with --network_module {self.network_module}" for name in given)

    def check_edits(self) -> None:
        """Raises UserError if the channels of reference pictures would not learn."""
        if self.family.edits and self.conditioned:
            raise UserError(
                f"--task edit has no meaning with --network_module {self.network_module}, which reads control images"
            )
        if not self.family.grows_input:
            return
        if DENOISER not in self.learning().parts:
            raise UserError("--task edit: this model has to learn to read reference pictures, so the U-Net must learn")
        if not self.network_module.startswith("networks."):
            raise UserError(
                f"--network_module {self.network_module} does not train this model's new channels for reference "
                f"pictures: give {self.family.sheet.default_network}, or start from a model that edits pictures"
            )

    def check_files(self) -> None:
        """Raises UserError if a file of --network_weights or --base_weights is missing or holds no network."""
        options = self.options.network
        if options.dim_from_weights and options.network_dim is not None:
            log.warning("--network_dim and --network_alpha: no effect with --dim_from_weights, the file has its own")
        given = [("--network_weights", options.network_weights)] if options.network_weights else []
        given += [("--base_weights", file) for file in options.base_weights or ()]
        problems = [f"{flag}: {file} does not exist" for flag, file in given if not Path(file).exists()]
        prefixes = self.prefixes_of(self.family.encoders, learning=False) if self.options.cache.texts else ()
        for flag, file in given:
            if not Path(file).exists():
                continue
            try:
                names = self.read_adapter(flag, file)
            except UserError as error:
                problems += error.problems
                continue
            with suppress(UserError):  # `family.check` says what is wrong with the model
                if problem := self.family.adapter_problem(names):
                    problems.append(f"{flag} {file} {problem}")
            if flag == "--base_weights" and any(name.startswith(prefixes) for name in names):
                problems.append(
                    f"--base_weights {file} changes the text encoder, whose outputs are cached without it: "
                    "leave out --cache_text_encoder_outputs"
                )
        raise_problems(problems)

    def read_adapter(self, flag: str, file: str) -> dict[str, Tensor]:
        """An adapter file for this run's model, with kohya keys. Raises UserError naming option and file."""
        own = self.network_module.startswith("networks.") and not self.conditioned
        with retold(lambda line: f"{flag} {file}: {line.removeprefix(f'{file}: ')}"):
            tensors = read_adapter(file, adapter_tables(), tables_of(self.family.name))
            if own and not any(parse(key) for key in tensors):
                raise UserError(f"holds no adapter: none of its {len(tensors)} keys is one of an adapter's")
        return tensors

    def check_caches(self) -> None:
        """Raises UserError if text outputs are cached although every text encoder is trained."""
        if self.options.cache.texts and self.learning().parts.issuperset(self.family.encoders):
            raise UserError(
                "--cache_text_encoder_outputs fixes the text encoder's outputs, which are being trained: "
                "add --network_train_unet_only, or leave the cache out"
            )

    def learning(self) -> Learning:
        options, conditioned = self.options.network, self.conditioned
        parts = set() if options.network_train_text_encoder_only or options.unet_lr == 0 else {DENOISER}
        if not options.network_train_unet_only and not conditioned:
            parts.update(name for index, name in enumerate(self.family.encoders) if self.trains_encoder(name, index))
        return Learning(
            frozenset(parts),
            conditioned=conditioned,
            merges=bool(options.base_weights),
            reads_weights=not self.network_module.startswith("networks."),
        )

    @property
    def conditioned(self) -> bool:
        """Whether the network looks at control images; False for a module that `check_module` refuses."""
        try:
            return load_network_module(self.network_module).conditioned
        except UserError:
            return False

    def trains_encoder(self, name: str, index: int) -> bool:
        """Whether text encoder `name` gets adapters: large ones only when --network_args ask for it."""
        asked = self.family.sheet.asked_encoders.get(name)
        if asked is not None and self.network_args.get(asked, "").lower() not in ("true", "1", "yes", "on"):
            return False
        return encoder_rate(self.options.network.text_encoder_lr, index) != 0

    def prefixes_of(self, encoders: Sequence[str], *, learning: bool) -> tuple[str, ...]:
        """Prefixes of adapter names for those of the encoders that learn, or for those that do not."""
        parts = self.learning().parts
        prefixes = self.family.sheet.adapter_prefixes
        return tuple(f"{prefixes[n]}_" for n in encoders if n in prefixes and (n in parts) == learning)

    def build(self, models: Models, choice: MemoryChoice, *, files: bool = True) -> Trainables:
        options, learning = self.options.network, self.learning()
        if files:
            self.merge_base_weights(models, choice)
        network = self.create_network(models)
        network.attach(train_denoiser=DENOISER in learning.parts, train_text_encoder=bool(learning.encoders))
        self.report_reach(network, models)
        if files and options.network_weights and not options.dim_from_weights:
            self.load_weights(network)
        self.check_moved_weights(network, models, choice)
        if network.is_sparse() and self.options.distributed.ddp_static_graph:
            raise UserError("--ddp_static_graph: DyLoRA uses other weights in each step: leave the option out")
        if choice.activation_budget < 1:
            network.enable_gradient_checkpointing()
        groups = network.param_groups(
            learning_rate=self.options.optimizer.learning_rate,
            unet_lr=options.unet_lr,
            text_encoder_lr=list(options.text_encoder_lr) if options.text_encoder_lr else None,
        )
        if not groups:
            raise UserError("nothing learns: all learning rates are 0 (--learning_rate, --unet_lr, --text_encoder_lr)")
        usual = self.family.sheet.lora_format
        file = NetworkFile(network, self.options, self.family.table_name, usual, conditioned=learning.conditioned)
        return Trainables(
            module=network,
            groups=groups,
            modules=network.module_parameters(),
            state=network.exact_state,
            load=network.load_exact_state,
            write=file.write,
            kind="ControlNet-LLLite" if learning.conditioned else "LoRA",
            facts=NetworkFacts(self.network_module, options.network_dim, options.network_alpha, self.network_args),
            check_format=file.check_format,
            encoders=learning.encoders,
            # nothing is known of third-party modules
            skips=network.is_sparse() or learning.reads_weights or bool(self.family.optional(models.denoiser)),
            flat=not network.is_sparse(),
            set_multiplier=network.set_multiplier,
            set_condition=network.set_condition,
            after_step=partial(after_step, network, options.scale_weight_norms),
            use_copies=network.use_copies,
            epoch_started=network.epoch_started,
            base_model=network.disabled,
            reads_weights=network.reads_weights,
            reads_between_steps=network.reads_between_steps(),
            read_by_save=file.reads,
        )

    def load_weights(self, network: AdapterNetwork) -> None:
        """Load --network_weights into an existing network."""
        file = self.options.network.network_weights
        with retold(lambda line: f"--network_weights {file}: {line.removeprefix(f'{file}: ')}"):
            network.load(self.given_weights())

    def report_reach(self, network: AdapterNetwork, models: Models) -> None:
        """Log which layers a third-party module adapts. Raises UserError if none of them would learn."""
        name, parts, problems = self.network_module, self.learning().parts, []
        for place, layers in network.layers_reached().items():
            part = "denoiser" if place is None else self.family.encoders[place]
            if part not in parts:
                continue
            changed = [layer for layer in layers if layer.changed]
            line = f"{name} adapts {len(changed)} of {len(layers)} layers of the {part}"
            asked = self.family.sheet.asked_encoders.get(part)
            if part == "denoiser":
                blocks = self.family.blocks(models.denoiser)
                inside = [{id(module) for module in block.modules()} for block in blocks]
                reached = [block for block in inside if any(id(m) in block for own in changed for m in own.modules)]
                line += f", in {len(reached)} of its {len(blocks)} blocks"
                if not reached:
                    problems.append(f"--network_module {line}: nothing of it would learn (preset, --network_args?)")
            elif not changed and (asked or DENOISER not in parts):
                problems.append(f"--network_module {line}, which {'is asked for' if asked else 'alone learns'}")
            log.info(line)
        raise_problems(problems)

    def check_moved_weights(self, network: AdapterNetwork, models: Models, choice: MemoryChoice) -> None:
        """Raises UserError if an adapter would read weights while they are in main memory."""
        problems, modulations = [], self.family.modulations(models.denoiser) if choice.hoist else None
        if modulations is not None and network.reads_weights(modulations[1]):
            problems.append(
                "--hoist_modulation: adapters that read weights (DoRA, OFT, third-party modules) cannot be on the "
                "modulation layers, whose weights it takes away: leave it out"
            )
        if choice.blocks_to_swap and network.reads_between_steps():
            problems.append("--blocks_to_swap: ggpo_sigma and ggpo_beta read all weights after each step; leave it out")
        raise_problems(problems)

    def create_network(self, models: Models) -> AdapterNetwork:
        """A new network, or with --dim_from_weights the network of the file."""
        options = self.options.network
        encoders = self.encoders_in_order(models, self.learning().parts)
        module = load_network_module(self.network_module)
        if options.dim_from_weights:
            assert options.network_weights is not None
            network, weights = module.create_network_from_weights(
                1.0,
                options.network_weights,
                models.vae,
                encoders,
                models.denoiser,
                self.given_weights(),
                False,
                neuron_dropout=options.network_dropout,
                **self.network_args,
            )
            network.load(weights)
            return network
        return module.create_network(
            1.0, options.network_dim, options.network_alpha, models.vae, encoders, models.denoiser,
            neuron_dropout=options.network_dropout, **self.network_args,
        )  # fmt: skip

    def given_weights(self) -> dict[str, Tensor]:
        """--network_weights, without adapters of text encoders that do not learn."""
        file = self.options.network.network_weights
        assert file is not None
        tensors = self.read_adapter("--network_weights", file)
        frozen = self.prefixes_of([*self.family.sheet.adapter_prefixes], learning=False)
        kept = {name: value for name, value in tensors.items() if not name.startswith(frozen)}
        if len(kept) < len(tensors):
            count = len(tensors) - len(kept)
            log.warning(f"--network_weights {file}: {count} tensors are of text encoders, which do not learn: left out")
        return kept

    def encoders_in_order(self, models: Models, wanted: Collection[str]) -> list[nn.Module | None]:
        """The loaded text encoders among `wanted` in their places, None for the others; empty without any.

        Encoders that do not learn get no adapters: initialising them would shift the random draws of the others.
        """
        found = [models.encoders.get(name) if name in wanted else None for name in self.family.encoders]
        return found if any(encoder is not None for encoder in found) else []

    @property
    def network_args(self) -> dict[str, str]:
        return dict(item.split("=", 1) for item in self.options.network.network_args)

    @property
    def network_module(self) -> str:
        return self.options.network.network_module or self.family.sheet.default_network

    def merge_base_weights(self, models: Models, choice: MemoryChoice) -> None:
        """Merge the networks of --base_weights into the models before training."""
        options = self.options.network
        module = load_network_module(self.network_module)
        multipliers = options.base_weights_multiplier or ()
        encoders = self.encoders_in_order(models, self.family.sheet.adapter_prefixes)
        for index, file in enumerate(options.base_weights or ()):
            multiplier = multipliers[index] if index < len(multipliers) else 1.0
            with torch.random.fork_rng(devices=[]):  # the layers made here must not shift the draws of those that learn
                network, weights = module.create_network_from_weights(
                    multiplier, file, models.vae, encoders, models.denoiser,
                    self.read_adapter("--base_weights", file), for_inference=True,
                )  # fmt: skip
            network.load(weights)
            network.merge_into()
            log.info(f"merged {file} at strength {multiplier}")
        if options.base_weights:
            asked = replace(self.learning(), merges=False)
            for part, model in ((DENOISER, models.denoiser), *models.encoders.items()):
                storage = asked.storage(part, choice)
                if storage != "plain" and storage != "half":
                    quantise(model, storage)


def after_step(network: AdapterNetwork, limit: float | None) -> dict[str, float | Tensor]:
    """Notify the network of the step and apply --scale_weight_norms. Returns numbers to log."""
    network.step_taken()
    if limit is None:
        return {}
    report = network.scale_norms(limit)
    return {
        "max_norm/keys_scaled": report.scaled,
        "max_norm/average_key_norm": report.mean,
        "max_norm/max_key_norm": report.maximum,
    }
