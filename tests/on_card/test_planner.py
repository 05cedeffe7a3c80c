# SPDX-License-Identifier: Apache-2.0
"""The planner on a card: for every architecture and method its plan is that of the CPU, and a run follows it."""

from __future__ import annotations

import gc
import logging
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.cli import guarded
from library.memory.choice import MemoryChoice
from library.memory.estimate import CUDA_CONTEXT, predict
from library.memory.options import GIB, MemoryOptions
from library.optim.optimizers import choose_optimizer
from library.planner.case import case_of
from library.planner.planned import Planned
from library.trainers.stages import as_planned
from tests.families import CASES
from tests.trainers.helpers import Recorded, make_pictures, make_trainer, planned_of, settle, subset, write_dataset

pytestmark = pytest.mark.gpu

ARCHITECTURES = ("sd1", "sdxl", "flux", "chroma", "sd3", "sd35", "lumina", "anima", "sana")
WORD = "zapcat"
SHORT = {  # plans count on texts of full length
    "anima": {"qwen3_max_token_length": 32, "t5_max_token_length": 32},
    "lumina": {"gemma2_max_token_length": 32},
}
CHOICES = [MemoryChoice(activation_budget=budget) for budget in (1.0, 0.5, 0.0)]
OF_RUN: dict[str, Any] = {
    "output_name": "x", "learning_rate": 1e-3, "seed": 7, "max_train_steps": 2, "max_data_loader_n_workers": 0,
}  # fmt: skip
OF_METHOD: dict[str, dict[str, Any]] = {
    "network": {"network_dim": 4, "network_alpha": 2},
    "finetune": {
        "optimizer_type": "Adafactor", "fused_backward_pass": True, "save_model_as": "safetensors",
        "optimizer_args": ["relative_step=False", "scale_parameter=False", "warmup_init=False"],
    },
    "textual_inversion": {"token_string": WORD, "save_model_as": "safetensors"},
    "lllite": {"network_dim": 8, "cond_emb_dim": 8},
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """An architecture and a method."""

    case: str  # of CASES
    method: str = "network"
    options: dict[str, Any] = field(default_factory=dict)


JOBS = {
    **{f"{name} LoRA": Job(name, options=SHORT.get(name, {})) for name in ARCHITECTURES},
    **{f"{name} full": Job(name, "finetune", SHORT.get(name, {})) for name in ARCHITECTURES},
    **{f"{name} word": Job(name, "textual_inversion") for name in ("sd1", "sdxl")},
    "sdxl LLLite": Job("sdxl", "lllite"),
    "sd1 LyCORIS": Job(
        "sd1", options={"network_module": "lycoris.kohya", "network_args": ["algo=lora", "preset=attn-mlp"]}
    ),
}


class Ground:
    """Tiny models, each made once, and two pictures with control images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models: dict[str, dict[str, Any]] = {}
        controls = make_pictures(folder / "controls", 2, first=2)
        for picture in sorted(controls.glob("*.png")):  # as the pictures are named
            picture.rename(controls / f"p{int(picture.stem[1:]) - 2:02d}.png")
        shown = subset(make_pictures(folder / "pictures", 2, captions=[f"{WORD}, red, photo"]))
        self.plain = write_dataset(folder / "plain.toml", shown)
        self.controlled = write_dataset(folder / "controlled.toml", {**shown, "conditioning_data_dir": str(controls)})

    def trainer(self, job: Job, folder: Path, **values: Any) -> Recorded:
        """The run of the method's script; `values` stand above the job's options."""
        case = CASES[job.case]
        if job.case not in self.models:
            make = case.make_deep or case.make  # with blocks enough to swap
            self.models[job.case] = make(self.folder / job.case)
        data = self.controlled if job.method == "lllite" else self.plain
        own = {**OF_RUN, **OF_METHOD[job.method], **self.models[job.case], **case.options, **job.options,
               "dataset_config": data, "output_dir": folder, **values}  # fmt: skip
        return make_trainer(own, family=case.family, method=job.method)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("planner"))


@pytest.mark.parametrize("name", ["sd1 word", "flux LoRA", "sd3 full", "lumina LoRA"])
def test_the_plan_is_that_of_the_cpu(
    name: str, ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--plan prints its table; what its figures come from is what it is on the CPU, without the context.

    With the same attention: which kernels there are for it is what may differ.
    """
    trainer = ground.trainer(JOBS[name], tmp_path, plan=True, vram_budget="8GB")
    with sdpa_kernel(SDPBackend.MATH):
        assert trainer.run() == 0
        printed = capsys.readouterr().out
        planned = planned_of(trainer)
        assert planned.device == torch.device("cuda:0")
        memory = replace(planned.memory, plan=False)
        cards = [of_device(trainer, memory, device) for device in (planned.device, torch.device("cpu"))]
        on_card, on_cpu = map(case_of, cards)
    assert printed.startswith("predicted peak") and "--vram_budget 8.00 GB: chosen: " in printed
    for choice in CHOICES:
        found, expected = predict(on_card, choice), predict(on_cpu, choice)
        assert abs(found.peak - CUDA_CONTEXT - expected.peak) < 1 << 15, choice
    assert on_card.weights == on_cpu.weights
    assert on_card.fixed == replace(on_cpu.fixed, context=CUDA_CONTEXT)
    assert on_card.has_host and not on_cpu.has_host


def of_device(trainer: Recorded, memory: MemoryOptions, device: torch.device) -> Planned:
    """The run as the planner sees it, on a device."""
    method = trainer.method
    batch = planned_of(trainer).batch
    optimizer = choose_optimizer(method.options.optimizer)
    return replace(as_planned(method, method.learning(), optimizer, batch, device=device), memory=memory)


MORE_THAN_ANY_CARD = "100000GB"
WAYS: tuple[dict[str, Any], ...] = (
    {"vram_budget": "8GB"}, {"blocks_to_swap": "auto", "activation_budget": "auto"}, {"vram_budget": MORE_THAN_ANY_CARD}
)  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_runs_take_what_was_planned(
    name: str, ground: Ground, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a budget, in the memory that is free, or in that because the budget is larger; the peak is the predicted one.

    And what was learned is finite: of every architecture and method.
    """
    way = WAYS[list(JOBS).index(name) % len(WAYS)]
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # of earlier runs in this process
    trainer = ground.trainer(JOBS[name], tmp_path, **way)
    with caplog.at_level(logging.INFO):
        assert trainer.run() == 0
    settle()
    assert trainer.device.type == "cuda" and trainer.position.step == 2
    learned = load_file(tmp_path / "x.safetensors")
    assert learned and all(bool(tensor.float().isfinite().all()) for tensor in learned.values())
    warned = any(f"--vram_budget {MORE_THAN_ANY_CARD[:-2]}.00 GB: only " in line for line in caplog.messages)
    assert warned == (way.get("vram_budget") == MORE_THAN_ANY_CARD)
    predicted, measured = figures(caplog.messages)
    print(name, predicted, measured, before / GIB)
    assert measured - before / GIB == pytest.approx(predicted, abs=0.03)


def test_nothing_fits(ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says what the smallest way takes, before a weight is read."""
    trainer = ground.trainer(JOBS["flux LoRA"], tmp_path, vram_budget="0.5GB")
    assert guarded(trainer.run) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: --vram_budget: nothing fits in 0.50 GB; the smallest that was found takes ")


def figures(messages: list[str]) -> tuple[float, float]:
    """GB that were predicted, and measured after the second step, as the run's messages say."""
    pattern = r"memory: .*: [\d.]+ GB predicted of [\d.]+ GB, [\d.]+ GB to spare"
    chosen = [line for line in messages if re.fullmatch(pattern, line)]
    (taken,) = [line for line in messages if "measured" in line]
    found = re.fullmatch(r"memory: ([\d.]+) GB predicted, ([\d.]+) GB measured: activations x -?[\d.]+", taken)
    assert len(chosen) == 1 and found is not None
    return float(found[1]), float(found[2])
