# SPDX-License-Identifier: Apache-2.0
"""Saves, states and resumed runs go through the weights port, in all processes and in the same order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from library.cli import EXIT_STOPPED
from library.io.state import load_state
from tests.trainers import child
from tests.trainers.helpers import DEFAULTS, differing, make_trainer, train


def pair(values: dict[str, Any], folder: Path) -> list[dict[str, list[str]]]:
    """What each of two processes called, and wrote."""
    folder.mkdir(exist_ok=True)
    files, (port,) = [folder / f"{rank}.json" for rank in (0, 1)], child.free_ports(1)
    both = [child.start(child.exchanging_rank, rank, port, values, files[rank]) for rank in (0, 1)]
    assert [child.exit_code(process) for process in both] == [0, 0], files[0].with_suffix(".log").read_text()[-3000:]
    return [json.loads(file.read_text()) for file in files]


def test_every_save_gathers_in_both_processes(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    values = {
        **DEFAULTS, "pretrained_model_name_or_path": sd1, "dataset_config": dataset, "output_dir": tmp_path / "out",
        "save_every_n_steps": 1, "save_state": True, "ema_decay": 0.9, "max_train_steps": 2, "ddp_timeout": 1,
    }  # fmt: skip
    main, other = pair(values, tmp_path / "first")
    assert main["calls"] == other["calls"] == ["whole", "gather"] * 2
    written = ["x-step00000001.safetensors", "x-step00000001-state", "x.safetensors", "x-state"]
    assert (main["written"], other["written"]) == (written, [])
    state = tmp_path / "out" / "x-step00000001-state"
    main, other = pair({**values, "resume": state, "save_every_n_steps": None}, tmp_path / "second")
    assert main["calls"] == other["calls"] == ["scatter", "whole", "gather"]


def test_what_is_gathered_is_saved(sd1: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one process, and where a run is stopped: a state first, then the weights."""
    expected = train(sd1, dataset, tmp_path / "plain", max_train_steps=1, save_state=True)
    values = {"pretrained_model_name_or_path": sd1, "dataset_config": dataset, "output_dir": tmp_path / "stopped"}
    trainer = make_trainer({**DEFAULTS, **values, "save_state": True})
    trainer.interrupt_in, port = 1, Recording()
    monkeypatch.setattr("library.trainers.stages.ReplicatedWeights", lambda: port)
    assert trainer.run() == EXIT_STOPPED
    assert port.calls == ["gather", "whole"]
    state = child.states(tmp_path / "stopped")[0]
    assert differing(load_state(state).weights, expected.state.weights) == []


class Recording(child.ExchangingPort):
    """For one process: nobody is there to meet."""

    def meet(self, name: str) -> None:
        self.calls.append(name)
