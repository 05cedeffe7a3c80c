# SPDX-License-Identifier: Apache-2.0
"""The training loop: there is no other. A method says which weights learn and what is saved (the four override points)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.device import DTYPES, free_memory, make_accelerator, seed_everything
from library.errors import UserError
from library.io.state import StateParts
from library.log import get_logger, progress
from library.models.family import ModelFamily
from library.optim.ema import EMA
from library.optim.optimizers import build_optimizer
from library.optim.schedulers import build_scheduler
from library.rng import derive_seed, torch_generator
from library.trainers.guards import MovingAverage, StepReader, StepReport
from library.trainers.options import TrainerOptions
from library.trainers.plan import Position, make_plan, share_of
from library.trainers.preparation import Preparation, fill_latent_cache, fill_text_cache
from library.trainers.previews import Previews
from library.trainers.saving import Saver
from library.trainers.settings import compute_dtype, distributed_settings, trained_dtype
from library.trainers.signals import StopRequest
from library.trainers.tracking import open_trackers
from library.trainers.trainables import GradientWatch, Models, StepModule, Trainables
from library.types import Batch, Noised

EXIT_STOPPED = 3

log = get_logger()


class Trainer(ABC):
    """One run. `family` knows the architecture, `options` what the user wants."""

    def __init__(self, family: ModelFamily, options: TrainerOptions) -> None:
        self.family = family
        self.options = options
        self.position = Position()
        self.metrics: dict[str, float] = {}

    # ---- override points, and no others -----------------------------------------------------------------------------

    @abstractmethod
    def build_trainables(self) -> Trainables:
        """Attach or choose what learns; everything else is frozen already."""

    def after_step(self) -> dict[str, float]:
        """After an optimizer step: what a method still does to its weights, and numbers for the log."""
        return {}

    @abstractmethod
    def save_model(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the trained weights to `path` (a temporary name: the caller renames it when it is whole)."""

    @abstractmethod
    def metadata(self) -> dict[str, Any]:
        """What the file's metadata says of the method (network module, rank ...)."""

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Exit code 0, or EXIT_STOPPED after Ctrl-C / SIGTERM. Raises UserError and StopTraining."""
        self.prepared = Preparation.of(self.family, self.options)  # all that can be found wrong before a model is read
        self.start_processes()
        self.make_plan()
        self.load_models()
        self.trainables = self.build_trainables()
        self.build_optimizer()
        self.restore()
        return self.train()

    def start_processes(self) -> None:
        options = self.options
        self.accelerator = make_accelerator(options.precision.mixed_precision, distributed_settings(options.distributed))
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main_process = self.accelerator.is_main_process
        self.dtype = compute_dtype(options.precision)

    def make_plan(self) -> None:
        train = self.options.train
        self.data = self.prepared.data
        self.plan = make_plan(
            total_batches=len(self.data.plan_epoch(0)),
            num_processes=self.world,
            accumulation=train.gradient_accumulation_steps,
            max_steps=train.max_train_steps,
            max_epochs=train.max_train_epochs,
            seed=self.prepared.seed,
        )
        self.data.total_steps = self.plan.total_steps
        for line in self.prepared.describe(self.plan):
            log.info(line)

    def load_models(self) -> None:
        """Fill the caches, then load what the steps need; each model is freed as soon as it has no more work."""
        family, cache = self.family, self.options.cache
        previews = self.prepared.prompts
        encoders: list[torch.nn.Module] = []
        if not cache.cache_text_encoder_outputs or previews or self.prepared.texts_missing():
            encoders = family.load_text_encoders(self.dtype, self.device)
        if cache.cache_text_encoder_outputs:
            fill_text_cache(self.prepared, family, encoders, self.rank, self.world)
        vae = None
        if not cache.cache_latents or previews or self.prepared.latents_missing():
            vae = family.load_vae(self.dtype, self.device)
        if cache.cache_latents:
            fill_latent_cache(self.prepared, family, vae, self.device, self.rank, self.world)
        self.accelerator.wait_for_everyone()
        self.objective = family.objective(self.options.objective, self.options.loss)
        self.previews = Previews(self.prepared, family, self.objective, self.options, self.device)
        if cache.cache_text_encoder_outputs and encoders:
            self.previews.prepare(encoders)
            encoders = []
        if cache.cache_latents and vae is not None:
            vae = vae.to("cpu") if previews else None
        free_memory()
        self.models = Models(family.load_denoiser(self.dtype, self.device), encoders, vae)
        for module in self.models.all():
            module.requires_grad_(False)

    def build_optimizer(self) -> None:
        options = self.options
        module = StepModule(self.family, self.models, self.trainables)
        self.trainables.module.to(self.device, trained_dtype(options.precision))
        if options.precision.gradient_checkpointing:
            self.family.enable_checkpointing(self.models.denoiser, self.models.encoders if self.trainables.trains_text else [])
        if options.precision.torch_compile:
            for block in self.family.blocks(self.models.denoiser):
                block.compile(backend=options.precision.dynamo_backend)
        self.optim = build_optimizer(options.optimizer, self.trainables.groups)
        self.model, self.optimizer = self.accelerator.prepare(module, self.optim.optimizer)
        self.scheduler = build_scheduler(options.scheduler, self.optim, total_steps=self.plan.total_steps)
        self.ema = EMA(self.trainables.parameters(), options.train.ema_decay) if options.train.ema_decay else None
        self.saver = Saver(self)
        self.watch = GradientWatch(self.trainables.module)
        self.losses = MovingAverage(self.plan.steps_per_epoch)
        self.reader = StepReader()

    # ---- resume -----------------------------------------------------------------------------------------------------

    def state_parts(self) -> StateParts:
        """Everything that the rest of the run depends on."""
        scaler = self.accelerator.scaler
        return StateParts(
            weights=self.trainables.state(),
            optimizer=self.optim.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            scaler=scaler.state_dict() if scaler is not None else None,
            ema=self.ema.state() if self.ema else None,
            step=self.position.step,
            epoch=self.position.epoch,
            batch=self.position.batch,
            losses=list(self.losses.values),
            fingerprint=self.prepared.fingerprint(self.plan),
        )

    def restore(self) -> None:
        """--resume, --initial_step or --initial_epoch."""
        parts, state = self.prepared.resume_from, self.options.state
        if parts is not None:
            self.trainables.load(parts.weights)
            self.optim.optimizer.load_state_dict(parts.optimizer)
            self.scheduler.load_state_dict(parts.scheduler)
            if self.accelerator.scaler is not None and parts.scaler is not None:
                self.accelerator.scaler.load_state_dict(parts.scaler)
            if self.ema and parts.ema is not None:
                self.ema.load(parts.ema)
            self.position = Position(parts.step, parts.epoch, parts.batch)
            self.losses = MovingAverage(self.plan.steps_per_epoch, parts.losses)
            log.info(f"resumed at step {parts.step} of {self.plan.total_steps}, epoch {parts.epoch + 1}, batch {parts.batch}")
        elif state.initial_step or state.initial_epoch:
            step = state.initial_step or ((state.initial_epoch or 1) - 1) * self.plan.steps_per_epoch
            self.position = self.plan.position_of(step)
            for _ in range(step):
                self.scheduler.step()
        if self.position.step >= self.plan.total_steps:
            raise UserError(
                f"the run starts at step {self.position.step} and ends at step {self.plan.total_steps}: nothing is left to train. "
                "Raise --max_train_steps or --max_train_epochs"
            )

    # ---- one step ---------------------------------------------------------------------------------------------------

    def train_step(self, batches: Sequence[Batch], first_micro_step: int) -> Tensor:
        """One optimizer step over its micro-batches. Returns the mean loss, still on the device."""
        total = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            with self.gradient_sync(is_last=index == len(batches) - 1):
                generator = torch_generator(self.plan.seed, "noise", first_micro_step + index, self.rank, device=self.device)
                seed_everything(derive_seed(self.plan.seed, "dropout", first_micro_step + index, self.rank))
                loss = self.batch_loss(batch.to(self.device), generator) / len(batches)
                self.accelerator.backward(loss)
            total += loss.detach()
        grad_norm = self.clip_gradients()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=False)
        if self.ema:
            self.ema.update(self.position.step)
        self.metrics = self.after_step()
        names = [name for batch in batches for name in batch.names]
        self.reader.push(
            self.position.step + 1, total, grad_norm, names, scaler_skips=self.accelerator.scaler is not None
        )
        return total

    def batch_loss(self, batch: Batch, generator: torch.Generator, t: Tensor | None = None) -> Tensor:
        """Steps 2 to 7 of docs/architecture.md: the mean loss of one micro-batch. `t` is fixed in validation."""
        latents = self.latents_of(batch)
        t = self.objective.sample_t(batch.size, generator, self.device) if t is None else t
        noised = self.objective.noise(latents, t, generator)
        self.trainables.set_multiplier(batch.network_multiplier)
        pred = self.predict(noised, batch)
        if any(batch.keep_prior):
            noised = self.with_prior_target(noised, batch)
        return self.objective.loss(pred.float(), noised, batch).mean()

    def latents_of(self, batch: Batch) -> Tensor:
        if batch.latents is not None:
            return batch.latents.float()
        assert batch.pixels is not None and self.models.vae is not None
        with torch.no_grad():
            return self.family.encode_image(self.models.vae, batch.pixels, batch.latent_seeds).float()

    def predict(self, noised: Noised, batch: Batch) -> Tensor:
        tokens = None if batch.cond is not None else self.family.tokenize(batch.captions)
        offload = self.options.precision.cpu_offload_checkpointing and torch.is_grad_enabled()
        with torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda") if offload else nullcontext():
            return self.model(noised.x_t, noised.t, batch, tokens)

    def with_prior_target(self, noised: Noised, batch: Batch) -> Noised:
        """custom_attributes.diff_output_preservation: these samples learn what the untrained model says."""
        with torch.no_grad(), self.trainables.base_model():
            prior = self.predict(noised, batch).float()
        keep = torch.tensor(batch.keep_prior, device=self.device).view(-1, 1, 1, 1)
        return replace(noised, target=torch.where(keep, prior, noised.target))

    def gradient_sync(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Processes exchange gradients only in the last micro-batch of a step."""
        return nullcontext() if is_last else self.accelerator.no_sync(self.model)

    def clip_gradients(self) -> Tensor:
        """The gradient norm before clipping, on the device."""
        limit = self.options.optimizer.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.trainables.parameters(), limit if limit > 0 else float("inf"))
        return torch.as_tensor(norm if norm is not None else 0.0, device=self.device)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> int:
        trackers = open_trackers(self.options.logging, main_process=self.main_process, project="network_train")
        self.saver.log_config(trackers)
        self.previews.at_start(self.models, trackers, self.position)
        first, total = self.position.step, self.plan.total_steps
        with StopRequest() as stop, progress(total, "steps", start=first) as bar:
            for batches in self.steps():
                self.optim.train_mode()
                self.train_step(batches, self.plan.micro_step(self.position.epoch, self.position.batch))
                epoch_ended = self.advance(len(batches))
                self.report(self.reader.arrived(), trackers)
                bar.advance(note=f"loss {self.losses.mean:.4f}" if self.losses.values else "")
                self.optim.eval_mode()
                self.previews.if_due(self.models, trackers, self.position, epoch_ended, self.averaged())
                self.validate_if_due(trackers, epoch_ended)
                self.saver.if_due(epoch_ended, trackers)
                if stop.requested:
                    break
        self.report(self.reader.flush(), trackers)
        finished = self.position.step >= total
        self.optim.eval_mode()
        self.saver.at_end(finished=finished)
        if finished:
            self.previews.at_end(self.position)
        trackers.close()
        self.accelerator.end_training()
        return 0 if finished else EXIT_STOPPED

    def steps(self) -> Iterator[list[Batch]]:
        """The micro-batches of one optimizer step after the other, from the current position to the end of the run."""
        data, plan = self.options.data, self.plan
        while self.position.step < plan.total_steps:
            epoch, first = self.position.epoch, self.position.batch
            shared = self.data.plan_epoch(epoch)
            plans = [shared[i] for i in share_of(range(len(shared)), self.rank, self.world)]
            loader = self.data.loader(
                plans[first:],
                workers=data.max_data_loader_n_workers,
                steps=[self.position.step + i // plan.accumulation for i in range(len(plans) - first)],
                pin_memory=self.device.type == "cuda",
            )
            for group in plan.groups(first):
                yield [next(loader) for _ in group]
                if self.position.step >= plan.total_steps:
                    break
            loader.close()

    def advance(self, micro_batches: int) -> bool:
        """Count the step. True when it was the last of its epoch."""
        epoch, batch = self.position.epoch, self.position.batch + micro_batches
        ended = batch >= self.plan.batches_per_epoch
        self.position = Position(self.position.step + 1, epoch + 1 if ended else epoch, 0 if ended else batch)
        return ended

    def averaged(self) -> AbstractContextManager[Any]:
        """Inside it the trained weights are their moving average, if there is one."""
        return self.ema.swapped() if self.ema else nullcontext()

    def report(self, reports: Sequence[StepReport], trackers: Any) -> None:
        for item in reports:
            self.losses.add(item.loss)
            rates = {f"lr/{g.get('name', i)}": g["lr"] for i, g in enumerate(self.optim.optimizer.param_groups)}
            values = {"loss/current": item.loss, "loss/average": self.losses.mean, "grad_norm": item.grad_norm}
            trackers.scalars({**values, **rates, **self.metrics}, item.step)

    # ---- validation -------------------------------------------------------------------------------------------------

    def validate_if_due(self, trackers: Any, epoch_ended: bool) -> None:
        train = self.options.train
        plans = self.prepared.validation_plans
        if not plans:
            return
        every_steps = train.validate_every_n_steps
        by_step = every_steps is not None and self.position.step % every_steps == 0
        by_epoch = epoch_ended and every_steps is None and self.position.epoch % (train.validate_every_n_epochs or 1) == 0
        if by_step or by_epoch or self.position.step == self.plan.total_steps:
            with self.averaged():
                loss = self.validation_loss()
            trackers.scalars({"loss/validation": loss}, self.position.step)
            log.info(f"validation loss {loss:.5f} at step {self.position.step}")

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
