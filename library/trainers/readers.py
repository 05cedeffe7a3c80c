# SPDX-License-Identifier: Apache-2.0
"""At the first save of a run: which programs make of the adapter file what was trained, one line for each other one."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.adapters.adapter_network import AdapterNetwork
from library.adapters.formats.conversion import read_tensors
from library.adapters.readers.comparison import NetworkComparison, ProgramReport, report
from library.families.adapters import adapter_tables
from library.log import get_logger

log = get_logger()


def say_who_takes(
    path: Path, network: AdapterNetwork, model: str, form: str,
    rewritten: Callable[[str, Collection[str]], Mapping[str, Tensor]],
) -> None:  # fmt: skip
    """Read the file back by the programs' rules and compare it with the live network. Never ends a training.

    model: the table of names (ModelFamily.adapter_names). rewritten: some layers in another --lora_format.
    """
    try:
        found = read_back(path, network, model, form, rewritten)
    except Exception as error:  # a finished save must not be lost to a look at it
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
            return report(
                NetworkComparison(network.trained(), model, adapter_tables()), read_tensors(path), form, rewritten
            )
    finally:
        random.setstate(state)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
