# SPDX-License-Identifier: Apache-2.0
"""The previews of a run: when they are made, where they are shown, and the before-and-after sheet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from library.data.encoding import TextSource
from library.errors import ProcessDied
from library.families.family import ModelFamily
from library.io.atomic import atomic_write
from library.learning import Models, Trainables
from library.log import get_logger
from library.objectives.base import Objective
from library.sampling.preview import Preview, Previewer, PreviewModels, contact_sheet, due
from library.sampling.prompts import Prompt
from library.trainers.options import TrainerOptions
from library.trainers.signals import Passes
from library.trainers.tracking import Trackers
from library.types import Position

log = get_logger()


class Previews:
    """The previews of one run; does nothing if none are wanted, or on other processes."""

    def __init__(
        self, family: ModelFamily, objective: Objective, options: TrainerOptions, prompts: tuple[Prompt, ...], *,
        device: torch.device, dtype: torch.dtype, seed: int, active: bool, writes: bool,
        size: tuple[int, int], texts: TextSource | None, conditioned: bool = False, passes: Passes,
    ) -> None:  # fmt: skip
        """active: whether this process makes previews. writes: whether it also writes them: if weights are split over
        processes, all make them and one writes."""
        self.writes, self.passes = writes, passes
        self.options, self.device, self.dtype = options.sample, device, dtype
        self.name, self.folder = options.save.output_name or "last", Path(options.save.output_dir or ".") / "sample"
        self.first: list[Preview] = []
        self.latest: list[Preview] = []
        self.previewer = (
            Previewer(
                family, objective, prompts, output_dir=options.save.output_dir or ".", seed=seed,
                output_name=options.save.output_name, sampler=options.sample.sample_sampler, default_size=size,
                texts=texts, conditioned=conditioned, stopped=passes.stopped, writes=writes,
                all_or_none=passes.all_or_none,
            )
            if prompts and active
            else None
        )  # fmt: skip

    def if_due(
        self, models: Models, trainables: Trainables, trackers: Trackers, position: Position, *,
        epoch_ended: bool, weights: AbstractContextManager[None],
    ) -> None:  # fmt: skip
        """Make previews if they are due after `position.step` steps.

        weights: context in which the model has the weights to show.
        """
        epoch_end = position.epoch if epoch_ended and self.options.every_n_epochs else None
        if self.previewer is None or not due(self.options, position.step, epoch_end) or self.passes.stopped():
            return
        assert models.vae is not None
        home = next(models.vae.parameters()).device  # main memory, where latents are cached
        pictures: list[Preview] = []
        with weights, harmless("preview"):
            with self.passes.all_or_none():
                models.vae.to(self.device)
            shown = PreviewModels(
                models.denoiser, models.vae, models.encoders, [trainables.module], trainables.set_condition
            )
            pictures = self.previewer.render(
                shown, step=position.step, epoch=epoch_end, device=self.device, dtype=self.dtype
            )
        models.vae.to(home)
        with harmless("log of the previews"):
            for index, picture in enumerate(pictures):
                trackers.picture(f"preview/{index:02d} {picture.prompt.prompt[:60]}", picture.image, position.step)
        if position.step == 0:
            self.first = pictures
        self.latest = pictures

    def before_and_after(self) -> None:
        """Write one sheet with the previews of step 0 above the newest ones, if both exist."""
        if not self.writes or not self.first or len(self.first) != len(self.latest) or self.first is self.latest:
            return
        images = [p.image for p in (*self.first, *self.latest)]
        labels = [
            f"{when}: {p.prompt.prompt}" for when, row in (("before", self.first), ("after", self.latest)) for p in row
        ]
        path = self.folder / f"{self.name}_before_after.png"
        with harmless("sheet of before and after"):
            sheet = contact_sheet(images, labels, columns=len(self.first))
            atomic_write(path, lambda temp: sheet.save(temp, format="PNG"))
            log.info(f"before and after: {path}")


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """Turn any exception inside into one warning: a preview must not end the training, unless a process has died."""
    try:
        yield
    except ProcessDied:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        log.warning(f"{what} failed, the training goes on: {type(error).__name__}: {reason}")
