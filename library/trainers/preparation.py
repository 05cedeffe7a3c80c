# SPDX-License-Identifier: Apache-2.0
"""Everything that can be read and checked before a model is loaded. All mistakes are reported at once."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from library.data.config import load_dataset_config
from library.data.dataset import TrainingData
from library.data.lint import (
    bucket_warnings,
    choices_never_trained,
    folder_lines,
    idle_bucket_options,
    longer_than_limit,
    smaller_than_bucket,
    split_warnings,
)
from library.data.lint import check as lint
from library.data.masks import check_masks
from library.data.options import CacheOptions
from library.data.plan import EpochPlan
from library.data.records import DatasetConfig, Sample
from library.data.scan import Scan, scan
from library.errors import UserError, first_names
from library.families.family import ModelFamily
from library.io.checkpoint import check_output, last_name, state_name
from library.io.hub import download_state
from library.io.options import AUTO, LATEST
from library.io.state import StateParts, compare, load_state, newest_state, read_facts
from library.log import get_logger
from library.optim.optimizers import OptimizerChoice, choose_optimizer
from library.optim.options import OptimizerOptions
from library.optim.schedulers import check_scheduler, rates_of
from library.options import changed_values
from library.sampling.options import SampleOptions
from library.sampling.prompts import Prompt, load_prompts
from library.trainers.options import TrainerOptions
from library.trainers.run_plan import RunPlan
from library.trainers.settings import trained_dtype
from library.trainers.tracking import check_trackers

T = TypeVar("T")
UNKNOWN_LENGTH = 10**9  # steps; longer than any run

# Options that must be the same when a state is continued: the state carries what they decide.
RESUMED_OPTIONS = (
    "optimizer_type", "optimizer_args", "learning_rate", "lr_scheduler", "lr_scheduler_type", "lr_scheduler_args",
    "lr_warmup_steps", "gradient_accumulation_steps", "full_fp16", "full_bf16", "ema_decay", "network_module",
    "network_dim", "network_alpha", "network_args", "network_weights", "dim_from_weights", "network_train_unet_only",
    "network_train_text_encoder_only", "unet_lr", "text_encoder_lr", "bf16_update", "train_text_encoder", "train_t5xxl",
    "learning_rate_te", "learning_rate_te1", "learning_rate_te2", "learning_rate_te3", "num_last_block_to_freeze",
    "stop_text_encoder_training", "block_lr",
    "token_string", "num_vectors_per_token", "init_word", "weights", "cond_emb_dim",
)  # fmt: skip

# Options that only the rest of the learning-rate schedule depends on, in a part of the fingerprint of their own
SCHEDULE = "schedule"
SCHEDULE_OPTIONS = (
    "lr_decay_steps", "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_timescale",
    "lr_scheduler_min_lr_ratio",
)  # fmt: skip

log = get_logger()


class Checks:
    """Runs checks one after the other and keeps what each found wrong."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def run(self, action: Callable[[], T]) -> T | None:
        """The result of `action`, or None when it raised a UserError."""
        try:
            return action()
        except UserError as error:
            self.problems += error.problems
            return None

    def finish(self) -> None:
        """Raises UserError with every problem."""
        if self.problems:
            raise UserError(dict.fromkeys(self.problems))  # two checks may find the same


