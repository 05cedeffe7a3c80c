# SPDX-License-Identifier: Apache-2.0
"""Tiny but real training runs in this process: options as a user writes them, the trainer as the script builds it."""

from __future__ import annotations

import functools
import gc
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from library.cli import EXIT_STOPPED, METHODS, load_attribute
from library.data.dataset import TrainingData
from library.families.registry import FAMILIES, open_family
from library.io.state import StateParts, load_state, newest_state
from library.learning import Models, Trainables
from library.options import resolve
from library.planner.planned import Planned
from library.rng import derive_seed
from library.stopping import StopRequest
from library.trainers.checks import check
from library.trainers.guards import StepReport
from library.trainers.memory import Memory
from library.trainers.method import Method
from library.trainers.methods.finetune import LearningModels
from library.trainers.out_of_memory import Retry
from library.trainers.run import run
from library.trainers.run_plan import RunPlan
from library.trainers.saving import Saver
from library.trainers.stages import Checked, Running, Start, schedule
from library.trainers.step import Pass, Step
from library.trainers.tracking import Trackers
from library.trainers.trainer import Trainer
from library.trainers.updates import Updates
from library.trainers.validation import Validation
from library.types import Batch, Position

Adapters = dict[str, Tensor]  # keys and values of a LoRA file

CAPTIONS = (
    "cat, red, photo",
    "dog, blue, photo, star",
    "sks girl, red, star",
    "sks, blue",
    "photo, dog",
    "star, cat, red",
)

# What every run here has unless it says otherwise. No worker processes: a fork costs more than these batches.
DEFAULTS: dict[str, Any] = {
    "output_name": "x",
    "network_dim": 4,
    "network_alpha": 2,
    "learning_rate": 1e-2,
    "seed": 7,
    "max_train_steps": 4,
    "max_data_loader_n_workers": 0,
}


# ---- data -----------------------------------------------------------------------------------------------------------


def make_pictures(
    folder: Path,
    count: int = 6,
    *,
    size: tuple[int, int] = (64, 64),
    first: int = 0,
    captions: Sequence[str] = CAPTIONS,
) -> Path:
    """`count` noisy pictures (width, height) with captions in .txt files. Equal arguments give equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        # a few large squares under the noise: crops and flips of it differ
        raw = random.Random(number).randbytes(4 * 4 * 3)
        picture = Image.frombytes("RGB", (4, 4), raw).resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / f"p{number:02d}.png")
        (folder / f"p{number:02d}.txt").write_text(captions[number % len(captions)], encoding="utf-8")
    return folder


def half_masks(folder: Path, names: Sequence[str], *, white: str) -> Path:
    """Masks of 64 x 64: white on the left or right half, or all white."""
    folder.mkdir(parents=True)
    for name in names:
        mask = Image.new("RGB", (64, 64), "white" if white == "all" else "black")
        if white != "all":
            mask.paste("white", (0, 0, 32, 64) if white == "left" else (32, 0, 64, 64))
        mask.save(folder / name)
    return folder


def subset(folder: Path, **values: Any) -> dict[str, Any]:
    """One subset of a dataset configuration."""
    return {"image_dir": str(folder), "caption_extension": ".txt", **values}


def write_dataset(path: Path, *subsets: Mapping[str, Any], **values: Any) -> Path:
    """A dataset configuration of one dataset; `values` are the dataset's."""
    return write_datasets(path, {"resolution": 64, "batch_size": 2, **values, "subsets": list(subsets)})


def write_datasets(path: Path, *datasets: Mapping[str, Any]) -> Path:
    """A dataset configuration of several datasets."""
    import tomli_w

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps({"datasets": list(datasets)}), encoding="utf-8")
    return path


# ---- runs -----------------------------------------------------------------------------------------------------------


