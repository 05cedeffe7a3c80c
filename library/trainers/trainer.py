# SPDX-License-Identifier: Apache-2.0
"""The training loop: there is no other. A method says which weights learn and what is saved (the override points)."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from library.data.plan import BatchPlan, each_shape
from library.data.scan import Scan
from library.device import (
    check_launch,
    fits,
    free_memory,
    indexed,
    is_card,
    limit_memory,
    make_accelerator,
    return_large_blocks,
    seed_everything,
    unscale_half_gradients,
)
from library.errors import EXIT_STOPPED, UserError, first_names
from library.families.family import ModelFamily
from library.families.finetune_options import FineTuneOptions
from library.io.checkpoint import extension_of, require_present
from library.io.state import StateParts
from library.log import get_logger, progress
from library.memory.checkpointing import recompute_encoders
from library.memory.choice import MemoryChoice
from library.memory.compiling import warm
from library.memory.estimate import CUDA_CONTEXT
from library.memory.quantise import Storage
from library.optim.schedulers import check_scheduler
from library.options import dump_toml
from library.planner.planning import PeakCheck, plan_memory
from library.rng import derive_seed, torch_generator
from library.stopping import StopRequest
from library.trainers.caching import Caches, Share
from library.trainers.debug_dataset import write_dataset_sheets
from library.trainers.encoding import encoders_that_stay, vae_that_stays
from library.trainers.facts import RunRecord
from library.trainers.feed import Feed, Steps, steps_of
from library.trainers.forward import Forward
from library.trainers.gradients import Gradients
from library.trainers.guards import MovingAverage, StepReader, StepReport
from library.trainers.memory import Memory, check_choice, moves_weights
from library.trainers.options import TrainerOptions
from library.trainers.plan import Position, make_plan
from library.trainers.preparation import SCHEDULE, Preparation
from library.trainers.previews import Previews
from library.trainers.saving import Saver
from library.trainers.settings import compute_dtype, distributed_settings, loading_processes, trained_dtype
from library.trainers.shortage import DoesNotFit, changing_weights
from library.trainers.signals import OtherProcessDied, StopVote, exchanging
from library.trainers.tracking import Trackers, open_trackers
from library.trainers.trainables import GradientWatch, Models, StepModule, Trainables
from library.trainers.updates import Updates
from library.trainers.validation import Validation
from library.types import Batch
from library.weights.quick_import import import_diffusers

log = get_logger()
WARMED_SHAPES = 2  # compiled before the first step; later ones when they come


class Trainer(ABC):
    """One run. `family` knows the architecture, `options` what the user wants."""

    project: ClassVar[str]  # name of the log's project where none is given
    kind: str  # of the files that are saved, for their metadata: a key of library.trainers.facts.ENDINGS

    def __init__(self, family: ModelFamily, options: TrainerOptions, stop: StopRequest | None = None) -> None:
        self.family, self.options, self.stop = family, options, stop or StopRequest()
        self.position = Position()
        self.check_of_plan: PeakCheck | None = None

    # ---- override points, and no others -----------------------------------------------------------------------------

    def checks(self) -> list[Callable[[], None]]:
        """What the method checks before a model is loaded; each raises UserError."""
        return []

    def with_captions(self, found: Scan) -> Scan:
        """The datasets as the method wants their captions. Raises UserError where it cannot learn from them."""
        return found

    @property
    def extension(self) -> str:
        """File ending of the saves; empty where each is a folder."""
        return extension_of(self.options.save.save_model_as)

    @property
    @abstractmethod
    def learning(self) -> frozenset[str]:
        """Models that learn, or whose adapters do: "denoiser" and names of text encoders."""

    @property
    def conditioned(self) -> bool:
        """Whether what learns looks at control images: each picture must have one then. Raises UserError."""
        return False

    @property
    def changed(self) -> frozenset[str]:
        """Models whose own weights learn, not only adapters on them."""
        return self.learning

    def storage(self, part: str) -> Storage:
        """How a model's matrices are kept. A frozen model in a float32 run keeps the file's half precision."""
        if part in self.changed:
            return "plain"
        asked = self.choice.storage if part == "denoiser" else self.choice.encoder_storage
        return "half" if asked == "plain" else cast(Storage, asked)

    def load_dtype(self, part: str) -> torch.dtype:
        """The dtype in which a model is loaded."""
        return self.dtype

    @abstractmethod
    def build_trainables(self) -> Trainables:
        """Attach or choose what learns; everything else is frozen already."""

    def before_step(self) -> None:  # noqa: B027  # most methods have nothing to do here
        """Before each optimizer step: what depends on how far the run is."""

    def after_step(self) -> dict[str, float | Tensor]:
        """After an optimizer step, with its gradients still there: what a method does besides, and numbers to log."""
        return {}

    @abstractmethod
    def save_model(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the trained weights to `path`, whole or not at all."""

    @abstractmethod
    def metadata(self) -> dict[str, Any] | None:
        """The fields of library.io.metadata.RunFacts that the method knows; None: only modelspec.* entries."""

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Exit code 0, or EXIT_STOPPED where the run was asked to stop. Raises UserError and StopTraining."""
        self.prepared = Preparation.of(
            self.family, self.options, [self.check_launch, self.check_memory, *self.checks()], self.with_captions,
            lambda: self.conditioned, extension=self.extension, agreed=self.agreed_seed,
        )  # fmt: skip
        if self.options.data.debug_dataset:
            write_dataset_sheets(self.prepared.data, Path(self.options.save.output_dir or "."))
            return self.ended(0)
        self.make_plan()
        if self.options.memory.plan:
            sys.stdout.write(plan_memory(self).table())
            return self.ended(0)
        if self.prepared.is_finished(self.plan):
            log.info(f"--resume auto: the run is finished, all of its {self.plan.total_steps} steps are done")
            return self.ended(0)
        self.load_models()
        self.stop.check()
        seed_everything(derive_seed(self.plan.seed, "first weights"))
        self.trainables = self.build_trainables()
        self.build_optimizer()
        self.build_outputs()
        self.restore()
        return self.train()

    def check_launch(self) -> None:
        """Processes are started in a way that the training knows."""
        check_launch(deepspeed=self.options.distributed.deepspeed)

    def check_memory(self) -> None:
        """The model and the method can do what is asked for to save memory."""
        options = self.options
        self.choice = MemoryChoice.of(options.memory)
        check_choice(
            options.memory, self.family, self.swap_options, learning=self.learning, changed=self.changed,
            in_backward=self.steps_in_backward, deepspeed=options.distributed.deepspeed,
            average=options.ema.ema_decay is not None,
        )  # fmt: skip

    @property
    def steps_in_backward(self) -> bool:
        """Whether weights are stepped during the backward pass."""
        return False

    @property
    def swap_options(self) -> FineTuneOptions | None:
        """Options that a family may have besides --blocks_to_swap."""
        return None

    def units(self) -> list[list[nn.Parameter]]:
        """If so, those that are stepped together."""
        return []

    def agreed_seed(self, seed: int, found: Scan) -> int:
        """The seed of the first process, for all of them: they meet here for the first time."""
        self.start_processes(found)
        seeds = [seed]
        broadcast_object_list(seeds)
        return seeds[0]

    def start_processes(self, found: Scan) -> None:
        options = self.options
        self.accelerator = make_accelerator(
            options.precision.mixed_precision,
            distributed_settings(
                options.distributed,
                max_grad_norm=options.optimizer.max_grad_norm,
                batch_size=max(dataset.config.batch_size for dataset in found.datasets),
            ),
        )
        if options.precision.full_fp16 and self.accelerator.scaler is not None:
            unscale_half_gradients(self.accelerator.scaler)
        self.device = indexed(self.accelerator.device)
        if self.device.type == "cpu" and self.choice.activation_budget == 0:
            return_large_blocks()  # who recomputes to save memory would rather have this, too
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main_process = self.accelerator.is_main_process
        self.dtype = compute_dtype(options.precision)

    def make_plan(self) -> None:
        train = self.options.train
        self.plan = make_plan(
            total_batches=len(self.prepared.data.plan_epoch(1)),
            num_processes=self.world,
            accumulation=train.gradient_accumulation_steps,
            max_steps=train.max_train_steps,
            max_epochs=train.max_train_epochs,
            seed=self.prepared.seed,
        )
        check_scheduler(self.options.scheduler, self.prepared.optimizer, total_steps=self.plan.total_steps)
        self.prepared.check_resume(self.plan)
        for line in self.prepared.describe(self.plan) if self.main_process else ():
            log.info(line)

    def load_models(self) -> None:
        """Fill the caches, then load what the steps need; each model is freed as soon as it has no more work."""
        import_diffusers()
        if self.options.memory.asks_planner:
            self.choose_memory()
        family, share, prompts = self.family, Share(self.rank, self.world), self.prepared.prompts
        self.objective = family.objective(self.options.objective, self.options.loss)
        texts = [text for prompt in prompts for text in (prompt.negative_prompt, prompt.prompt)]
        caches = Caches(
            family, self.options, self.prepared.data, self.dtype, learning=self.learning, more_texts=texts,
            check=self.stop.check,
        )  # fmt: skip
        self.previews = Previews(
            family, self.objective, self.options, prompts, device=self.device, dtype=self.dtype, seed=self.plan.seed,
            active=self.main_process, size=self.prepared.found.datasets[0].config.buckets.resolution,
            texts=caches.texts, conditioned=self.conditioned, stop=self.stop,
        )  # fmt: skip
        encoders = encoders_that_stay(caches, self.load_encoder, share)
        vae = vae_that_stays(caches, lambda: family.load_vae(self.dtype, self.device), share, previews=bool(prompts))
        self.accelerator.wait_for_everyone()
        free_memory()
        self.data = self.prepared.data.prepared(
            total_steps=self.plan.total_steps, latents=caches.latents, texts=caches.texts, join=family.join_conds
        )
        # what is moved to and fro is loaded where it stays: as a whole it may not fit on the card
        device = torch.device("cpu") if moves_weights(self.choice, self.swap_options) else self.device
        denoiser = family.load_denoiser(self.load_dtype("denoiser"), device, storage=self.storage("denoiser"))
        self.models = Models(denoiser, encoders, vae)
        for module in self.models.all():
            module.requires_grad_(False)

    def choose_memory(self) -> None:
        """What is not given is chosen, and the card is made as small as --vram_budget says."""
        budget, plan = self.options.memory.vram_budget, plan_memory(self)
        self.choice = plan.choose(budget)
        if is_card(self.device):
            self.check_of_plan = PeakCheck(plan.needs(self.choice), self.device)
        if budget is not None:
            limit_memory(self.device, budget - CUDA_CONTEXT)

    def load_encoder(self, name: str, device: str | None = None) -> nn.Module:
        storage = self.storage(name)
        return self.family.load_text_encoder(name, self.load_dtype(name), device or self.device, storage=storage)

    def build_optimizer(self) -> None:
        """Precision, memory and speed of what learns, then the optimizer and what belongs to it."""
        trainables = self.trainables
        trainables.module.to(self.device, trained_dtype(self.options.precision))
        if self.choice.activation_budget < 1:
            recompute_encoders([e for name, e in self.models.encoders.items() if name in trainables.encoders])
        self.memory = Memory(
            self.family, self.models.denoiser, self.choice, self.options.memory, self.swap_options, self.device
        )
        shapes = self.shapes()
        self.memory.prepare(shapes=len(shapes))
        self.updates = Updates(
            self.options, self.prepared.optimizer, trainables, self.accelerator, total_steps=self.plan.total_steps,
            seed=self.plan.seed,
        )  # fmt: skip
        self.memory.move_activations(trainables.parameters())
        model = self.updates.prepare(StepModule(self.family, self.models, trainables))
        if self.steps_in_backward:
            self.memory.steps_in_backward(self.updates.step_in_backward(self.units(), self.memory.changed))
        self.forward = Forward(
            self.family, self.objective, self.models, trainables, model, self.device, self.dtype,
            around=self.memory.around,
        )  # fmt: skip
        self.passes = Gradients(
            self.forward, self.updates, self.memory, self.accelerator, self.plan.seed, self.rank,
            may_retry=self.world == 1 and not self.options.distributed.deepspeed,
        )  # fmt: skip
        self.validation = Validation(
            self.options.train, self.prepared.validation_plans, self.data, self.forward, self.plan.seed,
            self.plan.total_steps, self.stop,
        )  # fmt: skip
        if self.memory.compiled is not None:
            passes = [partial(self.one_pass, plan) for plan in list(shapes.values())[:WARMED_SHAPES]]
            # all that learns, or what comes before every block: then the backward pass goes through all of them
            trained = trainables.parameters() if trainables.flat else trainables.parameters()[:1]
            warm(passes, trained, self.device)
        free_memory()  # of the weights as they were before they were joined

    def shapes(self) -> dict[tuple[Any, ...], BatchPlan]:
        """Each size of pictures and batches of an epoch, with a batch of it."""
        return {(plan.bucket, len(plan.samples)): plan for plan in each_shape(self.data.plan_epoch(1))}

    def one_pass(self, plan: BatchPlan) -> Tensor:
        """The loss of a batch, for no other purpose than to have it computed once."""
        batch = self.data.load(plan, step=0).to(self.device)
        generator = torch_generator(self.plan.seed, "compiling", device=self.device)
        return self.forward.mean_loss(batch, generator)

    def build_outputs(self) -> None:
        """What watches the run and what it writes."""
        self.saver = Saver(
            self.options, self.plan, active=self.main_process, write_model=self.write_model, state=self.state_parts,
            extension=self.extension, side_endings=self.family.sheet.side_endings,
        )  # fmt: skip
        self.record = RunRecord(
            self.options,
            self.plan,
            self.prepared.datasets,
            self.data,
            self.family.facts(),
            self.family.model_names() if self.metadata() is not None else {},  # hashing gigabytes takes its time
        )
        self.watch: GradientWatch | None = GradientWatch(self.trainables.modules)
        self.losses = MovingAverage(self.plan.steps_per_epoch)
        # a schedule that follows the loss must see every loss at its step, or the run would depend on timing
        self.reader = StepReader(lag=0 if self.updates.scheduler.needs_loss else 4)

    # ---- states and files -------------------------------------------------------------------------------------------

    def state_parts(self) -> StateParts:
        """Everything that the rest of the run depends on."""
        self.memory.home()
        return StateParts(
            **self.updates.states(),
            step=self.position.step,
            epoch=self.position.epoch,
            batch=self.position.batch,
            losses=list(self.losses.values),
            fingerprint={**self.prepared.fingerprint(self.plan), SCHEDULE: self.prepared.schedule(self.plan)},
        )

    def restore(self) -> None:
        """--resume, --initial_step or --initial_epoch."""
        parts, start = self.prepared.resume_from, self.options.state
        if parts is not None:
            self.memory.home()
            self.updates.load(parts)
            if changed := self.prepared.changed_schedule(self.plan, parts):
                log.warning(f"--resume: from here on the learning-rate schedule is another one: {', '.join(changed)}")
            self.position = Position(parts.step, parts.epoch, parts.batch)
            self.losses = MovingAverage(self.plan.steps_per_epoch, parts.losses)
            self.prepared.resume_from = None
            log.info(
                f"resumed at step {parts.step} of {self.plan.total_steps}, epoch {parts.epoch + 1}, batch {parts.batch}"
            )
        elif start.initial_step or start.initial_epoch:
            step = start.initial_step or ((start.initial_epoch or 1) - 1) * self.plan.steps_per_epoch
            self.position = self.plan.position_of(step)
            self.updates.skip_schedule(step)
        self.plan.require_steps_after(self.position.step)

    def write_model(self, path: Path) -> None:
        """Write the trained weights (their moving average, if there is one) with metadata."""
        metadata = self.record.metadata(
            self.kind, self.metadata(), self.updates.optim.name_for_metadata, step=self.position.step,
            epoch=self.position.epoch,
        )  # fmt: skip
        self.memory.home()
        require_present(dict(self.trainables.module.named_parameters()), path)
        with self.updates.averaged():
            self.save_model(path, metadata)

    # ---- one step ---------------------------------------------------------------------------------------------------

    def train_step(self, batches: Sequence[Batch], first_micro_step: int) -> None:
        """One optimizer step over its micro-batches."""
        self.before_step()
        total = self.gradients_of(batches, first_micro_step)
        with changing_weights(self.position.step):
            grad_norm = self.updates.step()
            rates = self.updates.rates()
            self.updates.scheduler.step(self.losses.mean if self.updates.scheduler.needs_loss else None)
            more = self.after_step()
            self.updates.finish_step(self.position.step)
        names = [name for batch in batches for name in batch.names]
        self.reader.push(
            self.position.step + 1, total, grad_norm, names,
            scaler_skips=self.accelerator.scaler is not None, others={**rates, **more},
        )  # fmt: skip

    def gradients_of(self, batches: Sequence[Batch], first_micro_step: int) -> Tensor:
        """The mean loss of the step's micro-batches, with all gradients in place."""
        return self.passes.of(batches, first_micro_step, self.position.step)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> int:
        self.stop.check()
        self.stop.interrupts = False  # from here on the step is finished and the state saved
        with self.stop.installed():
            trackers = open_trackers(self.options.logging, main_process=self.main_process, project=self.project)
            if self.options.logging.log_config:
                trackers.text("config", dump_toml(self.options))
            self.saver.write_config(self.options)
            self.preview_if_due(trackers, epoch_ended=False)
            with closing(Feed(self.steps(), processes=self.world)) as feed:
                failure = self.take_steps(feed, trackers)
            finished = failure is None and self.position.step >= self.plan.total_steps
            self.save_at_end(trackers, failure, finished=finished)
            self.stop.code_of_run = 0 if finished else EXIT_STOPPED
            if finished:
                self.previews.before_and_after()
            trackers.close()
            return self.ended(self.stop.code_of_run)

    def ended(self, code: int) -> int:
        """The exit code, after the processes have parted. None of them has anything under way: see `save`."""
        self.accelerator.end_training()
        return code

    def take_steps(self, feed: Feed, trackers: Trackers) -> Exception | None:
        """Train until the end, until the run was asked to stop, or until it cannot go on: then the reason is returned.

        Whatever is returned, the weights are those after the last step that was counted.
        """
        vote = StopVote(self.device, processes=self.world)
        if vote.at_once(feed.failure is not None):
            return feed.failure or UserError("another process cannot load its pictures")
        started: int | None = None
        with progress(self.plan.total_steps, "steps", "step", start=self.position.step) as bar:
            for batches in feed:
                if started != self.position.epoch:
                    started = self.position.epoch
                    self.trainables.epoch_started()
                try:
                    with exchanging(self.world):
                        self.train_step(batches, self.plan.micro_step(self.position.epoch, self.position.batch))
                        failure = self.after_training_step(len(batches), bar, trackers) or feed.failure
                        if vote.decided(self.stop.requested or failure is not None):
                            return failure
                except (DoesNotFit, OtherProcessDied) as error:
                    return error
        return feed.failure

    def after_training_step(self, micro_batches: int, bar: progress, trackers: Trackers) -> Exception | None:
        """What comes after a step: numbers, validation, saves, previews. An error is returned where a state can be
        saved all the same."""
        failure = None
        if self.check_of_plan is not None:
            self.check_of_plan.step_taken()
        epoch_ended = self.advance(micro_batches)
        self.report(self.reader.arrived(), trackers)
        bar.advance(note=f"loss {self.losses.mean:.4f}" if self.losses.values else "")
        try:
            self.validate_if_due(trackers, epoch_ended=epoch_ended)
        except Exception as error:
            failure = error
        if self.saver.is_due(self.position, epoch_ended):
            self.save(trackers, partial(self.saver.after_step, self.position, epoch_ended))
        self.preview_if_due(trackers, epoch_ended=epoch_ended)
        return failure

    def steps(self) -> Steps:
        """The micro-batches of one optimizer step after the other, from the current position to the end of the run."""
        data = self.options.data
        loader = self.data.loader(
            workers=loading_processes(data), persistent=data.persistent_data_loader_workers,
            pin_memory=self.memory.pinning.works(),
        )  # fmt: skip
        return steps_of(self.data, loader, self.plan, self.position, rank=self.rank, world=self.world)

    def advance(self, micro_batches: int) -> bool:
        """Count the step. True when it was the last of its epoch."""
        epoch, batch = self.position.epoch, self.position.batch + micro_batches
        ended = batch >= self.plan.batches_per_epoch
        self.position = Position(self.position.step + 1, epoch + ended, 0 if ended else batch)
        return ended

    def save(self, trackers: Trackers, write: Callable[[], None]) -> None:
        """Read all numbers that are still under way (StopTraining when one is not finite), then write."""
        self.report(self.reader.flush(), trackers)
        if self.watch is not None:
            silent, self.watch = self.watch.stop(), None
            if silent and self.position.step > 0:
                log.warning(f"{len(silent)} trainable modules never received a gradient: {first_names(silent)}")
        write()
        self.accelerator.wait_for_everyone()

    def save_at_end(self, trackers: Trackers, failure: Exception | None, *, finished: bool) -> None:
        """The result, or the state of a run that ends early. Raises `failure`, why it cannot go on, after the save."""
        write = partial(self.saver.at_end, self.position, finished=finished)
        if failure is None:
            return self.save(trackers, write)
        try:
            if isinstance(failure, OtherProcessDied):  # nobody is there to wait for
                self.report(self.reader.flush(), trackers)
                write()
            else:
                self.save(trackers, write)
        except UserError as error:
            log.warning(f"the state could not be saved: {'; '.join(error.problems)}")
        if not self.main_process:  # of what goes wrong in one process alone, only that one can tell
            log.error(f"process {self.rank}: {failure}")
        raise failure

    def preview_if_due(self, trackers: Trackers, *, epoch_ended: bool) -> None:
        self.previews.if_due(
            self.models,
            self.trainables,
            trackers,
            self.position,
            epoch_ended=epoch_ended,
            weights=self.updates.shown(),
        )

    def report(self, reports: Sequence[StepReport], trackers: Trackers) -> None:
        for item in reports:
            self.losses.add(item.loss)
            values = {"loss/current": item.loss, "loss/average": self.losses.mean, "grad_norm": item.grad_norm}
            trackers.scalars({**values, **item.others}, item.step)

    def validate_if_due(self, trackers: Trackers, *, epoch_ended: bool) -> None:
        step = self.position.step
        if self.validation.is_due(step, self.position.epoch, epoch_ended=epoch_ended):
            losses: list[float | None] = []
            with self.updates.shown():
                fitted = fits(lambda: losses.append(self.validation.loss()))
            if not fitted:
                log.warning(f"no validation loss at step {step}: out of memory; the training goes on")
            elif (loss := losses[0]) is not None:
                trackers.scalars({"loss/validation": loss}, step)
                log.info(f"validation loss {loss:.5f} at step {step}")
