# SPDX-License-Identifier: Apache-2.0
"""One run of the real trainer, as its script builds it from a user's options; only its clock and its weights differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.common import make_pictures
from benchmarks.gpu.jobs import RANK, Way
from benchmarks.gpu.models import ARCHITECTURES, with_random_weights, write_model
from benchmarks.gpu.timing import Clock, Figures
from library.cli import METHODS, load_attribute
from library.errors import UserError
from library.families.recipes import BenchmarkJob
from library.families.registry import FAMILIES, open_family
from library.options import resolve
from library.stopping import StopRequest
from library.trainers.run import run as run_method
from library.trainers.stages import Running, Start
from library.trainers.trainer import Trainer
from library.types import Batch
from tests.tiny import WORDS

TINY_SIZE = 64
CAPTION_WORDS = 120  # two tokens each: they fill nearly what Gemma 2 reads; CLIP cuts, T5 pads
COMMON = (
    "--caption_extension", ".txt", "--learning_rate", "1e-4", "--optimizer_type", "AdamW", "--seed", "1",
    "--max_data_loader_n_workers", "0", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk",
    "--console_log_level", "WARNING", "--output_name", "x", "--mixed_precision", "bf16",
)  # fmt: skip
METHOD_WORDS = {
    "network": ("--network_dim", str(RANK), "--network_alpha", str(RANK), "--network_train_unet_only"),
    "finetune": ("--full_bf16",),
}


def prepare(job: BenchmarkJob, folder: Path, *, tiny: bool) -> None:
    """Model, pictures and captions of a job, for all its rows."""
    write_model(ARCHITECTURES[job.architecture], folder / "model", tiny=tiny)
    thing = folder / "pictures" / "1_thing"
    thing.mkdir(parents=True, exist_ok=True)
    words = " ".join(WORDS[index % len(WORDS)] for index in range(CAPTION_WORDS))
    make_pictures(thing, 4 * job.batch, TINY_SIZE if tiny else job.size, caption="{} " + words)


def run(job: BenchmarkJob, way: Way, folder: Path, clock: Clock, *, tiny: bool) -> Figures:
    """Train as many steps as the clock wants. Raises what the trainer raises."""
    entry = FAMILIES[ARCHITECTURES[job.architecture].family]
    words = command_line(job, way, folder, clock.total, tiny=tiny)
    path, options_type = METHODS[job.method]
    options = resolve(options_type, entry.option_groups, words, prog="benchmark").options
    family = with_random_weights(open_family(entry, options.model), ARCHITECTURES[job.architecture])
    method = load_attribute(path)(family, options)
    loops: list[Timed] = []

    def timed(running: Running, start: Start) -> Timed:
        loops.append(Timed(running, start, clock))
        return loops[0]

    run_method(method, StopRequest(), timed)
    trained = sum(p.numel() for p in loops[0].running.trainables.parameters())
    return clock.figures(trained=trained, stall=loops[0].stall)


def command_line(job: BenchmarkJob, way: Way, folder: Path, steps: int, *, tiny: bool) -> list[str]:
    """The options of a row."""
    words = [
        "--pretrained_model_name_or_path", str(folder / "model"), "--train_data_dir", str(folder / "pictures"),
        "--output_dir", str(folder / "output"), "--cache_dir", str(folder / "cache"),
        "--resolution", str(TINY_SIZE if tiny else job.size), "--train_batch_size", str(job.batch),
        "--max_train_steps", str(steps), *COMMON, *METHOD_WORDS[job.method], *way.words,
    ]  # fmt: skip
    if "--compile" in way.words:
        kept = "compiled" + "".join(way.words).replace("--", "_")  # equal options find what they compiled before
        words += ["--compile_cache_dir", str(folder / kept)]
        words += ["--dynamo_backend", "aot_eager"] if tiny else []
    if way.swapped is not None:
        words += ["--blocks_to_swap", str(blocks_to_swap(job, way.swapped, tiny=tiny))]
    return words


def blocks_to_swap(job: BenchmarkJob, share: float, *, tiny: bool) -> int:
    """That share of the most that --blocks_to_swap takes of this model, at least one."""
    architecture = ARCHITECTURES[job.architecture]
    entry = FAMILIES[architecture.family]
    family, denoiser = open_family(entry, entry.option_groups["model"]()), architecture.empty(tiny=tiny)
    most = len(family.blocks(denoiser))
    while most > 1 and not swappable(family, denoiser, most):
        most -= 1
    return max(1, round(share * most))


def swappable(family: Any, denoiser: nn.Module, count: int) -> bool:
    try:
        family.swapped(denoiser, count)
    except UserError:
        return False
    return True


class Timed(Trainer):
    """A loop whose steps are timed and whose results are thrown away."""

    def __init__(self, running: Running, start: Start, clock: Clock) -> None:
        trainables = replace(running.trainables, write=lambda path, metadata, position: None)  # nothing is kept
        super().__init__(replace(running, trainables=trainables), start)
        running.step.retry.allowed = False  # a row that goes on with less is not that row any more
        self.clock = clock
        self.stall: float | None = None  # seconds of a timed step

    def train_step(self, batches: Sequence[Batch]) -> None:
        swap, clock = self.running.memory.swap, self.clock
        if swap is not None and clock.count == clock.warmup:
            swap.measure()
        if swap is not None and clock.count == clock.warmup + clock.timed:
            self.stall = swap.stalled() / clock.timed
        with clock.step():
            super().train_step(batches)
