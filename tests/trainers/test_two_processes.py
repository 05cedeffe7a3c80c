# SPDX-License-Identifier: Apache-2.0
"""Two processes learn what one learns with twice the accumulation, with every --ddp_* option, and go on from each
other's states: a step is so many batches of one plan, and noise, timesteps and dropout are keyed by their position.

The two processes are started once and do all runs one after the other: starting them is what takes long.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from library.errors import UserError
from tests.trainers import child, finetune_runs, helpers
from tests.trainers.helpers import Recorded, differing, make_pictures, make_trainer, subset, write_dataset

STEPS = 4
PICTURES = 5  # of batches of one: the last step of an epoch has fewer batches than the others
MINUTES = 7
# With --clip_skip 2 the last layer of the text encoder gets no gradient.
COMMON: dict[str, Any] = {"clip_skip": 2, "max_train_steps": STEPS}
METHODS: dict[str, dict[str, Any]] = {
    "joined": {"network_dropout": 0.2},  # a LoRA whose weights lie in one buffer
    # one whose weights do not; the denoiser alone learns, so that each weight has a gradient
    "single": {
        "optimizer_type": "Adafactor",
        "optimizer_args": ["relative_step=False"],
        "network_train_unet_only": True,
    },
    "full": {"train_text_encoder": True, "optimizer_type": "SGDNesterov", "learning_rate": 1e-2},
}
STATIC: dict[str, Any] = {"ddp_static_graph": True}
ALL: dict[str, Any] = {**STATIC, "ddp_gradient_as_bucket_view": True, "ddp_timeout": MINUTES}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "buckets": {"ddp_gradient_as_bucket_view": True},
    "static": STATIC,
    "all, accumulation 2": {**ALL, "gradient_accumulation_steps": 2},
}
RUNS = [
    *(("joined", way) for way in WAYS),
    ("single", "buckets"),
    ("single", "all, accumulation 2"),
    *(("full", way) for way in WAYS),
]


@pytest.fixture(scope="module")
def data(ground: Path) -> Path:
    pictures = make_pictures(ground / "five", PICTURES)
    return write_dataset(ground / "five.toml", subset(pictures), batch_size=1)


def options(method: str, sd1: Path, data: Path, folder: Path, **own: Any) -> dict[str, Any]:
    defaults = finetune_runs.DEFAULTS if method == "full" else helpers.DEFAULTS
    given = {"pretrained_model_name_or_path": sd1, "dataset_config": data, "output_dir": folder}
    return {**defaults, **given, **COMMON, **METHODS[method], **own}


@pytest.fixture(scope="module")
def pairs(sd1: Path, data: Path, ground: Path) -> Path:
    """A folder with what each process has at the end of each run: `method, way rank.safetensors`."""
    folder = ground / "pairs"
    folder.mkdir()
    jobs = {}
    ports = child.free_ports(len(RUNS) + 1)
    for (method, way), port in zip(RUNS, ports):
        values = options(method, sd1, data, folder / f"{method}, {way}", **WAYS[way])
        jobs[f"{method}, {way}"] = child.Job(values, method == "full", port)
    one = {"gradient_accumulation_steps": 2, "max_train_steps": 1, "save_state": True}
    assert make_trainer(options("joined", sd1, data, folder / "one", **one)).run() == 0
    two = {"resume": folder / "one/x-state", "save_state": True}
    jobs["joined, resumed"] = child.Job(options("joined", sd1, data, folder / "two", **two), False, ports[-1])
    both = [child.start(child.runs_together, rank, jobs, folder) for rank in (0, 1)]
    codes = [child.exit_code(process, seconds=300) for process in both]
    assert codes == [0, 0], (folder / "0.log").read_text(encoding="utf-8")[-3000:]
    return folder


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    weights: dict[str, Tensor]
    losses: Tensor  # of each step
    norms: Tensor  # of its gradients before clipping
    facts: dict[str, str]

    @staticmethod
    def of(pairs: Path, method: str, way: str, rank: int) -> Result:
        file = pairs / f"{method}, {way} {rank}.safetensors"
        weights = load_file(file)
        with safe_open(file, "pt") as opened:
            return Result(weights, weights.pop("losses"), weights.pop("norms"), dict(opened.metadata()))


Alone = Callable[[str, int], tuple[dict[str, Tensor], Result]]


@pytest.fixture(scope="module")
def alone(sd1: Path, data: Path, ground: Path) -> Alone:
    """The same runs by one process with twice the accumulation: the weights before, and the result."""

    @functools.cache
    def run(method: str, accumulation: int) -> tuple[dict[str, Tensor], Result]:
        folder = ground / f"alone {method} {accumulation}"
        values = options(method, sd1, data, folder, gradient_accumulation_steps=2 * accumulation)
        trainer = make_trainer(values, method="finetune" if method == "full" else "network")
        first: dict[str, Tensor] = {}

        def before(trainer: Recorded) -> None:
            first.update({name: value.clone() for name, value in trainer.trainables.state().items()})

        trainer.before = before
        assert trainer.run() == 0
        losses, norms = (torch.tensor([vars(r)[name] for r in trainer.reports]) for name in ("loss", "grad_norm"))
        return first, Result(trainer.trainables.state(), losses, norms, {})

    return run


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(torch.stack([torch.linalg.vector_norm(one[name] - other[name]) for name in one]).norm())


@pytest.mark.parametrize(("method", "way"), RUNS)
def test_two_processes_learn_what_one_does(method: str, way: str, pairs: Path, alone: Alone) -> None:
    accumulation = WAYS[way].get("gradient_accumulation_steps", 1)
    before, expected = alone(method, accumulation)
    first, second = (Result.of(pairs, method, way, rank) for rank in (0, 1))
    assert differing(first.weights, second.weights) == [] and differing(first.norms, second.norms) == []
    assert differing(first.losses, second.losses) == []  # the mean of both
    torch.testing.assert_close(first.losses, expected.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(first.norms, expected.norms, rtol=1e-4, atol=0)
    moved = [name for name, value in first.weights.items() if not torch.equal(value, before[name])]
    assert len(moved) > 0.8 * len(before)  # all but the layer without gradient
    if accumulation == 1:
        assert differing(first.weights, expected.weights) == []
    # with accumulation, the sum is made in another order, and AdamW may take the sign of what is left of 0
    assert distance(first.weights, expected.weights) < 1e-3 * distance(expected.weights, before)
    assert first.facts["model"] == ("StepModule" if method == "joined" else "DistributedDataParallel")
    looks = first.facts["model"] != "StepModule" and method == "full" and "ddp_static_graph" not in WAYS[way]
    assert first.facts["unused"] == str(looks)
    has_timeout = first.facts["timeout"] == str(timedelta(minutes=MINUTES))
    assert has_timeout == ("ddp_timeout" in WAYS[way])


def test_a_state_goes_on_with_another_number_of_processes(
    pairs: Path, alone: Alone, sd1: Path, data: Path, tmp_path: Path
) -> None:
    """One step of one process, STEPS - 1 of two, and one of one again: what one process learns in all of them."""
    resumed = Result.of(pairs, "joined", "resumed", 1)
    assert len(resumed.losses) == STEPS - 1 and differing(resumed.weights, alone("joined", 1)[1].weights) == []
    one = {"gradient_accumulation_steps": 2, "max_train_steps": STEPS + 1}
    last = make_trainer(options("joined", sd1, data, tmp_path / "last", resume=pairs / "two/x-state", **one))
    whole = make_trainer(options("joined", sd1, data, tmp_path / "whole", **one))
    assert last.run() == whole.run() == 0
    assert differing(last.trainables.state(), whole.trainables.state()) == []
    wrong = options("joined", sd1, data, tmp_path, resume=pairs / "two/x-state", max_train_steps=STEPS + 1)
    with pytest.raises(UserError, match="--gradient_accumulation_steps x processes was 2, is 1"):
        make_trainer(wrong).run()


def test_a_graph_that_changes_is_not_static(sd1: Path, data: Path, tmp_path: Path) -> None:
    given = {**STATIC, "network_module": "networks.dylora", "network_args": ["unit=2"]}
    with pytest.raises(UserError, match=r"^--ddp_static_graph: DyLoRA uses other weights"):
        make_trainer(options("joined", sd1, data, tmp_path, **given)).run()
    values = options("full", sd1, data, tmp_path, **STATIC, stop_text_encoder_training=1)
    with pytest.raises(UserError, match=r"^--ddp_static_graph .* and --stop_text_encoder_training changes them"):
        make_trainer(values, method="dreambooth").run()