class Recorded:
    """A run as its script starts it, with what the tests look at kept, and a Ctrl-C of its own in a chosen step.

    Here alone is known where the parts of a run are.
    """

    def __init__(self, method: Method[Any], loop: type[Trainer] = Trainer, **attributes: Any) -> None:
        """loop: the class of the training loop. attributes: set on it."""
        self.method, self.loop_class, self.attributes = method, loop, attributes
        self.interrupt_in: int | None = None  # optimizer step, from 1
        self.keep_gradients = False
        self.before: Callable[[Any], None] | None = None  # looks at the run right before its first step
        self.each_step: Callable[[Any], None] | None = None  # ... and right after each optimizer step
        self.reports: list[StepReport] = []
        self.gradients: list[dict[str, Tensor]] = []  # of each optimizer step before clipping, by the keys of the file
        self.captions: list[str] = []  # of all batches
        self.loop: Any = None

    def run(self) -> int:
        """The exit code. Errors come as the exceptions that the script turns into lines."""
        return run(self.method, StopRequest(), self.start)

    def start(self, running: Running, start: Start) -> Trainer:
        """The loop, with its reports kept."""

        def report(loop: Any, reports: Sequence[StepReport], trackers: Trackers) -> None:
            self.reports += reports
            self.loop_class.report(loop, reports, trackers)

        def train_step(loop: Any, batches: Sequence[Batch]) -> None:
            self.captions += [caption for batch in batches for caption in batch.captions]
            self.loop_class.train_step(loop, batches)

        own = {"report": report, "train_step": train_step, **self.attributes}
        cls = type("Loop", (self.loop_class,), own)
        self.loop = cls(self.watched(running), start)
        if self.before is not None:
            self.before(self)
        return self.loop

    def watched(self, running: Running) -> Running:
        """The same run, of which this object sees the gradients and the ends of steps."""
        after_step = running.trainables.after_step

        def look() -> dict[str, float | Tensor]:
            found = after_step()
            if self.each_step is not None:
                self.each_step(self)
            if self.position.step + 1 == self.interrupt_in:
                signal.raise_signal(signal.SIGINT)
            return found

        trainables = replace(running.trainables, after_step=look)
        forward = replace(running.step.forward, trainables=trainables)
        step: Any = replace(running.step, forward=forward, retry=partial(self.watched_gradients, running.step.retry))
        return replace(running, trainables=trainables, step=step)

    def watched_gradients(self, retry: Retry, accumulate: Callable[[], Tensor], **words: Any) -> Tensor:
        """The gradients of a step, before they are clipped."""
        total = retry(accumulate, **words)
        if self.keep_gradients:
            own = self.learning_tensors()
            self.gradients.append({name: p.grad.clone() for name, p in own.items() if p.grad is not None})
        return total

    def learning_tensors(self) -> dict[str, nn.Parameter]:
        """Key in the file -> the weight that learns."""
        module: Any = self.trainables.module
        if isinstance(module, LearningModels):
            return module.learning_parameters()
        if isinstance(module, nn.ModuleDict):  # rows of token embeddings
            return {name: rows.weight for name, rows in module.items()}
        if self.method.learning().conditioned:
            return {name.removeprefix("layers."): p for name, p in module.named_parameters()}
        layers = module.named_layers().items()
        return {f"{name}.{part}": p for name, layer in layers for part, p in layer.named_tensors().items()}

    # ---- where things are

    @property
    def running(self) -> Running:
        return self.loop.running

    @property
    def checked(self) -> Checked:
        return self.running.loaded.scheduled.checked

    @property
    def family(self) -> Any:
        return self.method.family

    @property
    def options(self) -> Any:
        return self.method.options

    @property
    def learning(self) -> frozenset[str]:
        return self.method.learning().parts

    @property
    def device(self) -> torch.device:
        return self.checked.processes.device

    @property
    def accelerator(self) -> Accelerator:
        return self.checked.processes.accelerator

    @property
    def plan(self) -> RunPlan:
        return self.running.loaded.scheduled.plan

    @property
    def models(self) -> Models:
        return self.running.loaded.models

    @property
    def data(self) -> TrainingData:
        return self.running.loaded.data

    @property
    def objective(self) -> Any:
        """The family's, without what is around it."""
        return self.running.loaded.objective.inner  # type: ignore[attr-defined]

    @property
    def trainables(self) -> Trainables:
        return self.running.trainables

    @property
    def network(self) -> Any:
        return self.trainables.module

    @property
    def memory(self) -> Memory:
        return self.running.memory

    @property
    def updates(self) -> Updates:
        return self.running.updates

    @property
    def step(self) -> Step:
        return self.running.step

    @property
    def forward(self) -> Pass:
        return self.running.step.forward

    @property
    def validation(self) -> Validation:
        return self.running.validation

    @property
    def position(self) -> Position:
        return self.loop.position

    @property
    def saver(self) -> Saver:
        return self.loop.saver


