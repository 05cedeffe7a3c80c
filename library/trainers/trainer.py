# SPDX-License-Identifier: Apache-2.0
"""The training loop of every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from library.device import fits
from library.errors import EXIT_STOPPED, ProcessDied, UserError, first_names
from library.io.checkpoint import require_present
from library.io.state import StateParts
from library.log import get_logger, progress
from library.options import dump_toml
from library.trainers.feed import Feed, Steps, steps_of
from library.trainers.guards import GradientWatch, MovingAverage, StepReader, StepReport
from library.trainers.out_of_memory import DoesNotFit
from library.trainers.saving import Saver
from library.trainers.settings import loading_processes
from library.trainers.signals import FailedElsewhere, OtherProcessDied, Vote, exchanging
from library.trainers.stages import Running, Start
from library.trainers.tracking import Trackers, open_trackers
from library.types import Batch

log = get_logger()


class Trainer:
    """The loop of one run."""

    def __init__(self, running: Running, start: Start) -> None:
        loaded = running.loaded
        checked, plan = loaded.scheduled.checked, loaded.scheduled.plan
        self.running, self.loaded, self.checked, self.plan = running, loaded, checked, plan
        self.options, self.processes, self.stop = checked.options, checked.processes, checked.stop
        self.position = start.position
        self.losses = MovingAverage(plan.steps_per_epoch, start.losses)
        self.watch: GradientWatch | None = GradientWatch(running.trainables.modules)
        # a schedule that follows the loss must see every loss at its step, or the run would depend on timing
        self.reader = StepReader(lag=0 if running.updates.scheduler.needs_loss else 4)
        self.saver = Saver(
            self.options, plan, active=self.processes.is_main, write_model=self.write_model, state=self.state_parts,
            extension=checked.method.extension, side_endings=checked.family.sheet.side_endings,
        )  # fmt: skip

    # ---- one step ---------------------------------------------------------------------------------------------------

    def train_step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step over its micro-batches."""
        step = self.position.step
        average = self.losses.mean if self.running.updates.scheduler.needs_loss else None
        found = self.running.step.take(batches, step, average)
        names = [name for batch in batches for name in batch.names]
        self.reader.push(
            step + 1, found.loss, found.grad_norm, names, own_loss=found.own_loss,
            scaler_skips=self.processes.accelerator.scaler is not None, others=found.others,
        )  # fmt: skip

    # ---- states and files -------------------------------------------------------------------------------------------

    def state_parts(self) -> StateParts:
        """Everything that the rest of the run depends on, complete in the main process. Collective."""
        self.running.memory.home()
        parts = StateParts(
            **self.running.updates.states(),
            step=self.position.step,
            epoch=self.position.epoch,
            batch=self.position.batch,
            losses=list(self.losses.values),
            fingerprint=self.loaded.scheduled.identity.fingerprint(),
        )
        return self.running.port.gather(parts)

    def write_model(self, path: Path) -> None:
        """Write the trained weights (their moving average, if there is one) with metadata.

        Collective: all processes gather the weights, the main one writes.
        """
        trainables = self.running.trainables
        self.running.memory.home()
        modules = [trainables.module, *trainables.read_by_save()]
        with self.running.updates.averaged(), self.running.port.whole(modules):
            if self.processes.is_main:
                require_present(dict(trainables.module.named_parameters()), path)
                trainables.write(path, self.metadata(), self.position)

    def metadata(self) -> dict[str, str]:
        """The metadata of a save after the current step."""
        trainables, optimizer = self.running.trainables, self.running.updates.optim.name_for_metadata
        return self.running.record.metadata(
            trainables.kind, trainables.facts, optimizer, step=self.position.step, epoch=self.position.epoch
        )

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> int:
        """Train until the end or until the run is asked to stop. Returns the exit code."""
        self.stop.check()
        self.stop.interrupts = False  # from here on the step is finished and the state saved
        with self.stop.installed():
            trackers = open_trackers(
                self.options.logging, main_process=self.processes.is_main, project=self.checked.method.project
            )
            if self.options.logging.log_config:
                trackers.text("config", dump_toml(self.options))
            self.saver.write_config(self.options)
            self.preview_if_due(trackers, epoch_ended=False)
            with closing(Feed(self.steps(), processes=self.processes.world)) as feed:
                failure = self.take_steps(feed, trackers)
            finished = failure is None and self.position.step >= self.plan.total_steps
            self.save_at_end(trackers, failure, finished=finished)
            self.stop.code_of_run = 0 if finished else EXIT_STOPPED
            if finished:
                self.loaded.previews.before_and_after()
            trackers.close()
            self.processes.accelerator.end_training()  # no process has anything under way: see `save`
            return self.stop.code_of_run

    def take_steps(self, feed: Feed, trackers: Trackers) -> Exception | None:
        """Train until the end, until asked to stop, or until the run cannot continue; in that case return the reason.

        In every case the weights are those after the last counted step.
        """
        vote = Vote(self.processes.device, processes=self.processes.world)
        if vote.at_once(feed.failure is not None):
            return feed.failure or UserError("another process cannot load its pictures")
        started: int | None = None
        failure: Exception | None = None  # of this process; all stop one step later
        with progress(self.plan.total_steps, "steps", "step", start=self.position.step) as bar:
            for batches in feed:
                if started != self.position.epoch:
                    started = self.position.epoch
                    self.running.trainables.epoch_started()
                try:
                    with exchanging(self.processes.world):
                        self.train_step(batches)
                        failure = self.after_training_step(bar, trackers) or failure or feed.failure
                        stops = self.stop.requested or failure is not None
                        stops, saves_state = vote.decided(stops, self.saver.state_is_due())
                        if stops:
                            return failure
                        if saves_state:
                            self.save(trackers, partial(self.saver.state_now, self.position))
                except (DoesNotFit, OtherProcessDied) as error:
                    return error
        return feed.failure

    def after_training_step(self, bar: progress, trackers: Trackers) -> Exception | None:
        """Everything after a step: numbers, validation, saves, previews. Returns an error after which a state can still
        be saved."""
        failure = None
        if (peak_check := self.loaded.scheduled.peak_check) is not None:
            peak_check.step_taken()
        epoch_ended = self.advance()
        self.report(self.reader.arrived(), trackers)
        bar.advance(note=f"loss {self.losses.mean:.4f}" if self.losses.values else "")
        try:
            self.validate_if_due(trackers, epoch_ended=epoch_ended)
        except ProcessDied:
            raise
        except FailedElsewhere:
            pass  # that process stops all
        except Exception as error:
            failure = error
        if self.saver.is_due(self.position, epoch_ended):
            self.save(trackers, partial(self.saver.after_step, self.position, epoch_ended))
        self.preview_if_due(trackers, epoch_ended=epoch_ended)
        return failure

    def steps(self) -> Steps:
        """The micro-batches of each optimizer step, from the current position to the end of the run."""
        loader = self.loaded.data.loader(
            workers=loading_processes(self.options.data), pin_memory=self.running.memory.pinning.works()
        )
        return steps_of(
            self.loaded.data, loader, self.plan, self.position, rank=self.processes.rank, world=self.processes.world
        )  # fmt: skip

    def advance(self) -> bool:
        """Count the step. Returns whether it was the last of its epoch."""
        epoch, self.position = self.position.epoch, self.plan.after(self.position)
        return self.position.epoch > epoch

    def save(self, trackers: Trackers, write: Callable[[], None]) -> None:
        """Read all outstanding numbers (StopTraining if one is not finite), then write."""
        self.report(self.reader.flush(), trackers)
        if self.watch is not None:
            silent, self.watch = self.watch.stop(), None
            if silent and self.position.step > 0:
                log.warning(f"{len(silent)} trainable modules never received a gradient: {first_names(silent)}")
        write()
        self.processes.accelerator.wait_for_everyone()

    def save_at_end(self, trackers: Trackers, failure: Exception | None, *, finished: bool) -> None:
        """Save the result, or the state of a run that ends early. Raises `failure`, if given, after the save."""
        write = partial(self.saver.at_end, self.position, finished=finished)
        if failure is None:
            return self.save(trackers, write)
        try:
            if isinstance(failure, OtherProcessDied):  # no barrier: a process is gone
                self.report(self.reader.flush(), trackers)
                with exchanging(self.processes.world):
                    write()
            else:
                self.save(trackers, write)
        except UserError as error:
            log.warning(f"the state could not be saved: {'; '.join(error.problems)}")
        if not self.processes.is_main:  # only this process knows its own failure
            log.error(f"process {self.processes.rank}: {failure}")
        raise failure

    def preview_if_due(self, trackers: Trackers, *, epoch_ended: bool) -> None:
        self.loaded.previews.if_due(
            self.loaded.models,
            self.running.trainables,
            trackers,
            self.position,
            epoch_ended=epoch_ended,
            weights=self.running.updates.shown(),
        )

    def report(self, reports: Sequence[StepReport], trackers: Trackers) -> None:
        for item in reports:
            self.losses.add(item.loss)
            values = {"loss/current": item.loss, "loss/average": self.losses.mean, "grad_norm": item.grad_norm}
            trackers.scalars({**values, **item.others}, item.step)

    def validate_if_due(self, trackers: Trackers, *, epoch_ended: bool) -> None:
        step = self.position.step
        validation = self.running.validation
        if validation.is_due(step, self.position.epoch, epoch_ended=epoch_ended):
            losses: list[float | None] = []
            with self.running.updates.shown():
                fitted = fits(lambda: losses.append(validation.loss()))
            if not fitted:
                log.warning(f"no validation loss at step {step}: out of memory; the training goes on")
            elif (loss := losses[0]) is not None:
                trackers.scalars({"loss/validation": loss}, step)
                log.info(f"validation loss {loss:.5f} at step {step}")
