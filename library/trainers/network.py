# SPDX-License-Identifier: Apache-2.0
"""LoRA and every other adapter network: the frozen models get adapters, the adapters learn and are saved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.adapters.adapter_network import AdapterNetwork
from library.adapters.foreign.plugin_network import foreign_error
from library.adapters.formats.conversion import convert, dora_norms, header, read_adapter
from library.adapters.formats.recognition import parse
from library.adapters.layer_network import encoder_rate
from library.device import DTYPES
from library.errors import UserError
from library.families.adapters import adapter_tables, load_network_module, tables_of
from library.families.registry import FAMILIES, misfit
from library.io.checkpoint import in_precision, save_tensors
from library.log import get_logger
from library.memory.quantise import Storage, quantise
from library.trainers.options import NetworkTrainerOptions
from library.trainers.readers import say_who_takes
from library.trainers.trainables import Trainables
from library.trainers.trainer import Trainer

log = get_logger()
FEW_RANKS = 1024  # never refused


class NetworkTrainer(Trainer):
    """`--network_module`: ours, or any module with create_network(...) and create_network_from_weights(...)."""

    options: NetworkTrainerOptions
    project = "network_train"
    kind = "LoRA"
    first_save = True

    def run(self) -> int:
        try:
            return super().run()
        except Exception as error:
            line = foreign_error(self.network_module, error)
            if line is None:
                raise
            raise UserError(line) from error

    def checks(self) -> list[Callable[[], None]]:
        return [self.check_module, self.check_control, self.check_files, self.check_caches]

    def check_module(self) -> None:
        """The network module is for these models, can be imported and knows the --network_args."""
        problem = misfit(self.family.name, self.network_module)
        if problem is not None:
            raise UserError(problem)
        problems = self.rank_problems()
        try:
            load_network_module(self.network_module).check_arguments(self.network_args)
        except UserError as error:
            problems += error.problems
        if problems:
            raise UserError(problems)

    def rank_problems(self) -> list[str]:
        """A rank that no layer of the denoiser has room for. In third-party modules and LoKr it asks for full ones."""
        dim, kinds = self.options.network.network_dim, FAMILIES[self.family.name].networks
        if dim is None or self.network_module not in kinds.values() or self.network_module == kinds["lokr"]:
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

    def check_control(self) -> None:
        """A network that looks at control images changes no weights, and its keys have one form."""
        options = self.options.network
        names = ("base_weights", "scale_weight_norms", "network_train_text_encoder_only")
        given = [f"--{name}" for name in names if vars(options)[name]]
        given += ["--lora_format"] if options.lora_format != "kohya" else []
        if self.conditioned and given:
            raise UserError(f"{name} has no meaning with --network_module {self.network_module}" for name in given)

    def check_files(self) -> None:
        """The network files to start from are there and hold a network."""
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
            if flag == "--base_weights" and any(name.startswith(prefixes) for name in names):
                problems.append(
                    f"--base_weights {file} changes the text encoder, whose outputs are cached without it: "
                    "leave out --cache_text_encoder_outputs"
                )
        if problems:
            raise UserError(problems)

    def read_adapter(self, flag: str, file: str) -> dict[str, Tensor]:
        """An adapter file for this run's model, with kohya keys. Raises UserError naming option and file."""
        own = self.network_module.startswith("networks.") and not self.conditioned
        try:
            tensors = read_adapter(file, adapter_tables(), tables_of(self.family.name))
            if own and not any(parse(key) for key in tensors):
                raise UserError(f"holds no adapter: none of its {len(tensors)} keys is one of an adapter's")
            return tensors
        except UserError as error:
            lines = (problem.removeprefix(f"{file}: ") for problem in error.problems)
            raise UserError(f"{flag} {file}: {line}" for line in lines) from None

    def check_caches(self) -> None:
        """Cached text outputs leave something to cache."""
        if self.options.cache.texts and self.learning.issuperset(self.family.encoders):
            raise UserError(
                "--cache_text_encoder_outputs fixes the text encoder's outputs, which are being trained: "
                "add --network_train_unet_only, or leave the cache out"
            )

    @property
    def learning(self) -> frozenset[str]:
        options = self.options.network
        parts = set() if options.network_train_text_encoder_only or options.unet_lr == 0 else {"denoiser"}
        if not options.network_train_unet_only and not self.conditioned:
            parts.update(name for index, name in enumerate(self.family.encoders) if self.trains_encoder(name, index))
        return frozenset(parts)

    @property
    def conditioned(self) -> bool:
        return load_network_module(self.network_module).conditioned

    def trains_encoder(self, name: str, index: int) -> bool:
        """Whether text encoder `name` gets adapters: large ones only when --network_args ask for it."""
        asked = self.family.asked_encoders.get(name)
        if asked is not None and self.network_args.get(asked, "").lower() not in ("true", "1", "yes", "on"):
            return False
        return encoder_rate(self.options.network.text_encoder_lr, index) != 0

    def prefixes_of(self, encoders: Sequence[str], *, learning: bool) -> tuple[str, ...]:
        """What the names of the adapters of these encoders begin with, of those that learn or of the others."""
        names = [name for name in encoders if (name in self.learning) == learning]
        return tuple(f"{self.family.adapter_prefixes[name]}_" for name in names)

    @property
    def changed(self) -> frozenset[str]:
        return frozenset()

    def storage(self, part: str) -> Storage:
        """Merging into fewer bits would round, and third-party networks may compute with the weights themselves."""
        found = super().storage(part)
        if self.options.network.base_weights:
            return "plain"
        return "plain" if found == "half" and not self.network_module.startswith("networks.") else found

    def build_trainables(self) -> Trainables:
        options = self.options.network
        self.merge_base_weights()
        self.network = self.create_network()
        if self.conditioned:
            self.kind = "ControlNet-LLLite"
        learning = self.learning
        self.network.attach(train_denoiser="denoiser" in learning, train_text_encoder=bool(learning - {"denoiser"}))
        self.report_reach()
        if options.network_weights and not options.dim_from_weights:
            try:
                self.network.load(self.given_weights())
            except UserError as error:
                file = options.network_weights
                lines = (problem.removeprefix(f"{file}: ") for problem in error.problems)
                raise UserError(f"--network_weights {file}: {line}" for line in lines) from None
        self.check_moved_weights()
        if self.network.is_sparse() and self.options.distributed.ddp_static_graph:
            raise UserError("--ddp_static_graph: DyLoRA uses other weights in each step: leave the option out")
        if self.choice.activation_budget < 1:
            self.network.enable_gradient_checkpointing()
        groups = self.network.param_groups(
            learning_rate=self.options.optimizer.learning_rate,
            unet_lr=options.unet_lr,
            text_encoder_lr=list(options.text_encoder_lr) if options.text_encoder_lr else None,
        )
        if not groups:
            raise UserError("nothing learns: all learning rates are 0 (--learning_rate, --unet_lr, --text_encoder_lr)")
        return Trainables(
            module=self.network,
            groups=groups,
            modules=self.network.module_parameters(),
            state=self.network.exact_state,
            load=self.network.load_exact_state,
            encoders=learning - {"denoiser"},
            flat=not self.network.is_sparse(),
            set_multiplier=self.network.set_multiplier,
            set_condition=self.network.set_condition,
            base_model=self.network.disabled,
            epoch_started=self.network.epoch_started,
            reads_weights=self.network.reads_weights,
            reads_between_steps=self.network.reads_between_steps(),
        )

    def report_reach(self) -> None:
        """What a third-party module found in the models. Raises UserError where it is nothing of what is to learn."""
        name, problems = self.network_module, []
        for place, layers in self.network.layers_reached().items():
            part = "denoiser" if place is None else self.family.encoders[place]
            if part not in self.learning:
                continue
            changed = [layer for layer in layers if layer.changed]
            line = f"{name} adapts {len(changed)} of {len(layers)} layers of the {part}"
            asked = self.family.asked_encoders.get(part)
            if part == "denoiser":
                blocks = self.family.blocks(self.models.denoiser)
                inside = [{id(module) for module in block.modules()} for block in blocks]
                reached = [block for block in inside if any(id(m) in block for own in changed for m in own.modules)]
                line += f", in {len(reached)} of its {len(blocks)} blocks"
                if not reached:
                    problems.append(f"--network_module {line}: nothing of it would learn (preset, --network_args?)")
            elif not changed and (asked or "denoiser" not in self.learning):
                problems.append(f"--network_module {line}, which {'is asked for' if asked else 'alone learns'}")
            log.info(line)
        if problems:
            raise UserError(problems)

    def check_moved_weights(self) -> None:
        """No adapter looks at weights while they are in main memory."""
        problems, modulations = [], self.family.modulations(self.models.denoiser) if self.choice.hoist else None
        if modulations is not None and self.network.reads_weights(modulations[1]):
            problems.append(
                "--hoist_modulation: adapters that read weights (DoRA, OFT, third-party modules) cannot be on the "
                "modulation layers, whose weights it takes away: leave it out"
            )
        if self.choice.blocks_to_swap and self.network.reads_between_steps():
            problems.append("--blocks_to_swap: ggpo_sigma and ggpo_beta read all weights after each step; leave it out")
        if problems:
            raise UserError(problems)

    def create_network(self) -> AdapterNetwork:
        options, models = self.options.network, self.models
        encoders = self.encoders_in_order(self.learning)
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
        frozen = self.prefixes_of([*self.family.adapter_prefixes], learning=False)
        kept = {name: value for name, value in tensors.items() if not name.startswith(frozen)}
        if len(kept) < len(tensors):
            count = len(tensors) - len(kept)
            log.warning(f"--network_weights {file}: {count} tensors are of text encoders, which do not learn: left out")
        return kept

    def encoders_in_order(self, wanted: Collection[str]) -> list[nn.Module | None]:
        """The loaded text encoders among `wanted` in their places, None for the others; empty without any.

        No adapters on what does not learn: their first values would shift the draws of the others.
        """
        found = [self.models.encoders.get(name) if name in wanted else None for name in self.family.encoders]
        return found if any(encoder is not None for encoder in found) else []

    @property
    def network_args(self) -> dict[str, str]:
        return dict(item.split("=", 1) for item in self.options.network.network_args)

    @property
    def network_module(self) -> str:
        return self.options.network.network_module or self.family.network_module

    def merge_base_weights(self) -> None:
        """--base_weights: networks that become part of the model before training."""
        options, models = self.options.network, self.models
        module = load_network_module(self.network_module)
        multipliers = options.base_weights_multiplier or ()
        encoders = self.encoders_in_order(self.family.encoders)
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
            for part, model in (("denoiser", models.denoiser), *models.encoders.items()):
                storage = super().storage(part)
                if storage != "plain" and storage != "half":
                    quantise(model, storage)

    def build_outputs(self) -> None:
        """What cannot be written, or has no name in the file's format, is refused now, not at the first save."""
        form = self.options.network.lora_format
        if form != "kohya" or self.network.layers_reached():
            self.formatted(self.network.state(None), form)
        super().build_outputs()

    def after_step(self) -> dict[str, float | Tensor]:
        self.network.step_taken()
        limit = self.options.network.scale_weight_norms
        if limit is None:
            return {}
        report = self.network.scale_norms(limit)
        return {
            "max_norm/keys_scaled": report.scaled,
            "max_norm/average_key_norm": report.mean,
            "max_norm/max_key_norm": report.maximum,
        }

    def save_model(self, path: Path, metadata: dict[str, str]) -> None:
        precision, form = self.options.save.save_precision, self.options.network.lora_format
        state = in_precision(self.network.state(None), DTYPES[precision] if precision else None, path)
        tensors, entries = self.formatted(state, form)
        save_tensors(path, tensors, {**metadata, **entries})
        if self.first_save and not self.conditioned:
            say_who_takes(path, self.network, self.family.adapter_names, form, partial(self.rewritten, state))
        self.first_save = False

    def rewritten(self, state: dict[str, Tensor], form: str, layers: Collection[str]) -> dict[str, Tensor]:
        """Some layers in another --lora_format."""
        own = {key: value for key, value in state.items() if key.partition(".")[0] in layers}
        return self.formatted(own, form)[0]

    def formatted(self, tensors: dict[str, Tensor], form: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The network's tensors under the names of a --lora_format, and what the file's header has to say of them."""
        if form == "kohya":
            return tensors, {}
        norms = dora_norms(tensors, self.weight_source(), adapter_tables()) if form == "comfy" else None
        tables = adapter_tables()
        return convert(tensors, form, tables, norms=norms), header(tensors, form, tables)

    def weight_source(self) -> Callable[[str], Tensor | None]:
        """From the name of an adapter to the weight that it is put on, as it is without it."""
        targets = self.network.targets()
        if targets:
            return lambda name: targets[name].weight if name in targets else None
        layers = {layer.name: layer for layer in self.network.trained()}  # of third-party modules
        return lambda name: layers[name].weight() if name in layers else None

    def metadata(self) -> dict[str, Any]:
        options = self.options.network
        return {
            "network_module": self.network_module,
            "network_dim": options.network_dim,
            "network_alpha": options.network_alpha,
            "network_args": self.network_args or None,
        }
