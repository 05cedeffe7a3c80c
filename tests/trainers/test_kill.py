# SPDX-License-Identifier: Apache-2.0
"""Real processes that are killed, told to stop, or work in pairs."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from library.cli import EXIT_STOPPED
from library.io.metadata import tensor_hashes
from library.io.state import load_state, newest_state
from library.trainers.signals import EXIT_AT_ONCE
from tests.trainers import child
from tests.trainers.helpers import DEFAULTS, Run, assert_same_run, differing, subset, train, write_dataset

KILLS = 12
LIVELY: dict[str, Any] = {
    "network_args": ["rank_dropout=0.2"], "lr_scheduler": "cosine", "ema_decay": 0.9, "save_state": True,
    "max_train_steps": 42,
}  # fmt: skip


def options(model: Path, dataset: Path, folder: Path, **values: Any) -> dict[str, Any]:
    own = {"pretrained_model_name_or_path": model, "dataset_config": dataset, "output_dir": folder}
    return {**DEFAULTS, **own, **values}


def assert_whole(folder: Path) -> None:
    """Every file under a final name opens, and its content is what was written."""
    for path in folder.glob("[!.]*.safetensors"):
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata())
        assert tensor_hashes(tensors, metadata).items() <= metadata.items(), path
    for path in folder.glob("[!.]*-state"):
        load_state(path)  # compares sizes and sha256 with the manifest


@pytest.fixture(scope="module")
def endless(ground: Path, pictures: Path) -> Path:
    """A dataset whose only step of an epoch takes long: 100 batches are one step with accumulation."""
    return write_dataset(ground / "endless.toml", subset(pictures, num_repeats=100), batch_size=1)


def test_killed_at_random_moments(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    """Saving every step; each process is killed at a random moment after its first save, and the next one goes on."""
    whole = train(sd1, dataset, tmp_path / "whole", **LIVELY)
    folder, output = tmp_path / "killed", tmp_path / "output.txt"
    values = options(
        sd1, dataset, folder, **LIVELY, save_every_n_steps=1, save_last_n_steps=2, save_last_n_steps_state=2
    )
    rng, step_seconds, killed_at = random.Random(0), 0.0, []
    for attempt in range(KILLS):
        state = newest_state(folder, "x")
        assert (state is None) == (attempt == 0)
        process = child.start(child.script, {**values, "resume": state}, output)
        seen = newest_name(folder)
        child.wait_until(lambda before=seen: newest_name(folder) != before, process, output)
        if attempt == 0:
            began, seen = time.monotonic(), newest_name(folder)
            child.wait_until(lambda before=seen: newest_name(folder) != before, process, output)
            step_seconds = time.monotonic() - began
        time.sleep(rng.uniform(0, 1.5 * step_seconds))
        process.kill()
        assert child.exit_code(process) == -signal.SIGKILL, output.read_text(encoding="utf-8")[-3000:]
        assert_whole(folder)
        state = newest_state(folder, "x")
        assert state is not None
        killed_at.append(load_state(state).step)
    assert killed_at == sorted(set(killed_at))  # each came further than the one before
    train(sd1, dataset, folder, resume=newest_state(folder, "x"), **LIVELY)
    assert_same_run(Run(whole.trainer, 0, folder), whole)
    leftovers = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert leftovers == []


def newest_name(folder: Path) -> str:
    """Name of the last state in place; "" while there is none."""
    return max((path.name for path in child.states(folder)), default="")


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_first_signal_finishes_the_step_and_saves(
    number: signal.Signals, workers: int, sd1: Path, dataset: Path, tmp_path: Path
) -> None:
    """With workers, it goes to the process and then to its whole group, as `timeout` sends it."""
    folder, output = tmp_path / "stopped", tmp_path / "output.txt"
    own = {"max_train_steps": 400, "save_every_n_steps": 2, "max_data_loader_n_workers": workers}
    values = options(sd1, dataset, folder, **{**LIVELY, **own})
    process = child.start(child.script, values, output, has_children=workers > 0)
    child.wait_until(lambda: bool(child.states(folder)), process, output)
    child.tell(process, number)
    if workers:
        assert process.pid is not None
        os.killpg(process.pid, number)
    assert child.exit_code(process) == EXIT_STOPPED
    assert_whole(folder)
    state = newest_state(folder, "x")
    assert state is not None and f"continue with --resume {state}" in output.read_text(encoding="utf-8")
    step = load_state(state).step
    assert (folder / f"x-step{step:08d}.safetensors").is_file() and not (folder / "x.safetensors").exists()
    # the same length of run for both: the schedule depends on it
    further = {**LIVELY, "max_train_steps": 400, "initial_step": None}
    resumed = train(sd1, dataset, folder, resume=state, interrupt_in=step + 2, **further)
    whole = train(sd1, dataset, tmp_path / "whole", interrupt_in=step + 2, **further)
    name = f"x-step{step + 2:08d}"
    assert resumed.code == whole.code == EXIT_STOPPED
    for file in (f"{name}.safetensors", f"{name}-state/weights.safetensors"):
        assert differing(load_file(folder / file), load_file(tmp_path / "whole" / file)) == []


def test_second_signal_ends_at_once(sd1: Path, endless: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "stopped", tmp_path / "output.txt"
    values = options(sd1, endless, folder, gradient_accumulation_steps=500, save_state=True)
    process = child.start(child.script, values, output)
    child.wait_until(lambda: output.exists() and "plan: " in output.read_text(encoding="utf-8"), process, output)
    child.wait_until(lambda: (folder / "x.config.toml").exists(), process, output)
    time.sleep(0.3)
    child.tell(process, signal.SIGINT)
    child.wait_until(lambda: "stopping: finishing this step" in output.read_text(encoding="utf-8"), process, output)
    child.tell(process, signal.SIGINT)
    assert child.exit_code(process) == EXIT_AT_ONCE
    assert list(folder.glob("*.safetensors")) == [] and child.states(folder) == []


def test_two_processes_learn_one_network(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    """Gradients are shared, also where a part of the network gets none (--clip_skip 2); one process writes; a signal to
    one of them stops both after the same step; and what they resume is exact. Without --seed, one draws for both."""

    def pair(name: str, interrupt: int | None = None, **more: Any) -> tuple[list[int | None], list[Path]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        values = options(
            sd1, dataset, tmp_path / name.split()[0], clip_skip=2, save_state=True, max_train_steps=8, **more
        )
        files = [tmp_path / f"{name} {rank}.safetensors" for rank in (0, 1)]
        asked = (None, interrupt)
        both = [child.start(child.rank_of_two, rank, port, values, asked[rank], files[rank]) for rank in (0, 1)]
        codes = [child.exit_code(process) for process in both]
        assert all(file.exists() for file in files), files[0].with_suffix(".log").read_text(encoding="utf-8")[-3000:]
        return codes, files

    def facts(file: Path) -> dict[str, str]:
        with safe_open(file, "pt") as opened:
            return dict(opened.metadata())

    codes, whole = pair("whole", seed=None)
    seeds = {facts(file)["seed"] for file in whole}
    assert len(seeds) == 1
    assert codes == [0, 0] and differing(load_file(whole[0]), load_file(whole[1])) == []
    assert [facts(file)["written"] for file in whole] == ["x.safetensors x-state", ""]
    saved = Run(None, 0, tmp_path / "whole")  # type: ignore[arg-type]
    assert differing(saved.weights, load_file(whole[0])) == []

    codes, stopped = pair("stopped", interrupt=2, seed=seeds.pop())
    assert codes == [EXIT_STOPPED, EXIT_STOPPED]
    assert facts(stopped[0])["step"] == facts(stopped[1])["step"] == "3"
    codes, _ = pair("stopped again", seed=None, resume=newest_state(tmp_path / "stopped", "x"))
    assert codes == [0, 0]
    assert_same_run(Run(None, 0, tmp_path / "stopped"), saved)  # type: ignore[arg-type]