@dataclass
class Preparation:
    """What a run knows before its models are loaded."""

    options: TrainerOptions
    seed: int
    found: Scan
    data: TrainingData
    prompts: tuple[Prompt, ...]
    optimizer: OptimizerChoice
    resume_from: StateParts | None = None
    validation_plans: EpochPlan | list[Any] = field(default_factory=list)
    resume_path: Path | None = None

    @classmethod
    def of(
        cls, family: ModelFamily, options: TrainerOptions, more_checks: list[Callable[[], None]],
        with_captions: Callable[[Scan], Scan], conditioned: Callable[[], bool] = lambda: False,
        *, extension: str = ".safetensors", agreed: Callable[[int, Scan], int] = lambda seed, found: seed,
    ) -> Preparation:  # fmt: skip
        """Read everything. Raises UserError with all mistakes at once; warnings are logged.

        conditioned: whether each picture must have a control image. extension: of the saves, empty for folders.
        agreed: the seed of all processes, given this one's; called where nothing was wrong until then.
        """
        checks = Checks()
        checks.run(family.check)
        checks.run(family.check_weights)
        for check in more_checks:
            checks.run(check)
        checks.run(lambda: check_output_folder(options, extension))
        resume = checks.run(lambda: resume_folder(options))
        facts = checks.run(lambda: read_facts(resume)) if resume else None
        prompts = checks.run(lambda: preview_prompts(options.sample))
        checks.run(lambda: check_trackers(options.logging))
        optimizer = checks.run(lambda: choose_optimizer(options.optimizer))
        checks.run(lambda: check_weights(options, optimizer))
        checks.run(lambda: check_schedule(options, optimizer))
        control = checks.run(conditioned) or False
        found = checks.run(lambda: scan_datasets(family, options, with_captions, control=control))
        seed = run_seed(options, facts)
        if found is not None and not checks.problems:
            seed = agreed(seed, found)  # before the pictures are shuffled and held out by it
        data = checks.run(lambda: training_data(found, options, seed)) if found else None
        dark = checks.run(lambda: check_masks(data.trained(), masked_loss=data.masked_loss)) if data else None
        checks.finish()
        assert found is not None and data is not None and optimizer is not None and prompts is not None
        warnings = data_warnings(family, found, data, cached=options.cache.texts)
        for line in (*warnings, *filter(None, [dark]), *idle_options(options, found, data)):
            log.warning(line)
        state = load_state(resume) if resume else None
        return cls(options, seed, found, data, prompts, optimizer, state, data.validation_plans(), resume)

    @property
    def datasets(self) -> list[tuple[DatasetConfig, tuple[Sample, ...]]]:
        return [(dataset.config, dataset.samples) for dataset in self.found.datasets]

    def check_resume(self, plan: RunPlan) -> None:
        """Raises UserError saying what of the state belongs to another run."""
        if self.resume_from is None:
            return
        known = {name: value for name, value in self.resume_from.fingerprint.items() if name != SCHEDULE}
        lines = compare(known, self.fingerprint(plan))
        if lines:
            raise UserError(
                f"--resume: {self.resume_path} is a state of another run: {'; '.join(lines)}. "
                "Give the same settings, or start anew from the file beside it"
            )
        if not self.is_finished(plan):
            plan.require_steps_after(self.resume_from.step)

    def is_finished(self, plan: RunPlan) -> bool:
        """Whether --resume auto finds that nothing is left to do."""
        state = self.resume_from
        return self.options.state.resume == AUTO and state is not None and state.step >= plan.total_steps

    def schedule(self, plan: RunPlan) -> dict[str, Any]:
        """What else the learning-rate schedule follows from: it may change when this run is resumed."""
        return {"steps": plan.total_steps, **{f"--{n}": vars(self.options.scheduler)[n] for n in SCHEDULE_OPTIONS}}

    def changed_schedule(self, plan: RunPlan, state: StateParts) -> list[str]:
        """What makes the schedule of the rest of the run another one than when the state was saved."""
        now, before = self.schedule(plan), state.fingerprint.get(SCHEDULE)
        if before is None or before == now:
            return []  # None: a state from before this was noted
        options = replace(self.options.scheduler, **{n: before[f"--{n}"] for n in SCHEDULE_OPTIONS})
        steps = range(state.step, max(plan.total_steps, before["steps"]))
        curves = (rates_of(options, self.optimizer, before["steps"], steps),
                  rates_of(self.options.scheduler, self.optimizer, plan.total_steps, steps))  # fmt: skip
        return compare(before, now) if curves[0] != curves[1] else []

    def fingerprint(self, plan: RunPlan) -> dict[str, Any]:
        """What must be the same when this run is resumed."""
        values = {f"--{n}": v for n, v in changed_values(self.options, all_values=True).items() if n in RESUMED_OPTIONS}
        values["--optimizer_type"] = self.options.optimizer.name  # there are several ways to ask for one
        facts = {"seed": self.seed, "processes": plan.num_processes, "batches per epoch": plan.batches_per_epoch}
        return {**values, **facts, "dataset": self.dataset_digests()}

    def dataset_digests(self) -> dict[str, dict[str, str]]:
        """Per subset its folder, and digests of its pictures, captions and settings."""
        result: dict[str, dict[str, str]] = {}
        pairs = ((dataset.config, subset) for dataset in self.found.datasets for subset in dataset.subsets)
        for index, (dataset, subset) in enumerate(pairs, start=1):
            sizes = (dataset.buckets, dataset.batch_size, dataset.network_multiplier, dataset.validation_split)
            rules = (subset.config.num_repeats, subset.config.captions, subset.config.images, sizes)
            pictures = [(Path(sample.path).name, sample.file_size) for sample in subset.samples]
            result[f"subset {index}"] = {
                "folder": Path(subset.config.name).name,
                "pictures": f"{len(pictures)} ({_digest(pictures)})",
                "captions": _digest([sample.caption for sample in subset.samples]),
                "settings": _digest(rules),
            }
            if dataset.validation_split:  # apart: states of runs without it are those of before
                chosen = "the run's seed" if dataset.validation_seed is None else f"seed {dataset.validation_seed}"
                result[f"subset {index}"]["held out"] = f"{dataset.validation_split} by {chosen}"
        return result

    def describe(self, plan: RunPlan) -> Iterator[str]:
        """The plan of the run, as it is printed before the start."""
        yield from folder_lines(self.found)
        for index, stats in enumerate(self.data.stats()):
            buckets = ", ".join(f"{w}x{h}: {count}" for (w, h), count in stats.buckets)
            reg = (
                f", {stats.reg_images} regularisation pictures used {stats.reg_uses} times" if stats.reg_images else ""
            )
            held_out = f", {stats.validation_images} held out for validation" if stats.validation_images else ""
            yield f"dataset {index + 1}: {stats.images} pictures, {stats.uses} with repeats{reg}{held_out}"
            yield f"dataset {index + 1}: batch size {stats.batch_size}, {stats.batches} batches, buckets {buckets}"
            if stats.reg_unused:
                unused = f"{len(stats.reg_unused)} regularisation pictures are not used"
                yield f"dataset {index + 1}: {unused}: {first_names(stats.reg_unused)}"
        sizes = {stats.batch_size for stats in self.data.stats()}
        effective = "/".join(str(size * plan.accumulation * plan.num_processes) for size in sorted(sizes))
        yield (
            f"plan: {plan.total_steps} steps = {plan.total_epochs} epochs of {plan.steps_per_epoch} steps; a step is "
            f"{plan.accumulation} batch(es) on {plan.num_processes} process(es), effective batch size {effective}; "
            f"seed {plan.seed}"
        )


