# SPDX-License-Identifier: Apache-2.0
"""Resuming: which state a run continues from, and whether that state belongs to this run."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.data.records import Sample
from library.data.scan import Scan
from library.data.shards.samples import ShardSamples
from library.data.timetable import as_text
from library.errors import UserError
from library.io.checkpoint import last_name
from library.io.hub import download_state
from library.io.options import AUTO, LATEST
from library.io.state import StateParts, compare, load_state, newest_state
from library.log import get_logger
from library.optim.optimizers import OptimizerChoice
from library.optim.schedulers import rates_of
from library.options import changed_values
from library.trainers.options import TrainerOptions
from library.trainers.run_plan import RunPlan

# Options that must not change on resume: the state depends on them.
RESUMED_OPTIONS = (
    "optimizer_type", "optimizer_args", "learning_rate", "lr_scheduler", "lr_scheduler_type", "lr_scheduler_args",
    "lr_warmup_steps", "full_fp16", "full_bf16", "ema_decay", "network_module",
    "network_dim", "network_alpha", "network_args", "network_weights", "dim_from_weights", "network_train_unet_only",
    "network_train_text_encoder_only", "unet_lr", "text_encoder_lr", "bf16_update", "train_text_encoder", "train_t5xxl",
    "learning_rate_te", "learning_rate_te1", "learning_rate_te2", "learning_rate_te3", "num_last_block_to_freeze",
    "stop_text_encoder_training", "block_lr",
    "token_string", "num_vectors_per_token", "init_word", "weights", "cond_emb_dim",
)  # fmt: skip

# The numbers of micro-batches over all processes, which must not change either
STAGES = "stages of resolution_schedule (first step, first epoch, batches per epoch)"
BATCHES_PER_STEP, BATCHES_PER_EPOCH = "--gradient_accumulation_steps x processes", "batches per epoch"

# Options that only affect the rest of the learning-rate schedule: a separate part of the fingerprint
SCHEDULE = "schedule"
SCHEDULE_OPTIONS = (
    "lr_decay_steps", "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_timescale",
    "lr_scheduler_min_lr_ratio",
)  # fmt: skip

log = get_logger()


class Resumption:
    """The state that a run continues from, if any. It is held only until it is restored."""

    def __init__(self, folder: Path | None) -> None:
        """Reads the state. Raises UserError if it is incomplete or damaged."""
        self.folder = folder
        self.parts: StateParts | None = as_of_now(load_state(folder)) if folder else None

    def taken(self) -> StateParts | None:
        """Return the state and release it."""
        parts, self.parts = self.parts, None
        return parts


@dataclass(frozen=True)
class RunIdentity:
    """The properties that identify the states of a run."""

    options: TrainerOptions
    optimizer: OptimizerChoice
    found: Scan
    seed: int
    plan: RunPlan

    def check(self, resumption: Resumption) -> None:
        """Raises UserError naming what differs if the state belongs to another run."""
        state = resumption.parts
        if state is None:
            return
        known = {name: value for name, value in state.fingerprint.items() if name != SCHEDULE}
        lines = compare(known, self.facts())
        if lines:
            raise UserError(
                f"--resume: {resumption.folder} is a state of another run: {'; '.join(lines)}. "
                "Give the same settings, or start anew from the file beside it"
            )
        if not self.is_finished(resumption):
            self.plan.require_steps_after(state.step)

    def is_finished(self, resumption: Resumption) -> bool:
        """Whether --resume auto has found a run with nothing left to do."""
        state = resumption.parts
        return self.options.state.resume == AUTO and state is not None and state.step >= self.plan.total_steps

    def fingerprint(self) -> dict[str, object]:
        """Everything that a state records about its run."""
        return {**self.facts(), SCHEDULE: self.schedule()}

    def schedule(self) -> dict[str, object]:
        """Inputs of the learning-rate schedule that may change on resume."""
        scheduler = vars(self.options.scheduler)
        return {"steps": self.plan.total_steps, **{f"--{name}": scheduler[name] for name in SCHEDULE_OPTIONS}}

    def changed_schedule(self, state: StateParts) -> list[str]:
        """Changes since the state was saved that alter the schedule of the remaining steps, one line each."""
        now, before = self.schedule(), state.fingerprint.get(SCHEDULE)
        if before is None or before == now:
            return []  # None: a state from before this was noted
        options = replace(self.options.scheduler, **{n: before[f"--{n}"] for n in SCHEDULE_OPTIONS})
        total = self.plan.total_steps
        steps = range(state.step, max(total, before["steps"]))
        curves = (rates_of(options, self.optimizer, before["steps"], steps),
                  rates_of(self.options.scheduler, self.optimizer, total, steps))  # fmt: skip
        return compare(before, now) if curves[0] != curves[1] else []

    def facts(self) -> dict[str, object]:
        """Properties that must not change on resume."""
        values = {f"--{n}": v for n, v in changed_values(self.options, all_values=True).items() if n in RESUMED_OPTIONS}
        values["--optimizer_type"] = self.options.optimizer.name  # there are several ways to ask for one
        plan: dict[str, object] = {
            BATCHES_PER_STEP: self.plan.batches_per_step,
            BATCHES_PER_EPOCH: self.plan.batches_per_epoch,
        }
        stages = self.plan.stages
        if len(stages) > 1:  # they decide what a position means
            plan[STAGES] = ", ".join(f"{s.first_step}/{s.first_epoch}/{s.batches_per_epoch}" for s in stages)
        return {**values, "seed": self.seed, **plan, "dataset": self.dataset_digests()}

    def dataset_digests(self) -> dict[str, dict[str, str]]:
        """Per subset its folder, and digests of its pictures, captions and settings."""
        result: dict[str, dict[str, str]] = {}
        pairs = ((dataset.config, subset) for dataset in self.found.datasets for subset in dataset.subsets)
        for index, (dataset, subset) in enumerate(pairs, start=1):
            sizes = (dataset.buckets, dataset.batch_size, dataset.network_multiplier, dataset.validation_split)
            rules = (subset.config.num_repeats, subset.config.captions, subset.config.images, sizes)
            pictures, captions = content_digests(subset.samples)
            result[f"subset {index}"] = {
                "folder": Path(subset.config.name).name,
                "pictures": f"{len(subset.samples)} ({pictures})",
                "captions": captions,
                "settings": _digest(rules),
            }
            if dataset.validation_split:  # a separate entry, so that states of runs without it stay valid
                chosen = "the run's seed" if dataset.validation_seed is None else f"seed {dataset.validation_seed}"
                result[f"subset {index}"]["held out"] = f"{dataset.validation_split} by {chosen}"
            if dataset.timetable:
                result[f"subset {index}"]["resolution_schedule"] = as_text(dataset.timetable)
            if isinstance(subset.samples, ShardSamples):
                continue  # the references are among the pictures
            references = [(Path(r.path).name, r.file_size) for sample in subset.samples for r in sample.references]
            if references:
                result[f"subset {index}"]["references"] = f"{len(references)} ({_digest(references)})"
        return result


def content_digests(samples: Sequence[Sample]) -> tuple[str, str]:
    """Digests of the pictures and of the captions of a subset. For shards they come from the indexes."""
    if isinstance(samples, ShardSamples):
        return samples.digests()
    pictures = [(Path(sample.path).name, sample.file_size) for sample in samples]
    return _digest(pictures), _digest([sample.caption for sample in samples])


def as_of_now(state: StateParts) -> StateParts:
    """Convert a state to the current form, which counts batches over all processes; older ones counted per process."""
    facts = dict(state.fingerprint)
    if "processes" not in facts:
        return state
    processes = facts.pop("processes")
    facts[BATCHES_PER_STEP] = processes * facts.pop("--gradient_accumulation_steps", 1)
    facts[BATCHES_PER_EPOCH] *= processes
    return replace(state, fingerprint=facts, batch=state.batch * processes)


def _digest(value: object) -> str:
    """A short hash of a value's repr."""
    return hashlib.blake2b(repr(value).encode(), digest_size=4).hexdigest()


def run_seed(options: TrainerOptions, state: dict[str, Any] | None) -> int:
    """--seed, else the seed of the resumed state, else a new one."""
    if options.train.seed is not None:
        return options.train.seed
    if state is not None:
        return int(state["fingerprint"]["seed"])
    return secrets.randbelow(2**32)


def resume_folder(options: TrainerOptions) -> Path | None:
    """The folder of --resume, fetched from the hub if asked for."""
    if not options.state.resume:
        return None
    if (asked := options.state.resume) in (LATEST, AUTO):
        save = options.save
        newest = newest_state(save.output_dir or ".", save.output_name)
        if newest is None and asked == LATEST:
            raise UserError(
                f"--resume {LATEST}: {save.output_dir} holds no state of {last_name(save.output_name)}; "
                f"--resume {AUTO} starts then"
            )
        log.info(f"--resume {asked}: {newest or 'there is no state yet, the run starts'}")
        return newest
    if options.hub.resume_from_huggingface:
        return download_state(options.state.resume, options.hub.huggingface_token)
    return Path(options.state.resume)
