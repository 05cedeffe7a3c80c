# SPDX-License-Identifier: Apache-2.0
"""The first stage of a run: check everything that needs no model, and report all mistakes at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TypeVar

from accelerate.utils import broadcast_object_list

from library.data.config import load_dataset_config
from library.data.dataset import TrainingData
from library.data.joined import Joined
from library.data.lint import (
    bucket_warnings,
    choices_never_trained,
    idle_bucket_options,
    longer_than_limit,
    smaller_than_bucket,
    split_warnings,
)
from library.data.lint import check as lint
from library.data.masks import MaskReport, check_masks
from library.data.options import CacheOptions
from library.data.scan import Scan, scan
from library.device import check_launch, indexed, make_accelerator, return_large_blocks, unscale_half_gradients
from library.errors import UserError, raise_problems
from library.families.family import ModelFamily
from library.io.checkpoint import check_output, last_name, state_name
from library.io.state import read_facts
from library.log import get_logger, is_main_process
from library.memory.choice import MemoryChoice
from library.objectives.options import LossOptions
from library.optim.optimizers import OptimizerChoice, choose_optimizer
from library.optim.options import OptimizerOptions
from library.optim.schedulers import check_scheduler
from library.sampling.options import SampleOptions
from library.sampling.prompts import Prompt, load_prompts
from library.stopping import StopRequest
from library.trainers.memory import check_choice
from library.trainers.method import Method
from library.trainers.options import TrainerOptions
from library.trainers.resume import Resumption, resume_folder, run_seed
from library.trainers.settings import distributed_settings, trained_dtype
from library.trainers.sharding import check_sharding, check_split_states
from library.trainers.stages import Checked, Processes
from library.trainers.tracking import check_trackers
from library.types import ReferenceSpec

T = TypeVar("T")
UNKNOWN_LENGTH = 10**9  # steps; longer than any run

log = get_logger()


class Checks:
    """Runs checks one after the other and collects their problems."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def run(self, action: Callable[[], T]) -> T | None:
        """The result of `action`, or None if it raised UserError."""
        try:
            return action()
        except UserError as error:
            self.problems += error.problems
            return None

    def finish(self) -> None:
        """Raises UserError with every problem."""
        if self.problems:
            raise UserError(dict.fromkeys(self.problems))  # two checks may find the same


def preview_prompts(options: SampleOptions) -> tuple[Prompt, ...]:
    """The prompts of the previews; empty if no previews are made.

    Graphical programs write an empty file if no prompt was given.
    """
    file = Path(options.sample_prompts or "")
    if options.wanted and file.is_file() and file.stat().st_size == 0:
        log.warning(f"--sample_prompts: {file} is empty: no previews are made")
        return ()
    return load_prompts(options.sample_prompts) if options.wanted and options.sample_prompts else ()


def check_schedule(options: TrainerOptions, optimizer: OptimizerChoice | None) -> None:
    """Check the learning-rate schedule; with the default optimizer if the chosen one is invalid. Raises UserError.

    With --max_train_epochs the length is not known yet; `stages.schedule` checks again when it is.
    """
    if optimizer is None and options.scheduler.lr_scheduler.startswith("adafactor"):
        return
    chosen = optimizer or choose_optimizer(OptimizerOptions())
    total = UNKNOWN_LENGTH if options.train.max_train_epochs else options.train.max_train_steps
    check_scheduler(options.scheduler, chosen, total_steps=total)


def check_weights(options: TrainerOptions, optimizer: OptimizerChoice | None) -> None:
    """Check that the optimizer supports fp16 weights (--full_fp16) and that weights are averaged once only."""
    if optimizer is None:
        return
    if optimizer.row.schedule_free and options.ema.ema_decay is not None:
        raise UserError(f"--ema_decay: {optimizer.name} averages the weights by itself: leave one of them out")
    if options.precision.full_fp16:
        optimizer.check_dtype(trained_dtype(options.precision))


def check_output_folder(options: TrainerOptions, extension: str) -> None:
    """Check that the folder is writable, and remove what killed runs left half-written. extension: of the saves."""
    save = options.save
    assert save.output_dir is not None
    name = last_name(save.output_name)
    files, models = ([f"{name}{extension}"], []) if extension else ([], [name])
    check_output(save.output_dir, save.output_name, files=files, models=models, states=[state_name(name)])