def planned_of(trainer: Recorded) -> Planned:
    """What the planner is told of a run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return schedule(check(trainer.method, StopRequest())).planned


@dataclass(frozen=True)
class Run:
    """A finished run."""

    trainer: Recorded
    code: int
    folder: Path

    @property
    def losses(self) -> list[float]:
        return [report.loss for report in self.trainer.reports]

    @property
    def file(self) -> Path:
        return self.folder / "x.safetensors"

    @property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.file)

    @property
    def metadata(self) -> dict[str, str]:
        with safe_open(self.file, "pt") as file:
            return dict(file.metadata())

    @property
    def state(self) -> StateParts:
        return load_state(self.folder / "x-state")

    def names(self, pattern: str = "*") -> list[str]:
        return sorted(path.name for path in self.folder.glob(pattern))


def quick_previews(folder: Path) -> dict[str, Path]:
    """Options with which the previews and curves of a recipe take no time and go into this folder."""
    prompts = folder / "quick_prompts.txt"
    prompts.write_text("a photo of a cat --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    return {"sample_prompts": prompts, "logging_dir": folder / "logs"}


def argv(values: Mapping[str, Any]) -> list[str]:
    """{"max_train_steps": 4, "save_state": True, "network_args": ["a=1"]} as a command line; None, False: not given."""
    words: list[str] = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        items = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *map(str, items)]
    return words


def make_method(method: str, values: Mapping[str, Any], *, family: str) -> Method[Any]:
    """The method of a script, for these options."""
    # accelerate keeps precision and processes for the life of a process
    AcceleratorState._reset_state(reset_partial_state=True)
    path, options_type = METHODS[method]
    entry = FAMILIES[family]
    options = resolve(options_type, entry.option_groups, argv(values), prog="test").options
    return load_attribute(path)(open_family(entry, options.model), options)


def make_trainer(
    values: Mapping[str, Any], *, family: str = "sd", method: str = "network", loop: type[Trainer] = Trainer,
    **attributes: Any,
) -> Recorded:  # fmt: skip
    """The run of a script, `train_network.py` by default. loop, attributes: as `Recorded` has them."""
    return Recorded(make_method(method, values, family=family), loop, **attributes)


def train(
    model: Path | None, dataset: Path | None, folder: Path, *, interrupt_in: int | None = None,
    each_step: Callable[[Recorded], None] | None = None, keep_gradients: bool = False, family: str = "sd",
    **values: Any,
) -> Run:  # fmt: skip
    """One run; `values` stand above DEFAULTS. Errors come as the exceptions that the script turns into lines."""
    own = {"pretrained_model_name_or_path": model, "dataset_config": dataset, "output_dir": folder}
    names = {"lora_format": "kohya"}  # one family has others by default
    trainer = make_trainer({**DEFAULTS, **names, **own, **values}, family=family)
    trainer.interrupt_in, trainer.each_step, trainer.keep_gradients = interrupt_in, each_step, keep_gradients
    code = trainer.run()
    settle()
    return Run(trainer, code, folder)


@functools.cache
def settle() -> None:
    """Imported modules never become garbage: without them, the collection that every run does is ten times quicker."""
    gc.freeze()


def train_with_stops(model: Path | None, dataset: Path, folder: Path, stops: Sequence[int], **values: Any) -> Run:
    """The same run, stopped by Ctrl-C after each of the steps `stops` and resumed from the newest state."""
    state = None
    for step in stops:
        run = train(model, dataset, folder, interrupt_in=step, resume=state, **values)
        assert run.code == EXIT_STOPPED
        state = newest_state(folder, "x")
        assert state is not None and state.name == f"x-step{step:08d}-state"
    return train(model, dataset, folder, resume=state, **values)


# ---- comparisons ----------------------------------------------------------------------------------------------------


def differing(one: Any, other: Any, where: str = "") -> list[str]:
    """Paths in nested containers at which two states differ by a single bit."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        lost = [f"{where}/{key}" for key in one.keys() ^ other.keys()]
        return lost + [
            line for key in one.keys() & other.keys() for line in differing(one[key], other[key], f"{where}/{key}")
        ]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [line for i, (a, b) in enumerate(zip(one, other)) for line in differing(a, b, f"{where}/{i}")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    else:
        same = type(one) is type(other) and (one == other or (one != one and other != other))
    return [] if same else [where]


def assert_same_run(one: Run, other: Run, *, state: bool = True) -> None:
    """Final weights, and with `state` all that a further step would depend on, are equal to the last bit."""
    assert differing(one.weights, other.weights) == []
    if state:
        a, b = one.state, other.state
        for part in ("weights", "optimizer", "scheduler", "ema", "losses", "step", "epoch", "batch"):
            assert differing(getattr(a, part), getattr(b, part)) == [], part


def micro_generator(run: Run, micro_step: int) -> torch.Generator:
    """The generator of timestep and noise of one micro-batch, on rank 0."""
    return torch.Generator().manual_seed(derive_seed(run.trainer.plan.seed, "noise", micro_step, 0))


# ---- literal formulas -----------------------------------------------------------------------------------------------


def with_lora(module: nn.Module, adapters: Adapters, published: Callable[[str], str]) -> dict[str, Tensor]:
    """The module's weights, W + alpha / rank * up @ down where there is an adapter. `published`: path -> name."""
    weights = dict(module.state_dict())
    for path, _ in module.named_modules():
        if f"{(name := published(path))}.alpha" not in adapters:
            continue
        alpha, down, up = (adapters[f"{name}.{part}"] for part in ("alpha", "lora_down.weight", "lora_up.weight"))
        delta = up.flatten(1) @ down.flatten(1) * (alpha / len(down))
        weights[f"{path}.weight"] = weights[f"{path}.weight"] + delta.view_as(weights[f"{path}.weight"])
    return weights


def randomized(weights: Adapters, seed: int = 0) -> Adapters:
    """The same LoRA with all matrices far from zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        k: v if k.endswith("alpha") else 0.1 * torch.randn(v.shape, generator=generator) for k, v in weights.items()
    }
