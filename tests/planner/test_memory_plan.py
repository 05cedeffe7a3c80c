# SPDX-License-Identifier: Apache-2.0
"""The planner against real steps: its prediction, from headers alone, beside what a meter saw of the trainer's step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from library.errors import UserError
from library.memory.choice import MemoryChoice
from library.memory.estimate import predict
from library.memory.meter import Meter
from library.memory.options import GIB
from library.planner.case import case_of
from library.planner.memory_plan import MemoryPlan, Option, plan_memory
from library.trainers.trainer import Trainer
from library.types import Batch
from tests.families import CASES
from tests.trainers.helpers import (
    DEFAULTS,
    Recorded,
    make_pictures,
    make_trainer,
    planned_of,
    subset,
    write_dataset,
)

NOT_IN_FULL = ("network_dim", "network_alpha")
WORDS = ", ".join(["cat, red, photo, star, dog, blue"] * 20)  # longer than any limit: nothing is padded


class Measured(Trainer):
    """A loop that measures its second step, when the optimizer has its states."""

    measured = 0

    def train_step(self, batches: list[Batch]) -> None:  # type: ignore[override]
        meter = Meter()
        meter.hold(self.there(batches))
        with meter:
            super().train_step(batches)
        self.measured = meter.peak

    def there(self, batches: list[Batch]) -> Iterator[Tensor]:
        """Everything that is in memory before the step."""
        trainables, optimizer = self.running.trainables, self.running.updates.optimizer
        for module in (*self.loaded.models.all(), trainables.module):
            yield from module.parameters()
            yield from module.buffers()
        yield from (p.grad for p in trainables.parameters() if p.grad is not None)
        states = (value for state in optimizer.state.values() for value in state.values())
        yield from (value for value in states if isinstance(value, Tensor))
        for batch in batches:
            yield from (leaf for leaf in tree_leaves(vars(batch)) if isinstance(leaf, Tensor))


@dataclass(frozen=True)
class Job:
    family: str  # of CASES
    options: dict[str, Any] = field(default_factory=dict)
    full: bool = False
    size: int = 128


JOBS = {
    "SD 1 LoRA": Job("sd1"),
    "SDXL LoRA, recomputed": Job("sdxl", {"gradient_checkpointing": True, "network_train_unet_only": True}),
    "FLUX.1 LoRA in bf16": Job("flux", {"mixed_precision": "bf16"}),
    "FLUX.1 LoRA, budget 0.5": Job("flux", {"activation_budget": 0.5}),
    "FLUX.1 LoRA, fp8, recomputed": Job("flux", {"fp8_base_unet": True, "gradient_checkpointing": True}),
    "SD 3.5 full": Job("sd35", full=True),
    "FLUX.2 LoRA": Job("flux2"),
    "Lumina LoRA": Job("lumina", {"gemma2_max_token_length": 32}),
    "Anima LoRA": Job("anima", {"qwen3_max_token_length": 32, "t5_max_token_length": 32}),
    "SANA LoRA": Job("sana", {"gemma2_max_token_length": 32}, size=512),
    # a quotation that leaves no room for padding
    "HunyuanImage LoRA": Job(
        "hunyuan_image", {"text_encoder_max_token_length": 32, "caption_prefix": f'"{"star " * 30}"'}
    ),
}


def make_job(job: Job, folder: Path, **more: Any) -> Recorded:
    """The trainer, on two pictures in one batch."""
    pictures = make_pictures(folder / "pictures", 2, size=(job.size, job.size), captions=[WORDS])
    data = write_dataset(folder / "data.toml", subset(pictures), resolution=job.size)
    case = CASES[job.family]
    values = {**DEFAULTS, "dataset_config": data, "output_dir": folder / "out", "cache_latents": True,
              "max_train_steps": 2, **case.make(folder / "model"), **case.options, **job.options, **more}  # fmt: skip
    if job.full:
        values = {name: value for name, value in values.items() if name not in NOT_IN_FULL}
    return make_trainer(values, family=case.family, method="finetune" if job.full else "network", loop=Measured)


@pytest.mark.parametrize("name", JOBS)
def test_the_predicted_peak_is_the_measured_one(name: str, tmp_path: Path) -> None:
    trainer = make_job(JOBS[name], tmp_path)
    assert trainer.run() == 0
    planned = trainer.running.loaded.scheduled.planned
    predicted = predict(case_of(planned), planned.choice).peak
    assert predicted == pytest.approx(trainer.loop.measured, rel=0.05)


# ---- choosing -------------------------------------------------------------------------------------------------------


LORA = Job("sd35", {"mixed_precision": "bf16"})
CACHED = {"cache_text_encoder_outputs": True, "network_train_unet_only": True}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorded, MemoryPlan]:
    """The plan of an SD 3.5 LoRA run as for a card: main memory is another memory."""
    trainer = make_job(LORA, tmp_path_factory.mktemp("plan"), plan=True, **CACHED)
    assert trainer.run() == 0
    return trainer, plan_memory(planned_of(trainer))


def of_plan(plan: MemoryPlan, **choice: Any) -> Option:
    """The way that differs from a run without options in `choice` only."""
    wanted = replace(MemoryChoice(), **choice)
    return next(option for option in plan.options if option.choice == wanted)


def test_each_way_of_saving_saves(planned: tuple[Recorded, MemoryPlan]) -> None:
    _, plan = planned
    nothing = of_plan(plan)
    for way in ({"activation_budget": 0.0}, {"storage": "fp8"}, {"hoist": True}):
        option = of_plan(plan, **way)
        assert option.needs.peak < nothing.needs.peak, way
        assert option.seconds >= nothing.seconds, way
    swapped = of_plan(plan, blocks_to_swap=1).needs  # a ring of one slot is as large as the one block that it serves
    assert swapped.ring == nothing.needs.weights - swapped.weights > 0


def test_the_fastest_that_fits_is_chosen(planned: tuple[Recorded, MemoryPlan]) -> None:
    _, plan = planned
    limits = sorted(option.needs.peak for option in plan.options)
    for limit in (limits[0], limits[len(limits) // 2], limits[-1]):
        chosen = plan.choose(limit)
        option = next(option for option in plan.options if option.choice == chosen)
        fitting = [o for o in plan.options if o.needs.peak <= limit and o.choice.storage == chosen.storage]
        assert option in fitting and option.seconds == min(o.seconds for o in fitting)
    assert plan.choose(1 << 50) == MemoryChoice()


@pytest.mark.parametrize(("slower", "chosen"), [(1.2, "plain"), (1.45, "plain"), (1.6, "fp8")])
def test_fewer_bits_only_where_that_saves_much_time(
    planned: tuple[Recorded, MemoryPlan], slower: float, chosen: str
) -> None:
    plan = planned[1]
    plain, small = of_plan(plan, activation_budget=0.0), of_plan(plan, storage="fp8")
    both = replace(plan, options=(replace(plain, seconds=slower), replace(small, seconds=1.0)))
    assert both.choose(1 << 50).storage == chosen
    least = min(both.options, key=lambda option: option.needs.peak)
    assert both.choose(least.needs.peak) == least.choice
    assert (f"chosen: {small.flags}" in replace(both, given=replace(plan.given, vram_budget=1 << 50)).table()) == (
        chosen == "fp8"
    )


def test_nothing_fits_is_one_line(planned: tuple[Recorded, MemoryPlan]) -> None:
    _, plan = planned
    smallest = min(option.needs.peak for option in plan.options)
    with pytest.raises(UserError) as caught:
        plan.choose(smallest - 1)
    (line,) = caught.value.problems
    assert "nothing fits" in line and f"{smallest / GIB:.2f} GB" in line and "--resolution" in line


def test_what_was_given_stays(planned: tuple[Recorded, MemoryPlan], tmp_path: Path) -> None:
    given = {"activation_budget": 0.25, "blocks_to_swap": 1, "base_quant": "int8", "vram_budget": "2GB"}
    trainer = make_job(LORA, tmp_path, plan=True, **CACHED, **given)
    assert trainer.run() == 0
    options = plan_memory(planned_of(trainer)).options
    for option in options:
        choice = option.choice
        assert (choice.activation_budget, choice.blocks_to_swap, choice.storage) == (0.25, 1, "int8")
    assert {option.choice.hoist for option in options} == {False, True}


def test_the_table_names_options(planned: tuple[Recorded, MemoryPlan]) -> None:
    _, plan = planned
    lines = plan.table().splitlines()
    assert lines[1].split() == [
        "options",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "ring",
        "work",
        "peak",
        "time",
    ]
    assert len(lines) == 2 + min(len(plan.best), 14)
    assert lines[2].startswith("(nothing)") and lines[2].endswith("1.00")
    assert "--gradient_checkpointing" in plan.table()


# ---- nothing is read ------------------------------------------------------------------------------------------------


def test_plan_reads_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files hold a header and a hole; pictures are not read either."""
    trainer = make_job(LORA, tmp_path, plan=True, **CACHED)
    for file in (tmp_path / "model").rglob("*.safetensors"):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        file.write_bytes(content[:start] + b"\xff" * (len(content) - start))
    assert trainer.run() == 0
    assert "predicted peak" in capsys.readouterr().out
    assert trainer.loop is None


def test_numbers_of_fake_weights_are_those_of_real_ones(tmp_path: Path) -> None:
    trainer = make_job(JOBS["SD 1 LoRA"], tmp_path)
    family = trainer.family
    for part in ("denoiser", "vae", *family.encoders):
        real, fake = family.part(part).load(torch.bfloat16, "cpu"), family.part(part).empty(torch.bfloat16)
        assert shapes(real) == shapes(fake)
        assert all(parameter.is_meta for parameter in fake.parameters())


def shapes(module: nn.Module) -> dict[str, Any]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