def scan_datasets(
    family: ModelFamily, options: TrainerOptions, with_captions: Callable[[Scan], Scan] = lambda found: found, *,
    control: bool = False,
) -> Scan:  # fmt: skip
    """Read configuration, folders, captions and picture headers. Raises UserError with all problems."""
    configs = load_dataset_config(
        options.data, bucket_step=family.sheet.bucket_step, cache=options.cache, control=control,
        references=family.references is not None, edits=family.edits,
    )  # fmt: skip
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
    """Warnings about likely mistakes that follow from datasets and model. cached: text outputs are cached."""
    several = [stats.upscaled for stats in data.stats()]
    enlarged = several[0] if len(several) == 1 else list(dict.fromkeys(chain.from_iterable(several)))
    samples = Joined([dataset.samples for dataset in found.datasets])
    lines = (
        smaller_than_bucket(enlarged),
        longer_than_limit(samples, family.count_tokens, family.token_limit, option=family.sheet.token_option),
        choices_never_trained(samples, data.text_variants) if cached else None,
    )
    yield from (line for line in lines if line is not None)
    for index, (dataset, stats) in enumerate(zip(found.datasets, data.stats()), start=1):
        yield from split_warnings(f"dataset {index}", dataset.config, stats)
        yield from bucket_warnings(f"dataset {index}", dataset.config.buckets, stats)


def idle_options(options: TrainerOptions, found: Scan, data: TrainingData) -> Iterator[str]:
    """Options without effect in this run, as far as that depends on the datasets or comes from graphical programs."""
    names = ("validation_seed", "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps")
    values = {**vars(options.data), **vars(options.train)}
    given = [f"--{name}" for name in names if values[name] is not None]
    if given and not any(stats.validation_images for stats in data.stats()):
        yield f"{', '.join(given)}: no effect, no picture is held out (see --validation_split)"
    yield from idle_bucket_options([dataset.config for dataset in found.datasets])
    if options.cache.caption_variants != CacheOptions().caption_variants and not options.cache.texts:
        yield "--caption_variants: no effect without --cache_text_encoder_outputs"
    if options.optimizer.kahan and not options.precision.full_bf16:
        yield (
            f"--optimizer_type {options.optimizer.name}: the same as without Kahan's sum, because weights are kept in "
            "float32 without --full_bf16"
        )
    if options.sample.every_n_steps and options.sample.every_n_epochs:
        yield "--sample_every_n_steps: no effect, --sample_every_n_epochs wins"
    if options.sample.sample_prompts and not options.sample.wanted:
        ways = "--sample_every_n_epochs, --sample_every_n_steps or --sample_at_first"
        yield f"--sample_prompts: no previews are made without {ways}"


def training_data(
    found: Scan, options: TrainerOptions, seed: int, references: ReferenceSpec | None, *, reads_masks: bool = False,
) -> TrainingData:  # fmt: skip
    """The epochs of the run. references: how the model takes reference pictures. reads_masks: it is shown masks.

    Raises UserError if a cache does not work with the datasets' options, and without the masks that the model reads.
    """
    data = TrainingData(
        [(dataset.config, dataset.samples) for dataset in found.datasets],
        seed=seed,
        prior_loss_weight=options.data.prior_loss_weight,
        masked_loss=options.data.masked_loss,
        text_variants=options.cache.caption_variants,
        references=references,
    )
    if reads_masks and not data.wants_masks:
        raise UserError("this model fills what masks cover: give --masked_loss with masks, or alpha_mask = true")
    raise_problems(data.cache_problems(latents=options.cache.latents, texts=options.cache.texts))
    return data


def read_masks(data: TrainingData, options: LossOptions) -> MaskReport | None:
    """What masks leave of the pictures; None without masks. Raises UserError for options that then have no effect."""
    if data.wants_masks:
        return check_masks(data.trained(), masked_loss=data.masked_loss)
    raise_problems(
        f"{flag} has no effect: no picture has a mask (give --masked_loss and conditioning_data_dir, or alpha_mask)"
        for flag in options.mask_flags()
    )
    return None


# ---- all of them ----------------------------------------------------------------------------------------------------


