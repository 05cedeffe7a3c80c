# SPDX-License-Identifier: Apache-2.0
"""ControlNet-LLLite by its own script: the model stays frozen, small networks learn to follow control images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from library.adapters.adapter_network import AdapterNetwork
from library.adapters.formats.conversion import read_tensors
from library.adapters.layers.lllite import sizes_of
from library.errors import UserError, raise_problems, retold
from library.families.adapters import load_network_module
from library.io.checkpoint import save_tensors
from library.learning import DENOISER, Learning, Models, Trainables
from library.memory.choice import MemoryChoice
from library.trainers.method import Method
from library.trainers.methods.lllite_options import LLLiteTrainerOptions
from library.trainers.settings import saved_dtype
from library.types import Position


class LLLiteMethod(Method[LLLiteTrainerOptions]):
    """ControlNet-LLLite. Files are the same as with --network_module networks.control_net_lllite."""

    project = "lllite_control_net_train"
    learns_edits = False

    def checks(self) -> list[Callable[[], None]]:
        return [self.check_weights]

    def check_weights(self) -> None:
        """Raises UserError if --network_weights is not a ControlNet-LLLite of the requested sizes."""
        given = self.given_weights()
        if given is None:
            return
        file, options = self.options.lllite.network_weights, self.options.lllite
        sizes = sizes_of(given)
        if sizes is None:
            raise UserError(f"--network_weights: {file} is no ControlNet-LLLite")
        wanted = {"cond_emb_dim": options.cond_emb_dim, "network_dim": options.network_dim}
        raise_problems(
            f"--{name} {value}: {file} of --network_weights has {size}; leave it out"
            for (name, value), size in zip(wanted.items(), sizes, strict=True)
            if value not in (None, size)
        )

    def learning(self) -> Learning:
        return Learning(frozenset({DENOISER}), conditioned=True)

    def build(self, models: Models, choice: MemoryChoice, *, files: bool = True) -> Trainables:
        network = self.create_network(models.denoiser, self.given_weights() if files else None)
        network.attach(train_denoiser=True, train_text_encoder=False)
        groups = network.param_groups(learning_rate=self.options.optimizer.learning_rate)
        if not groups:
            raise UserError("nothing learns: --learning_rate is 0")
        return Trainables(
            module=network,
            groups=groups,
            modules=network.module_parameters(),
            state=network.exact_state,
            load=network.load_exact_state,
            write=partial(self.write, network),
            kind="ControlNet-LLLite",
            set_multiplier=network.set_multiplier,
            set_condition=network.set_condition,
            base_model=network.disabled,
        )

    def create_network(self, unet: nn.Module, given: dict[str, Tensor] | None) -> AdapterNetwork:
        """A new network, or the one of `given`."""
        options, dropout = self.options.lllite, self.options.lllite.network_dropout
        module = load_network_module("networks.control_net_lllite")
        if given is None:
            sizes = {} if options.cond_emb_dim is None else {"cond_emb_dim": options.cond_emb_dim}
            return module.create_network(
                1.0, options.network_dim, None, None, None, unet, neuron_dropout=dropout, **sizes
            )
        network, _ = module.create_network_from_weights(
            1.0, options.network_weights, None, None, unet, given, neuron_dropout=dropout
        )
        return network

    def given_weights(self) -> dict[str, Tensor] | None:
        """The tensors of --network_weights, if given. Raises UserError if it cannot be read."""
        file = self.options.lllite.network_weights
        with retold(lambda line: f"--network_weights: {line}"):
            return None if file is None else read_tensors(file)

    def write(self, network: AdapterNetwork, path: Path, metadata: dict[str, str], position: Position) -> None:
        """Write the network's weights."""
        save_tensors(path, network.state(None), metadata, dtype=saved_dtype(self.options.save))