def _digest(value: Any) -> str:
    """A short text that differs where the values do."""
    return hashlib.blake2b(repr(value).encode(), digest_size=4).hexdigest()


def preview_prompts(options: SampleOptions) -> tuple[Prompt, ...]:
    """The prompts of the previews; none when no previews are made.

    Graphical programs write an empty file where no prompt was given.
    """
    file = Path(options.sample_prompts or "")
    if options.wanted and file.is_file() and file.stat().st_size == 0:
        log.warning(f"--sample_prompts: {file} is empty: no previews are made")
        return ()
    return load_prompts(options.sample_prompts) if options.wanted and options.sample_prompts else ()


def check_schedule(options: TrainerOptions, optimizer: OptimizerChoice | None) -> None:
    """The learning-rate schedule, also where the optimizer is wrong: then as it would be with the default one.

    With --max_train_epochs the length is not known yet; `Trainer.make_plan` looks again when it is.
    """
    if optimizer is None and options.scheduler.lr_scheduler.startswith("adafactor"):
        return
    chosen = optimizer or choose_optimizer(OptimizerOptions())
    total = UNKNOWN_LENGTH if options.train.max_train_epochs else options.train.max_train_steps
    check_scheduler(options.scheduler, chosen, total_steps=total)


def check_weights(options: TrainerOptions, optimizer: OptimizerChoice | None) -> None:
    """The optimizer can work on weights in fp16 (--full_fp16), and they are averaged once. Raises UserError."""
    if optimizer is None:
        return
    if optimizer.row.schedule_free and options.ema.ema_decay is not None:
        raise UserError(f"--ema_decay: {optimizer.name} averages the weights by itself: leave one of them out")
    if options.precision.full_fp16:
        optimizer.check_dtype(trained_dtype(options.precision))