def check(method: Method[TrainerOptions], stop: StopRequest) -> Checked:
    """Read and check everything that needs no model. Raises UserError with all mistakes; warnings are logged."""
    family, options, checks = method.family, method.options, Checks()
    checks.run(family.check)
    checks.run(family.check_weights)
    checks.run(lambda: check_launch(deepspeed=options.distributed.deepspeed))
    checks.run(lambda: check_memory(method))
    checks.run(lambda: check_task(method))
    for method_check in method.checks():
        checks.run(method_check)
    checks.run(lambda: check_output_folder(options, method.extension))
    folder = checks.run(lambda: resume_folder(options))
    facts = checks.run(lambda: read_facts(folder)) if folder else None
    prompts = checks.run(lambda: preview_prompts(options.sample))
    checks.run(lambda: check_trackers(options.logging))
    optimizer = checks.run(lambda: choose_optimizer(options.optimizer))
    checks.run(lambda: check_weights(options, optimizer))
    checks.run(lambda: check_schedule(options, optimizer))
    learning = checks.run(method.learning)
    control = learning is not None and learning.conditioned
    found = checks.run(lambda: scan_datasets(family, options, method.with_captions, control=control))
    if learning is not None and optimizer is not None and found is not None:
        checks.run(lambda: check_sharding(options, learning, optimizer, found))
        checks.run(lambda: check_split_states(options, optimizer))
    seed, processes = run_seed(options, facts), None
    if found is not None and not checks.problems:
        processes = start_processes(options, found)
        seed = agreed_seed(seed)  # before the pictures are shuffled and held out by it
    read = lambda found: training_data(found, options, seed, family.references, reads_masks=family.reads_masks)
    data = checks.run(lambda: read(found)) if found else None
    masks = checks.run(lambda: read_masks(data, options.loss)) if data else None
    checks.finish()
    assert found is not None and data is not None and optimizer is not None and prompts is not None
    assert learning is not None and processes is not None
    # other processes show no warnings, and finding them takes time
    warnings = data_warnings(family, found, data, cached=options.cache.texts) if is_main_process() else ()
    idle = [*idle_options(options, found, data)]
    if options.distributed.shard_base and processes.world == 1:
        idle.append("--shard_base: no effect with one process, which has all weights")
    for line in (*warnings, *filter(None, [masks and masks.warning]), *idle):
        log.warning(line)
    if masks is not None and masks.summary is not None and processes.is_main:
        log.info(masks.summary)
    resumption, validation_plans = Resumption(folder), data.validation_plans()
    return Checked(
        method, learning, found, data, validation_plans, prompts, optimizer, seed, resumption, processes, stop
    )


def check_task(method: Method[TrainerOptions]) -> None:
    """Check that model and method can learn to edit pictures, where they are to. Raises UserError."""
    family = method.family
    if family.edits and family.references is None:
        raise UserError(f"--task edit: {family.sheet.title} is not trained to edit pictures here")
    if family.reads_masks and method.options.cache.latents:
        told = "are kept at the size of latents in a cache, and this model reads them whole: leave it out"
        raise UserError(f"--cache_latents: masks {told}")
    if family.edits and not method.learns_edits:
        raise UserError("--task edit: this script does not teach a model to edit pictures; train a LoRA or all weights")


def check_memory(method: Method[TrainerOptions]) -> None:
    """Check that model and method support the memory options. Raises UserError."""
    options, learning = method.options, method.learning()
    check_choice(
        options.memory, method.family, learning.swap_options, learning=learning.parts, changed=learning.changed,
        in_backward=learning.in_backward is not None, deepspeed=options.distributed.deepspeed,
        average=options.ema.ema_decay is not None,
    )  # fmt: skip


def start_processes(options: TrainerOptions, found: Scan) -> Processes:
    """Connect to the other processes of the run."""
    accelerator = make_accelerator(
        options.precision.mixed_precision,
        distributed_settings(
            options.distributed,
            max_grad_norm=options.optimizer.max_grad_norm,
            batch_size=max(size.batch_size for dataset in found.datasets for size in dataset.config.sizes),
        ),
    )
    if options.precision.full_fp16 and accelerator.scaler is not None:
        unscale_half_gradients(accelerator.scaler)
    processes = Processes(accelerator, indexed(accelerator.device))
    if processes.device.type == "cpu" and MemoryChoice.of(options.memory).activation_budget == 0:
        return_large_blocks()  # runs that recompute to save memory need it as well
    return processes


def agreed_seed(seed: int) -> int:
    """The seed of the first process, broadcast to all."""
    seeds = [seed]
    broadcast_object_list(seeds)
    return seeds[0]
