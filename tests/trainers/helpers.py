# SPDX-License-Identifier: Apache-2.0
"""Tiny but real training runs in this process: options as a user writes them, the trainer as the script builds it."""

from __future__ import annotations

import functools
import gc
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from library.cli import EXIT_STOPPED
from library.families.registry import FAMILIES, open_family
from library.io.state import StateParts, load_state, newest_state
from library.options import resolve
from library.rng import derive_seed
from library.trainers.guards import StepReport
from library.trainers.network import NetworkTrainer
from library.trainers.options import NetworkTrainerOptions
from library.trainers.tracking import Trackers
from library.types import Batch

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


def subset(folder: Path, **values: Any) -> dict[str, Any]:
    """One subset of a dataset configuration."""
    return {"image_dir": str(folder), "caption_extension": ".txt", **values}


def write_dataset(path: Path, *subsets: Mapping[str, Any], **values: Any) -> Path:
    """A dataset configuration of one dataset; `values` are the dataset's."""
    return write_datasets(path, {"resolution": 64, "batch_size": 2, **values, "subsets": list(subsets)})


def write_datasets(path: Path, *datasets: Mapping[str, Any]) -> Path:
    """A dataset configuration of several datasets."""
    import toml

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(toml.dumps({"datasets": list(datasets)}), encoding="utf-8")
    return path


# ---- runs -----------------------------------------------------------------------------------------------------------


class Recorded(NetworkTrainer):
    """The trainer of the script, with its step reports kept, and a Ctrl-C of its own in a chosen step."""

    interrupt_in: int | None = None  # optimizer step, from 1
    keep_gradients = False
    each_step: Callable[[Recorded], None] | None = None  # looks at the trainer right after each optimizer step

    def run(self) -> int:
        self.reports: list[StepReport] = []
        self.gradients: list[dict[str, Tensor]] = []  # of each optimizer step before clipping, by the keys of the file
        return super().run()

    def gradients_of(self, batches: Sequence[Batch], first_micro_step: int) -> Tensor:
        total = super().gradients_of(batches, first_micro_step)
        if self.keep_gradients:
            layers = self.network.named_layers().items()  # type: ignore[attr-defined]
            own = {f"{name}.{part}": p for name, layer in layers for part, p in layer.named_tensors().items()}
            self.gradients.append({key: p.grad.clone() for key, p in own.items() if p.grad is not None})
        return total

    def report(self, reports: Sequence[StepReport], trackers: Trackers) -> None:
        self.reports += reports
        super().report(reports, trackers)

    def after_step(self) -> dict[str, float | Tensor]:
        found = super().after_step()
        if self.each_step is not None:
            self.each_step(self)
        if self.position.step + 1 == self.interrupt_in:
            signal.raise_signal(signal.SIGINT)
        return found


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


def make_trainer(values: Mapping[str, Any], *, family: str = "sd", cls: type[Recorded] = Recorded) -> Recorded:
    """The trainer of `train_network.py` for these options."""
    # accelerate keeps precision and processes for the life of a process
    AcceleratorState._reset_state(reset_partial_state=True)
    entry = FAMILIES[family]
    options = resolve(NetworkTrainerOptions, entry.option_groups, argv(values), prog="test").options
    return cls(open_family(entry, options.model), options)


def train(
    model: Path | None, dataset: Path | None, folder: Path, *, interrupt_in: int | None = None,
    each_step: Callable[[Recorded], None] | None = None, keep_gradients: bool = False, family: str = "sd",
    **values: Any,
) -> Run:  # fmt: skip
    """One run; `values` stand above DEFAULTS. Errors come as the exceptions that the script turns into lines."""
    own = {"pretrained_model_name_or_path": model, "dataset_config": dataset, "output_dir": folder}
    trainer = make_trainer({**DEFAULTS, **own, **values}, family=family)
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