def run_seed(options: TrainerOptions, state: dict[str, Any] | None) -> int:
    """--seed, else that of the resumed state, else a new one."""
    if options.train.seed is not None:
        return options.train.seed
    if state is not None:
        return int(state["fingerprint"]["seed"])
    return secrets.randbelow(2**32)


def check_output_folder(options: TrainerOptions, extension: str) -> None:
    """The folder can be written to. What killed runs left half-written there is removed. extension: of the saves."""
    save = options.save
    assert save.output_dir is not None
    name = last_name(save.output_name)
    files, models = ([f"{name}{extension}"], []) if extension else ([], [name])
    check_output(save.output_dir, save.output_name, files=files, models=models, states=[state_name(name)])


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


def scan_datasets(
    family: ModelFamily, options: TrainerOptions, with_captions: Callable[[Scan], Scan] = lambda found: found, *,
    control: bool = False,
) -> Scan:  # fmt: skip
    """Configuration, folders, captions and pictures. Raises UserError with all that is wrong with them."""
    configs = load_dataset_config(
        options.data, bucket_step=family.sheet.bucket_step, cache=options.cache, control=control
    )
    found = scan(
        configs,
        cache_dir=options.cache.cache_dir,
        npz_suffix=family.latent.npz_suffix,
        plain_npz=not family.latent.npz_sized_keys,
        control=control,
    )
    checks = Checks()
    wanted = checks.run(lambda: with_captions(found)) or found
    report = lint(wanted)
    checks.problems += report.problems
    checks.finish()
    for line in report.warnings:
        log.warning(line)
    return wanted


def data_warnings(family: ModelFamily, found: Scan, data: TrainingData, *, cached: bool) -> Iterator[str]:
    """What is probably not meant, told from datasets and model together. cached: text outputs are."""
    enlarged = dict.fromkeys(name for stats in data.stats() for name in stats.upscaled)
    samples = [sample for dataset in found.datasets for sample in dataset.samples]
    lines = (
        smaller_than_bucket(list(enlarged)),
        longer_than_limit(samples, family.count_tokens, family.token_limit, option=family.sheet.token_option),
        choices_never_trained(samples, data.text_variants) if cached else None,
    )
    yield from (line for line in lines if line is not None)
    for index, (dataset, stats) in enumerate(zip(found.datasets, data.stats()), start=1):
        yield from split_warnings(f"dataset {index}", dataset.config, stats)
        yield from bucket_warnings(f"dataset {index}", dataset.config.buckets, stats)


def idle_options(options: TrainerOptions, found: Scan, data: TrainingData) -> Iterator[str]:
    """Options that will do nothing in this run, which only the datasets tell, or which graphical programs leave in."""
    names = ("validation_seed", "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps")
    values = {**vars(options.data), **vars(options.train)}
    given = [f"--{name}" for name in names if values[name] is not None]
    if given and not any(stats.validation_images for stats in data.stats()):
        yield f"{', '.join(given)}: no effect, no picture is held out (see --validation_split)"
    yield from idle_bucket_options([dataset.config for dataset in found.datasets])
    if options.cache.caption_variants != CacheOptions().caption_variants and not options.cache.texts:
        yield "--caption_variants: no effect without --cache_text_encoder_outputs"
    if options.sample.every_n_steps and options.sample.every_n_epochs:
        yield "--sample_every_n_steps: no effect, --sample_every_n_epochs wins"
    if options.sample.sample_prompts and not options.sample.wanted:
        ways = "--sample_every_n_epochs, --sample_every_n_steps or --sample_at_first"
        yield f"--sample_prompts: no previews are made without {ways}"


def training_data(found: Scan, options: TrainerOptions, seed: int) -> TrainingData:
    """The epochs of the run. Raises UserError where a cache cannot serve the datasets' options."""
    data = TrainingData(
        [(dataset.config, dataset.samples) for dataset in found.datasets],
        seed=seed,
        prior_loss_weight=options.data.prior_loss_weight,
        masked_loss=options.data.masked_loss,
        text_variants=options.cache.caption_variants,
    )
    problems = data.cache_problems(latents=options.cache.latents, texts=options.cache.texts)
    if problems:
        raise UserError(problems)
    return data
