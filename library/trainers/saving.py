# SPDX-License-Identifier: Apache-2.0
"""Saves: when they are written and under which names, which older ones are removed, and what is uploaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from library.io import checkpoint as names
from library.io.atomic import atomic_write, saving
from library.io.hub import Uploader
from library.io.state import StateParts, save_state
from library.log import get_logger
from library.options import dump_toml
from library.trainers.options import TrainerOptions
from library.trainers.run_plan import RunPlan
from library.types import Position

log = get_logger()
NameOf = Callable[[str | None, int], str]  # (--output_name, number of a step or an epoch) -> name of a save


class Saver:
    """The saves of one run. All processes must call its methods; only the main one writes.

    `write_model(path)` and `state()` belong to the trainer. They are called in all processes, because they gather
    weights that are split over processes.
    """

    def __init__(
        self, options: TrainerOptions, plan: RunPlan, *, active: bool,
        write_model: Callable[[Path], None], state: Callable[[], StateParts], extension: str,
        side_endings: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """extension: of the saves; empty if each is a folder.

        side_endings: appended to the stem for further files that `write_model` may write next to its path.
        """
        self.save, self.options, self.plan, self.active = options.save, options.state, plan, active
        self.folder = Path(options.save.output_dir or ".")
        self.extension = extension
        self.every_epochs = names.epochs_between_saves(options.save, plan.total_epochs)
        self.write_model, self.state, self.endings = write_model, state, ("", *side_endings)
        self.uploads_states = options.hub.save_state_to_huggingface
        self.uploader = Uploader(options.hub) if active and options.hub.huggingface_repo_id else None
        self.written: list[Path] = []
        self.state_at = time.monotonic()  # when the last state was written, or the run began
        self.last_state: str | None = None  # its name
        self.between: str | None = None  # name of the last state written by `state_now`

    def make_folder(self) -> None:
        """Recreate the output folder if it was removed during the run."""
        if self.active and not self.folder.is_dir():
            with saving(self.folder, 0):
                self.folder.mkdir(parents=True)
            log.warning(f"--output_dir: {self.folder} was removed during the run and is made again")

    def write_config(self, options: TrainerOptions) -> None:
        """Write the resolved options beside the output, as a --config_file that repeats the run."""
        if self.active:
            path = self.folder / f"{names.last_name(self.save.output_name)}.config.toml"
            text = dump_toml(options)
            atomic_write(path, lambda temp: temp.write_text(text, encoding="utf-8"))

    def is_due(self, position: Position, epoch_ended: bool) -> bool:
        """Whether this step or epoch ends with a save; the last step is saved by `at_end`."""
        if position.step >= self.plan.total_steps:
            return False
        by_epoch = epoch_ended and names.saves_after_epoch(
            position.epoch, total=self.plan.total_epochs, every=self.every_epochs
        )
        return by_epoch or names.saves_after_step(position.step, every=self.save.save_every_n_steps)

    def after_step(self, position: Position, epoch_ended: bool) -> None:
        """Write the saves that are due after an optimizer step."""
        self.make_folder()
        step, epoch = position.step, position.epoch
        keep_epochs, keep_steps = names.states_to_keep(self.save, self.options)
        if names.saves_after_step(step, every=self.save.save_every_n_steps):
            outdated = partial(names.outdated_step, step, every=self.save.save_every_n_steps or 1)
            self._replace(names.step_name, step, outdated, self.save.save_last_n_steps, keep_steps)
        every_epochs = self.every_epochs
        if epoch_ended and names.saves_after_epoch(epoch, total=self.plan.total_epochs, every=every_epochs):
            assert every_epochs is not None
            outdated = partial(names.outdated_epoch, epoch, every=every_epochs)
            self._replace(names.epoch_name, epoch, outdated, self.save.save_last_n_epochs, keep_epochs)

    def _replace(
        self, name_of: NameOf, number: int, outdated: Callable[..., int | None], models: int | None, states: int | None
    ) -> None:
        """Write a save and remove outdated ones. models, states: how many of each are kept; None: all."""
        self._write(name_of(self.save.output_name, number), with_state=self.options.save_state)
        self._drop(name_of, outdated(keep=models), keep_model=False)
        self._drop(name_of, outdated(keep=states), keep_model=True)

    def state_is_due(self) -> bool:
        """Whether --save_state_every_minutes have passed since the last state."""
        minutes = self.options.save_state_every_minutes
        return minutes is not None and time.monotonic() - self.state_at >= 60 * minutes

    def state_now(self, position: Position) -> None:
        """Write a state between saves, replacing the previous one. A finished run needs none."""
        name = names.step_name(self.save.output_name, position.step)
        if position.step >= self.plan.total_steps or name == self.last_state:
            return
        self.make_folder()
        self._write_state(name)
        if self.between and self.active:
            names.remove_state(self.folder, names.state_name(self.between))
        self.between = name

    def at_end(self, position: Position, *, finished: bool) -> None:
        """Write the result of the run; for a stopped run also a state to continue from."""
        self.make_folder()
        name = self.save.output_name
        if finished:
            self._write(names.last_name(name), with_state=self.options.at_end)
        elif position.step > 0:
            stopped = names.step_name(name, position.step)
            self._write_state(stopped)
            self._write(stopped, with_state=False)
            state = self.folder / names.state_name(stopped)
            log.info(f"stopped at step {position.step}; continue with --resume {state}")
        if self.uploader:
            self.uploader.close()

    def _write(self, name: str, *, with_state: bool) -> None:
        paths = self._files(name)
        if self.uploader:
            for path in paths:
                self.uploader.release(path)
        self.write_model(paths[0])
        for path in paths if self.active else ():
            if path.exists():
                self._written(path, upload=True)
        if with_state:
            self._write_state(name)

    def _files(self, name: str) -> list[Path]:
        """The file or folder of a save, and the files that may accompany it."""
        return [self.folder / f"{name}{ending}{self.extension}" for ending in self.endings]

    def _write_state(self, name: str) -> None:
        folder = self.folder / names.state_name(name)
        if self.uploader:
            self.uploader.release(folder)
        state, self.state_at, self.last_state = self.state(), time.monotonic(), name
        if self.active:
            save_state(folder, state)
            self._written(folder, upload=self.uploads_states)

    def _written(self, path: Path, *, upload: bool) -> None:
        self.written.append(path)
        log.info(f"saved {path}")
        if self.uploader and upload:
            self.uploader.upload(path)

    def _drop(self, name_of: NameOf, number: int | None, *, keep_model: bool) -> None:
        """Remove an outdated save (`keep_model`: its state only)."""
        if number is None or not self.active:
            return
        name = name_of(self.save.output_name, number)
        if keep_model:
            names.remove_state(self.folder, names.state_name(name))
        else:
            for path in self._files(name):
                if self.uploader:
                    self.uploader.release(path)
                names.remove_save(self.folder, path.name)
