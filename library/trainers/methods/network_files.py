# SPDX-License-Identifier: Apache-2.0
"""The adapter file of a run: its contents, and at the first save a check of how other programs read it."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from library.adapters.adapter_network import AdapterNetwork
from library.adapters.formats.architecture import table_named
from library.adapters.formats.conversion import convert, dora_norms, header, read_tensors
from library.adapters.readers.comparison import NetworkComparison, ProgramReport, report
from library.errors import UserError
from library.families.adapters import adapter_tables
from library.io.checkpoint import in_precision, save_tensors
from library.log import get_logger
from library.trainers.options import NetworkTrainerOptions
from library.trainers.settings import saved_dtype
from library.types import Position

log = get_logger()


class NetworkFile:
    """Writes a network in a --lora_format. The first save logs which programs take the file as it was trained."""

    def __init__(
        self, network: AdapterNetwork, options: NetworkTrainerOptions, names: str, usual: str, *, conditioned: bool
    ):
        """names: the table of names of the model (ModelFamily.table_name). usual: the default format.

        conditioned: it has no other format.
        """
        self.network, self.names = network, names
        asked, self.dtype = options.network.lora_format, saved_dtype(options.save)
        self.is_asked = asked is not None
        has_header = options.save.save_model_as in (None, "safetensors")
        self.format = asked or (usual if has_header else "kohya")
        self.tells = self.untold = not conditioned  # whether this save tells who takes the file; whether none has yet

    def check_format(self) -> None:
        """Raises UserError if a tensor cannot be written or has no name in the requested format."""
        if self.format == "kohya" and not self.network.layers_reached():
            return
        try:
            self.formatted(self.network.state(None), self.format)
        except UserError as error:
            if self.is_asked or self.format == "kohya":
                raise
            log.info(f"--lora_format kohya is chosen: {error.problems[0]}")
            self.format = "kohya"

    def write(self, path: Path, metadata: dict[str, str], position: Position) -> None:
        """Write the file completely or not at all."""
        state = in_precision(self.network.state(None), self.dtype, path)
        tensors, entries = self.formatted(state, self.format)
        save_tensors(path, tensors, {**metadata, **entries})
        if self.tells:
            say_who_takes(path, self.network, self.names, self.format, partial(self.rewritten, state))

    def rewritten(self, state: dict[str, Tensor], form: str, layers: Collection[str]) -> dict[str, Tensor]:
        """Some layers in another --lora_format."""
        own = {key: value for key, value in state.items() if key.partition(".")[0] in layers}
        return self.formatted(own, form)[0]

    def formatted(self, tensors: dict[str, Tensor], form: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The network's tensors under the names of a --lora_format, and the entries of the file's header."""
        if form == "kohya":
            return tensors, {}
        own = table_named(adapter_tables(), self.names)  # other models may have layers of the same names
        tables = adapter_tables() if own is None else (own,)
        norms = dora_norms(tensors, self.weight_source(), tables) if form == "comfy" else None
        return convert(tensors, form, tables, norms=norms), header(tensors, form, tables)

    def reads(self) -> list[nn.Module]:
        """The layers of the models whose weights the next save reads. Called before each save, in all processes."""
        self.tells, self.untold = self.untold, False
        adapted = [part.module for target in self.network.targets().values() for part in target.modules]
        return adapted if self.tells or (self.format == "comfy" and self.network.reads_weights(adapted)) else []

    def weight_source(self) -> Callable[[str], Tensor | None]:
        """A function from the name of an adapter to the weight of its layer, without the adapter."""
        targets = self.network.targets()
        if targets:
            return lambda name: targets[name].weight if name in targets else None
        layers = {layer.name: layer for layer in self.network.trained()}  # of third-party modules
        return lambda name: layers[name].weight() if name in layers else None


def say_who_takes(
    path: Path, network: AdapterNetwork, model: str, form: str,
    rewritten: Callable[[str, Collection[str]], Mapping[str, Tensor]],
) -> None:  # fmt: skip
    """Read the file back by the programs' rules and compare it with the live network. Never raises.

    model: the table of names (ModelFamily.table_name). rewritten: some layers in another --lora_format.
    """
    try:
        found = read_back(path, network, model, form, rewritten)
    except Exception as error:  # the save is finished; a failed check must not end the run
        log.warning(f"{path.name}: what other programs make of it could not be found out: {_line(error)}")
        return
    if found.taken_by:
        log.info(f"{path.name}: as it was trained in {' and '.join(found.taken_by)}")
    for line in found.warnings:
        log.warning(f"{path.name}: {line}")


def read_back(
    path: Path, network: AdapterNetwork, model: str, form: str,
    rewritten: Callable[[str, Collection[str]], Mapping[str, Tensor]],
) -> ProgramReport:  # fmt: skip
    """The report, made in main memory. The run's generators are as before: third-party layers may draw."""
    state = random.getstate()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            trained = NetworkComparison(network.trained(), model, adapter_tables())
            return report(trained, read_tensors(path), form, rewritten)
    finally:
        random.setstate(state)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
