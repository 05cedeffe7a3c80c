# SPDX-License-Identifier: Apache-2.0
"""--shard_base: two and three processes with a part of the denoiser each learn what one with all of it does.

The processes are started once and do all runs one after the other: starting them is what takes long.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from library.errors import UserError
from library.io.state import load_state, unlike
from library.memory.estimate import predict
from library.planner.case import case_of
from library.planner.memory_plan import candidates
from tests.families import CASES
from tests.trainers import child, finetune_runs, helpers
from tests.trainers.helpers import Recorded, differing, make_pictures, make_trainer, planned_of, subset, write_dataset

STEPS = 2
PICTURES = 5
SGD: dict[str, Any] = {"optimizer_type": "SGDNesterov", "learning_rate": 1.0}
UNET_ONLY: dict[str, Any] = {"network_train_unet_only": True}
BF16: dict[str, Any] = {"mixed_precision": "bf16", "cache_latents": True}
LORA: dict[str, Any] = {**BF16, **UNET_ONLY}


@dataclass(frozen=True)
class Example:
    """A run, and how far its weights may be from those of one process: by this part of how far they have moved."""

    row: str  # of CASES
    values: dict[str, Any]
    full: bool = False  # full training
    within: float = 0.0

    @property
    def family(self) -> str:
        return CASES[self.row].family


# Where a tensor has three gradients (the skip connections of a U-Net, texts whose encoder learns, all weights that
# learn from a time embedding), those of one block are added first, and not the first two that come: `within`. Of
# weights in bf16 the last digit differs.
RUNS = {
    "flux": Example("flux", {**LORA, "gradient_checkpointing": True, "ema_decay": 0.9}),
    "fp8": Example(
        "lumina", {**LORA, "fp8_base_unet": True, "network_args": ["dora_wd=True"], "lora_format": "comfy"}
    ),
    "nf4": Example("flux", {**LORA, "base_quant": "nf4", "gradient_checkpointing": True}),
    "LoKr": Example("sd3", {**LORA, "network_module": "networks.lokr", "optimizer_type": "AdamW8bit"}),
    "Adafactor": Example(
        "lumina", {**LORA, "optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False"]}
    ),
    "sd": Example("sd1", {**SGD, "network_dropout": 0.2, "clip_skip": 2}, within=1e-4),
    "sdxl": Example(
        "sdxl", {**SGD, "network_args": ["dora_wd=True", "conv_dim=4"], "gradient_checkpointing": True}, within=1e-4
    ),
    "full flux": Example("flux", {"gradient_checkpointing": True, "ema_decay": 0.9}, full=True, within=1e-4),
    "full sd": Example(
        "sd1",
        {**SGD, "learning_rate": 1e-2, "train_text_encoder": True, "save_model_as": "diffusers_safetensors"},
        full=True, within=1e-4,
    ),
    "full bf16": Example("lumina", {**BF16, **SGD, "learning_rate": 1e-2}, full=True, within=1e-4),
    "full kahan": Example(
        "sd3", {**BF16, **SGD, "learning_rate": 0.1, "full_bf16": True, "bf16_update": "kahan"}, full=True, within=0.1
    ),
    "full sdxl": Example(
        "sdxl", {"optimizer_type": "SGDNesterov8bit", "learning_rate": 1e-2}, full=True, within=1e-3
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(ground: Path) -> Path:
    pictures = make_pictures(ground / "sharded", PICTURES)
    return write_dataset(ground / "sharded.toml", subset(pictures), batch_size=1)


@pytest.fixture(scope="module")
def models(ground: Path) -> Mapping[str, dict[str, Any]]:
    """The options that name each tiny model."""
    rows = dict.fromkeys(example.row for example in RUNS.values())
    return {row: {**CASES[row].make(ground / f"sharded {row}"), **CASES[row].options} for row in rows}


@pytest.fixture(scope="module")
def shown(data: Path, ground: Path) -> dict[str, Any]:
    """Options with which a run validates, and makes previews before and after."""
    held_out = write_dataset(ground / "held out.toml", subset(ground / "sharded"), batch_size=1, validation_split=0.4)
    (ground / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\na dog --w 64 --h 64 --s 1 --d 2\n")
    previews = {"sample_prompts": ground / "prompts.txt", "sample_at_first": True, "sample_every_n_steps": STEPS}
    return {"dataset_config": held_out, **previews}


@dataclass(frozen=True)
class Place:
    """Where runs find their data and models."""

    models: Mapping[str, dict[str, Any]]
    data: Path

    def options(self, name: str, folder: Path, **own: Any) -> dict[str, Any]:
        example = RUNS[name]
        defaults = finetune_runs.DEFAULTS if example.full else helpers.DEFAULTS
        given = {"dataset_config": self.data, "output_dir": folder, "max_train_steps": STEPS}
        return {**defaults, **self.models[example.row], **given, **example.values, **own}

    def job(self, name: str, folder: Path, port: int, **own: Any) -> child.Job:
        values = self.options(name, folder, shard_base=True, **own)
        return child.Job(values, RUNS[name].full, port, RUNS[name].family)

    def alone(self, name: str, folder: Path, **own: Any) -> tuple[dict[str, Tensor], Recorded]:
        """The same run by one process, which makes as many batches a step; and the weights before."""
        values = {"gradient_accumulation_steps": 2, **own}
        method = "finetune" if RUNS[name].full else "network"
        trainer = make_trainer(self.options(name, folder, **values), family=RUNS[name].family, method=method)
        first: dict[str, Tensor] = {}

        def before(trainer: Recorded) -> None:
            first.update({name: value.clone() for name, value in trainer.trainables.state().items()})

        trainer.before = before
        assert trainer.run() == 0
        return first, trainer


@pytest.fixture(scope="module")
def place(models: Mapping[str, dict[str, Any]], data: Path) -> Place:
    return Place(models, data)


# A chain of one, two, three processes and one again: as many batches a step.
CHAIN = ("Adafactor", "full bf16")
THREE = ("flux", "full flux")  # also with one batch in each of three processes
SIX = {1: 6, 2: 3, 3: 2}  # processes -> --gradient_accumulation_steps


def linked(place: Place, folder: Path, name: str, processes: int, steps: int) -> dict[str, Any]:
    """Options of one link of the chain, which takes one step."""
    values = {"gradient_accumulation_steps": SIX[processes], "max_train_steps": steps, "mixed_precision": "no"}
    return {**values, "save_state": True, "resume": folder / f"{name} {steps - 1}/x-state" if steps > 1 else None}


@pytest.fixture(scope="module")
def pairs(place: Place, shown: dict[str, Any], ground: Path) -> Path:
    """A folder with what each process has at the end of each run, and with the folders of the runs."""
    folder = ground / "sharded pairs"
    folder.mkdir()
    for name in CHAIN:
        place.alone(name, folder / f"{name} 1", **linked(place, folder, name, 1, 1))
    ports = iter(child.free_ports(len(RUNS) + 1 + 2 * len(CHAIN) + len(THREE)))
    jobs = {name: place.job(name, folder / name, next(ports)) for name in RUNS}
    jobs["shown"] = place.job("flux", folder / "shown", next(ports), **shown)
    for name in CHAIN:
        jobs[f"{name} 2"] = place.job(name, folder / f"{name} 2", next(ports), **linked(place, folder, name, 2, 2))
    together(jobs, folder, 2)
    threes = {
        f"{name} 3": place.job(name, folder / f"{name} 3", next(ports), **linked(place, folder, name, 3, 3))
        for name in CHAIN
    }
    threes |= {f"{name} of 3": place.job(name, folder / f"{name} of 3", next(ports)) for name in THREE}
    (folder / "threes").mkdir()
    together(threes, folder / "threes", 3)
    return folder


def together(jobs: Mapping[str, child.Job], folder: Path, world: int) -> None:
    """Runs of several processes, one after the other."""
    processes = [child.start(child.runs_together, rank, jobs, folder, world) for rank in range(world)]
    codes = [child.exit_code(process, seconds=300) for process in processes]
    assert codes == [0] * world, (folder / "0.log").read_text(encoding="utf-8")[-3000:]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as opened:
        return load_file(path), dict(opened.metadata())


def saved(folder: Path) -> dict[str, Tensor]:
    """All tensors that a run has saved."""
    files = sorted(path for path in folder.rglob("*.safetensors") if "-state" not in str(path.parent))
    assert files
    return {f"{file.relative_to(folder)} {name}": value for file in files for name, value in load_file(file).items()}


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return float(torch.stack([torch.linalg.vector_norm(one[n].float() - other[n].float()) for n in one]).norm())


@pytest.mark.parametrize("name", RUNS)
def test_two_halves_learn_what_a_whole_does(name: str, place: Place, pairs: Path, tmp_path: Path) -> None:
    example = RUNS[name]
    first, expected = place.alone(name, tmp_path)
    losses = torch.tensor([report.loss for report in expected.reports])
    whole, kept = child.local_bytes(expected.models.denoiser), 0
    moved = distance(expected.trainables.state(), first)
    for rank in (0, 1):
        found, facts = read(pairs / f"{name} {rank}.safetensors")
        assert abs(found.pop("losses") / losses - 1).max() < max(1e-5, example.within)
        found.pop("norms")
        if not example.full and example.within:
            assert distance(found, expected.trainables.state()) < example.within * moved
        elif not example.full:
            assert differing(found, expected.trainables.state()) == []
        kept += int(facts["bytes"])
        print(f"{name}: {facts['bytes']} of {whole} bytes")
        assert int(facts["bytes"]) < (0.65 if example.full else 0.52) * whole
    assert kept == whole or example.full  # small weights that learn are in both
    files = saved(pairs / name), saved(tmp_path)
    print(f"{name}: {distance(*files)} of {moved}")
    assert distance(*files) < example.within * moved if example.within else differing(*files) == []
    others = [{path.name for path in (folder).rglob("*.json")} for folder in (pairs / name, tmp_path)]
    assert others[0] == others[1]


@pytest.mark.parametrize("name", THREE)
def test_three_parts_learn_what_a_whole_does(name: str, place: Place, pairs: Path, tmp_path: Path) -> None:
    """A third has no exact value, and a ring of three adds in any order: shares and sums take care of both."""
    first, expected = place.alone(name, tmp_path, gradient_accumulation_steps=3)
    found, _ = read(pairs / "threes" / f"{name} of 3 0.safetensors")
    losses = torch.tensor([report.loss for report in expected.reports])
    assert abs(found["losses"] / losses - 1).max() < max(1e-6, RUNS[name].within)
    files = saved(pairs / f"{name} of 3"), saved(tmp_path)
    moved = distance(expected.trainables.state(), first)
    print(f"{name}: {distance(*files)} of {moved}")
    assert distance(*files) < RUNS[name].within * moved if RUNS[name].within else differing(*files) == []


@pytest.mark.parametrize("name", ["flux", "nf4", "full flux"])
def test_the_planner_counts_what_a_process_has(name: str, place: Place, pairs: Path, tmp_path: Path) -> None:
    """The same bytes as the first of two processes; and all that is gathered is less than the rest of the model."""
    options, method = place.options(name, tmp_path, shard_base=True, plan=True), RUNS[name].full
    trainer = make_trainer(options, family=RUNS[name].family, method="finetune" if method else "network")
    planned = replace(planned_of(trainer), processes=2)
    case, alone = case_of(planned), case_of(replace(planned, processes=1))
    split, storage = case.weights.split, planned.choice.storage
    assert split is not None
    _, facts = read(pairs / f"{name} 0.safetensors")
    assert abs(split.own[storage] / int(facts["bytes"]) - 1) < (0 if storage == "plain" else 0.02) + 1e-9
    needs, whole = predict(case, planned.choice), predict(alone, planned.choice)
    assert 0 < split.gathered[storage] < alone.weights.total(storage)
    if RUNS[name].full:  # half of the moving average and of the optimizer's states, too
        assert needs.weights < 0.55 * whole.weights and needs.optimizer < 0.55 * whole.optimizer
    else:
        assert needs.weights == whole.weights - alone.weights.total(storage) + split.own[storage]
    assert {choice.blocks_to_swap for choice in candidates(planned, case)} == {0}


def test_all_validate_and_preview_and_one_writes(
    place: Place, shown: dict[str, Any], pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trainyard")
    place.alone("flux", tmp_path, **shown)
    assert differing(saved(pairs / "shown"), saved(tmp_path)) == []
    (line,) = [record.message for record in caplog.records if record.message.startswith("validation loss")]
    assert line in (pairs / "0.log").read_text(encoding="utf-8")
    own, theirs = (sorted((folder / "sample").glob("*.png")) for folder in (tmp_path, pairs / "shown"))
    assert len(own) == len(theirs) == 2 * 2 + 1  # two prompts at two times, and the sheet of both
    assert all(Image.open(a).tobytes() == Image.open(b).tobytes() for a, b in zip(own, theirs))


@pytest.mark.parametrize("name", CHAIN)
def test_a_state_goes_on_with_another_number_of_processes(name: str, place: Place, pairs: Path, tmp_path: Path) -> None:
    """One step of one process, of two, of three, and of one again: what one process learns in all of them."""
    place.alone(name, pairs / f"{name} 4", **linked(place, pairs, name, 1, 4))
    whole = {**linked(place, pairs, name, 1, 4), "resume": None}
    first, _ = place.alone(name, tmp_path, **whole)
    last, own = load_state(pairs / f"{name} 4/x-state"), load_state(tmp_path / "x-state")
    assert (last.step, last.epoch, last.batch) == (own.step, own.epoch, own.batch)
    torch.testing.assert_close(torch.tensor(last.losses), torch.tensor(own.losses), rtol=1e-5, atol=0)
    print(f"{name}: {distance(last.weights, own.weights)} of {distance(own.weights, first)}")
    assert distance(last.weights, own.weights) < 1e-4 * distance(own.weights, first)
    assert unlike(own.optimizer, last.optimizer, "") is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "swap": ({"blocks_to_swap": 1}, r"--shard_base does not work with --blocks_to_swap"),
    "offload": (
        {"cpu_offload_checkpointing": True, "gradient_checkpointing": True},
        "--shard_base does not work with --cpu_offload_checkpointing",
    ),
    "hoist": ({"hoist_modulation": True}, "--shard_base does not work with --hoist_modulation"),
    "compile": ({"compile": True}, "--shard_base does not work with --compile"),
    "AdEMAMix": ({"optimizer_type": "AdEMAMix8bit"}, "--optimizer_type AdEMAMix8bit computes something over a whole"),
    "planned swap": ({"blocks_to_swap": "auto"}, "--shard_base does not work with --blocks_to_swap"),
    "Adafactor": ({"optimizer_type": "Adafactor"}, "--optimizer_type Adafactor computes something over a whole weight"),
    "in backward": (
        {"fused_backward_pass": True, "optimizer_type": "Adafactor", "ema_decay": None},
        "--shard_base does not work with --fused_backward_pass",
    ),
    "masks": (
        {"masked_prior_weight": 1},
        "--shard_base: all processes must make the same passes, and --masked_prior_weight",
    ),
    "third party": ({"network_module": "lycoris.kohya"}, "--shard_base is for the networks of this program"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_moves_or_reads_weights_is_refused(name: str, place: Place, tmp_path: Path) -> None:
    values, line = REFUSED[name]
    method = "full flux" if name in ("AdEMAMix", "Adafactor", "in backward") else "flux"
    with pytest.raises(UserError) as caught:
        place.alone(method, tmp_path, shard_base=True, **values)
    assert any(problem.startswith(line) for problem in caught.value.problems), caught.value.problems
