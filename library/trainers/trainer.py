# SPDX-License-Identifier: Apache-2.0
"""The training loop: there is no other. A method says which weights learn and what is saved (the override points)."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.data.scan import Scan
from library.device import (
    free_memory,
    make_accelerator,
    return_large_blocks,
    seed_everything,
    unscale_half_gradients,
)
from library.errors import first_names
from library.io.checkpoint import extension_of
from library.io.state import StateParts
from library.log import get_logger, progress
from library.models.family import ModelFamily
from library.models.quick_import import import_diffusers
from library.optim.bf16 import build_bf16
from library.optim.ema import Ema
from library.optim.flat import FlatParameters
from library.optim.schedulers import build_scheduler, check_scheduler
from library.options import dump_toml
from library.rng import derive_seed, torch_generator
from library.trainers.caching import Caches, Share
from library.trainers.debug_dataset import write_dataset_sheets
from library.trainers.facts import RunRecord
from library.trainers.guards import MovingAverage, StepReader, StepReport
from library.trainers.options import TrainerOptions
from library.trainers.plan import Position, make_plan, share_of
from library.trainers.preparation import Preparation
from library.trainers.previews import Previews
from library.trainers.saving import Saver
from library.trainers.settings import compute_dtype, distributed_settings, loading_processes, trained_dtype
from library.trainers.signals import EXIT_STOPPED, StopRequest, StopVote
from library.trainers.tracking import Trackers, open_trackers
from library.trainers.trainables import GradientWatch, Models, StepModule, Trainables
from library.types import Batch, Noised

log = get_logger()


class Trainer(ABC):
    """One run. `family` knows the architecture, `options` what the user wants."""

    project: ClassVar[str]  # name of the log's project where none is given
    kind: str  # of the files that are saved, for their metadata: a key of library.trainers.facts.ENDINGS

    def __init__(self, family: ModelFamily, options: TrainerOptions) -> None:
        self.family, self.options = family, options
        self.position = Position()

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

    def keeps_half(self, part: str) -> bool:
        """Whether a model stays frozen: a float32 run may then keep its matrices in the file's half precision."""
        return part not in self.learning

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
        """Exit code 0, or EXIT_STOPPED after Ctrl-C / SIGTERM. Raises UserError and StopTraining."""
        self.prepared = Preparation.of(
            self.family, self.options, self.checks(), self.with_captions, lambda: self.conditioned,
            extension=self.extension,
        )  # fmt: skip
        if self.options.data.debug_dataset:
            write_dataset_sheets(self.prepared.data, Path(self.options.save.output_dir or "."))
            return 0
        self.start_processes()
        self.make_plan()
        self.load_models()
        seed_everything(derive_seed(self.plan.seed, "first weights"))
        self.trainables = self.build_trainables()
        self.build_optimizer()
        self.build_outputs()
        self.restore()
        return self.train()

    def start_processes(self) -> None:
        options = self.options
        self.accelerator = make_accelerator(
            options.precision.mixed_precision,
            distributed_settings(
                options.distributed,
                max_grad_norm=options.optimizer.max_grad_norm,
                batch_size=max(dataset.config.batch_size for dataset in self.prepared.found.datasets),
            ),
        )
        if options.precision.full_fp16 and self.accelerator.scaler is not None:
            unscale_half_gradients(self.accelerator.scaler)
        self.device = self.accelerator.device
        if self.device.type == "cpu" and options.memory.gradient_checkpointing:
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
        for line in self.prepared.describe(self.plan):
            log.info(line)

    def load_models(self) -> None:
        """Fill the caches, then load what the steps need; each model is freed as soon as it has no more work."""
        import_diffusers()
        family, share, prompts = self.family, Share(self.rank, self.world), self.prepared.prompts
        self.objective = family.objective(self.options.objective, self.options.loss)
        texts = [text for prompt in prompts for text in (prompt.negative_prompt, prompt.prompt)]
        caches = Caches(family, self.options, self.prepared.data, self.dtype, learning=self.learning, more_texts=texts)
        self.previews = Previews(
            family, self.objective, self.options, prompts, device=self.device, dtype=self.dtype, seed=self.plan.seed,
            active=self.main_process, size=self.prepared.found.datasets[0].config.buckets.resolution,
            texts=caches.texts, conditioned=self.conditioned,
        )  # fmt: skip
        encoders: dict[str, nn.Module] = {}
        for name in family.encoders:
            if not caches.caches_text(name):
                encoders[name] = self.load_encoder(name)
            elif caches.texts_missing(name):
                caches.fill_texts(name, self.load_encoder(name), share)
                free_memory()
        vae = None
        if caches.latents is None or prompts or caches.latents_missing():
            vae = family.load_vae(self.dtype, self.device)
        if caches.latents is not None:
            if vae is not None:
                caches.fill_latents(vae, share)
            vae = vae.to("cpu") if vae is not None and prompts else None
        self.accelerator.wait_for_everyone()
        free_memory()
        self.data = self.prepared.data.prepared(
            total_steps=self.plan.total_steps, latents=caches.latents, texts=caches.texts, join=family.join_conds
        )
        denoiser = family.load_denoiser(self.load_dtype("denoiser"), self.device, keep_half=self.keeps_half("denoiser"))
        self.models = Models(denoiser, encoders, vae)
        for module in self.models.all():
            module.requires_grad_(False)

    def load_encoder(self, name: str) -> nn.Module:
        return self.family.load_text_encoder(name, self.load_dtype(name), self.device, keep_half=self.keeps_half(name))

    def build_optimizer(self) -> None:
        """Precision, memory and speed of what learns, then optimizer and schedule."""
        precision, memory, trainables = self.options.precision, self.options.memory, self.trainables
        trainables.module.to(self.device, trained_dtype(precision))
        if memory.gradient_checkpointing:
            learning = [encoder for name, encoder in self.models.encoders.items() if name in trainables.encoders]
            self.family.enable_checkpointing(self.models.denoiser, learning)
        if memory.compiles:
            for block in self.family.blocks(self.models.denoiser):
                block.compile(backend=memory.dynamo_backend)
        elementwise = self.prepared.optimizer.row.elementwise and not self.options.distributed.deepspeed
        joined = elementwise and trainables.flat
        self.flat = FlatParameters(trainables.groups) if joined else None
        groups = self.flat.param_groups if self.flat else trainables.groups
        self.optim = build_bf16(self.prepared.optimizer, groups, self.options.bf16_update, seed=self.plan.seed)
        module = StepModule(self.family, self.models, trainables)
        self.model, self.optimizer = self.accelerator.prepare(module, self.optim.optimizer)
        self.scheduler = build_scheduler(self.options.scheduler, self.optim, total_steps=self.plan.total_steps)
        self.optim.train_mode()
        free_memory()  # of the weights as they were before they were joined
        decay = self.options.ema.ema_decay
        self.ema = Ema(trainables.parameters(), decay) if decay is not None else None

    def build_outputs(self) -> None:
        """What watches the run and what it writes."""
        self.saver = Saver(
            self.options, self.plan, active=self.main_process, write_model=self.write_model, state=self.state_parts,
            extension=self.extension, side_endings=self.family.side_endings,
        )  # fmt: skip
        self.record = RunRecord(
            self.options,
            self.plan,
            self.prepared.datasets,
            self.data.stats(),
            self.family.facts(),
            self.family.model_names() if self.metadata() is not None else {},  # hashing gigabytes takes its time
        )
        self.watch: GradientWatch | None = GradientWatch(self.trainables.modules)
        self.losses = MovingAverage(self.plan.steps_per_epoch)
        # a schedule that follows the loss must see every loss at its step, or the run would depend on timing
        self.reader = StepReader(lag=0 if self.scheduler.needs_loss else 4)

    # ---- states and files -------------------------------------------------------------------------------------------

    def state_parts(self) -> StateParts:
        """Everything that the rest of the run depends on."""
        scaler = self.accelerator.scaler
        return StateParts(
            weights=self.trainables.state(),
            optimizer=self.optim.state_dict(),
            scheduler=self.scheduler.state_dict(),
            scaler=scaler.state_dict() if scaler is not None else None,
            ema=self.ema.state_dict() if self.ema else None,
            step=self.position.step,
            epoch=self.position.epoch,
            batch=self.position.batch,
            losses=list(self.losses.values),
            fingerprint=self.prepared.fingerprint(self.plan),
        )

    def restore(self) -> None:
        """--resume, --initial_step or --initial_epoch."""
        parts, start = self.prepared.resume_from, self.options.state
        if parts is not None:
            self.trainables.load(parts.weights)
            self.optim.load_state_dict(parts.optimizer)
            self.scheduler.load_state_dict(parts.scheduler)
            if self.accelerator.scaler is not None and parts.scaler is not None:
                self.accelerator.scaler.load_state_dict(parts.scaler)
            if self.ema and parts.ema is not None:
                self.ema.load_state_dict(parts.ema)
            self.position = Position(parts.step, parts.epoch, parts.batch)
            self.losses = MovingAverage(self.plan.steps_per_epoch, parts.losses)
            self.prepared.resume_from = None
            log.info(
                f"resumed at step {parts.step} of {self.plan.total_steps}, epoch {parts.epoch + 1}, batch {parts.batch}"
            )
        elif start.initial_step or start.initial_epoch:
            step = start.initial_step or ((start.initial_epoch or 1) - 1) * self.plan.steps_per_epoch
            self.position = self.plan.position_of(step)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's: a schedule before the first optimizer step. Here it is meant
                for _ in range(0 if self.scheduler.needs_loss else step):
                    self.scheduler.step()
        self.plan.require_steps_after(self.position.step)

    def write_model(self, path: Path) -> None:
        """Write the trained weights (their moving average, if there is one) with metadata."""
        metadata = self.record.metadata(
            self.kind, self.metadata(), self.optim.name_for_metadata, step=self.position.step, epoch=self.position.epoch
        )
        with self.averaged():
            self.save_model(path, metadata)

    # ---- one step ---------------------------------------------------------------------------------------------------

    def train_step(self, batches: Sequence[Batch], first_micro_step: int) -> None:
        """One optimizer step over its micro-batches."""
        self.before_step()
        total = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            with self.gradient_sync(is_last=index == len(batches) - 1):
                generator = torch_generator(
                    self.plan.seed, "noise", first_micro_step + index, self.rank, device=self.device
                )
                seed_everything(derive_seed(self.plan.seed, "dropout", first_micro_step + index, self.rank))
                loss = self.batch_loss(batch.to(self.device), generator) / len(batches)
                self.accelerator.backward(loss)
            total += loss.detach()
        grad_norm = self.clip_gradients()
        rates = self.rates()
        self.optimizer.step()
        self.scheduler.step(self.losses.mean if self.scheduler.needs_loss else None)
        more = self.after_step()
        self.zero_gradients()
        if self.ema:
            self.ema.update(self.position.step)
        names = [name for batch in batches for name in batch.names]
        self.reader.push(
            self.position.step + 1, total, grad_norm, names,
            scaler_skips=self.accelerator.scaler is not None, others={**rates, **more},
        )  # fmt: skip

    def batch_loss(self, batch: Batch, generator: torch.Generator, t: Tensor | None = None) -> Tensor:
        """Steps 2 to 7 of docs/architecture.md: the mean loss of one micro-batch. `t` is fixed in validation."""
        latents = self.latents_of(batch)
        if t is None:
            height, width = latents.shape[-2:]
            t = self.objective.sample_t(batch.size, (height, width), generator, self.device)
        noised = self.objective.noise(latents, t, generator)
        self.trainables.set_multiplier(batch.network_multiplier)
        pred = self.predict(noised, batch)
        if any(batch.keep_prior):
            noised = self.with_prior_target(noised, batch)
        return self.objective.loss(pred, noised, batch).mean()

    def latents_of(self, batch: Batch) -> Tensor:
        if batch.latents is not None:
            return batch.latents.float()
        assert batch.pixels is not None and self.models.vae is not None
        with torch.no_grad():
            return self.family.encode_image(self.models.vae, batch.pixels, batch.latent_seeds).float()

    def predict(self, noised: Noised, batch: Batch) -> Tensor:
        tokens = self.family.tokenize(batch.captions) if self.models.encoders else None
        offload = self.options.memory.cpu_offload_checkpointing and torch.is_grad_enabled()
        with torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda") if offload else nullcontext():
            return self.model(noised.x_t.to(self.dtype), noised.t, batch, tokens).float()

    def with_prior_target(self, noised: Noised, batch: Batch) -> Noised:
        """custom_attributes.diff_output_preservation: these samples learn what the untrained model says."""
        with torch.no_grad(), self.trainables.base_model():
            prior = self.predict(noised, batch)
        keep = torch.tensor(batch.keep_prior, device=self.device).view(-1, 1, 1, 1)
        return replace(noised, target=torch.where(keep, prior, noised.target))

    def gradient_sync(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Processes exchange gradients, and DeepSpeed steps, only in the last micro-batch of a step."""
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        return nullcontext() if is_last else self.accelerator.no_sync(self.model)

    def clip_gradients(self) -> Tensor:
        """The gradient norm before clipping, on the device."""
        limit = self.options.optimizer.max_grad_norm or float("inf")
        if self.flat is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            return self.flat.clip_grad_norm(limit)
        norm = self.accelerator.clip_grad_norm_(self.trainables.parameters(), limit)
        return torch.as_tensor(0.0 if norm is None else norm, device=self.device)

    def rates(self) -> dict[str, float | Tensor]:
        """The learning rate of each group, and times the step size where the optimizer finds that itself."""
        found: dict[str, float | Tensor] = {}
        for group, rate in zip(self.optim.optimizer.param_groups, self.scheduler.get_last_lr()):
            name = group.get("name", f"group {len(found)}")
            found[f"lr/{name}"] = rate
            if self.prepared.optimizer.row.finds_rate:
                found[f"lr/d*{name}"] = rate * group["d"]
        return found

    def zero_gradients(self) -> None:
        if self.flat is not None:
            self.flat.zero_grad()
        else:
            self.optimizer.zero_grad(set_to_none=True)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> int:
        trackers = open_trackers(self.options.logging, main_process=self.main_process, project=self.project)
        if self.options.logging.log_config:
            trackers.text("config", dump_toml(self.options))
        self.saver.write_config(self.options)
        self.preview_if_due(trackers, epoch_ended=False)
        total, vote = self.plan.total_steps, StopVote(self.device, processes=self.world)
        with StopRequest() as stop, progress(total, "steps", "step", start=self.position.step) as bar:
            for batches in self.steps():
                self.train_step(batches, self.plan.micro_step(self.position.epoch, self.position.batch))
                epoch_ended = self.advance(len(batches))
                self.report(self.reader.arrived(), trackers)
                bar.advance(note=f"loss {self.losses.mean:.4f}" if self.losses.values else "")
                self.validate_if_due(trackers, epoch_ended=epoch_ended)
                if self.saver.is_due(self.position, epoch_ended):
                    self.save(trackers, partial(self.saver.after_step, self.position, epoch_ended))
                self.preview_if_due(trackers, epoch_ended=epoch_ended)
                if vote.decided(stop.requested):
                    break
            finished = self.position.step >= total
            self.save(trackers, partial(self.saver.at_end, self.position, finished=finished))
        if finished:
            self.previews.before_and_after()
        trackers.close()
        self.accelerator.end_training()
        return 0 if finished else EXIT_STOPPED

    def steps(self) -> Iterator[list[Batch]]:
        """The micro-batches of one optimizer step after the other, from the current position to the end of the run."""
        data, plan = self.options.data, self.plan
        pin = self.device.type == "cuda"
        workers, persistent = loading_processes(data), data.persistent_data_loader_workers
        with self.data.loader(workers=workers, persistent=persistent, pin_memory=pin) as loader:
            while self.position.step < plan.total_steps:
                epoch, first = self.position.epoch, self.position.batch
                self.trainables.epoch_started()
                own = share_of(self.data.plan_epoch(epoch + 1), self.rank, self.world)
                batches = loader.run(own[first:], step_of_first=self.position.step, accumulation=plan.accumulation)
                for group in plan.groups(first):
                    yield [next(batches) for _ in group]
                    if self.position.step >= plan.total_steps:
                        return

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

    def preview_if_due(self, trackers: Trackers, *, epoch_ended: bool) -> None:
        self.previews.if_due(
            self.models,
            self.trainables,
            trackers,
            self.position,
            epoch_ended=epoch_ended,
            weights=self.shown(),
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside it the trained weights are what is shown and saved; afterwards they are what they were, to the bit."""
        parameters = self.trainables.parameters() if self.optim.schedule_free else []
        kept = [p.detach().clone() for p in parameters]
        self.optim.eval_mode()
        with self.ema.swapped() if self.ema else nullcontext():
            yield
        self.optim.train_mode()
        with torch.no_grad():  # its way back rounds
            for parameter, value in zip(parameters, kept):
                parameter.copy_(value)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside it the model is what a user of the saved file sees: averaged weights, no dropout, full strength."""
        self.trainables.set_multiplier(1.0)
        was_training = self.trainables.module.training
        self.trainables.module.eval()
        with self.averaged():
            yield
        self.trainables.module.train(was_training)

    def report(self, reports: Sequence[StepReport], trackers: Trackers) -> None:
        for item in reports:
            self.losses.add(item.loss)
            values = {"loss/current": item.loss, "loss/average": self.losses.mean, "grad_norm": item.grad_norm}
            trackers.scalars({**values, **item.others}, item.step)

    # ---- validation -------------------------------------------------------------------------------------------------

    def validate_if_due(self, trackers: Trackers, *, epoch_ended: bool) -> None:
        train, step = self.options.train, self.position.step
        if not len(self.prepared.validation_plans):
            return
        by_step = train.validate_every_n_steps is not None and step % train.validate_every_n_steps == 0
        every_epochs = train.validate_every_n_epochs or (1 if train.validate_every_n_steps is None else None)
        by_epoch = epoch_ended and every_epochs is not None and self.position.epoch % every_epochs == 0
        if by_step or by_epoch or step == self.plan.total_steps:
            with self.shown():
                loss = self.validation_loss()
            trackers.scalars({"loss/validation": loss}, step)
            log.info(f"validation loss {loss:.5f} at step {step}")

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss over the validation pictures at fixed timesteps and with fixed noise: comparable between steps."""
        plans = self.prepared.validation_plans[: self.options.train.max_validation_steps]
        losses = []
        for index, plan in enumerate(plans):
            batch = self.data.load(plan, step=0).to(self.device)
            for value in self.objective.validation_t():
                generator = torch_generator(self.plan.seed, "validation", index, device=self.device)
                t = torch.full((batch.size,), value, device=self.device)
                losses.append(self.batch_loss(batch, generator, t))
        return torch.stack(losses).mean().item()
