# SPDX-License-Identifier: Apache-2.0
"""Training curves: TensorBoard files and, if asked for, wandb. Only rank 0 writes."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from library.byte_paths import plain_path
from library.errors import UserError, raise_problems, unknown, unknown_names
from library.log import get_logger
from library.text_files import read_toml
from library.trainers.options import LoggingOptions
from library.values import MOST, between, convert, text_problem

if TYPE_CHECKING:
    from PIL.Image import Image

KINDS = ("tensorboard", "wandb")
OF_TENSORBOARD: dict[str, type] = {  # arguments of its SummaryWriter
    "log_dir": str, "comment": str, "purge_step": int, "max_queue": int, "flush_secs": int, "filename_suffix": str,
}  # fmt: skip
STEP = "global_step"  # name of the step among wandb's values

log = get_logger()
ExceptHook = Callable[[threading.ExceptHookArgs], object]


class Tracker(Protocol):
    """A program that shows curves and pictures."""

    where: str  # for a message: the option and the folder

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...
    def picture(self, name: str, image: Image, step: int) -> None: ...
    def text(self, name: str, value: str) -> None: ...
    def close(self) -> None: ...


class TensorBoardTracker:
    """Event files in one folder. `settings`: further arguments of SummaryWriter."""

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.where = f"--logging_dir: {folder}"
        threading.excepthook = _without_tensorboard(threading.excepthook)
        self._links = ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        path = self._links.enter_context(plain_path(folder))
        self.writer = SummaryWriter(**{"log_dir": path, **settings})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, name: str, image: Image, step: int) -> None:
        import numpy as np

        self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def text(self, name: str, value: str) -> None:
        self.writer.add_text(name, value)

    def close(self) -> None:
        self.writer.close()
        self._links.close()


class WandbTracker:
    """A run of the wandb service. `settings`: further arguments of wandb.init.

    The step is logged as a value: numbers of a step arrive after the pictures of a later one, and wandb's own counter
    drops late values.
    """

    def __init__(
        self, project: str, run_name: str | None, folder: Path | None, key: str | None, settings: Mapping[str, object]
    ):
        import wandb

        self.where = "--log_with wandb"
        if key:
            wandb.login(key=key)
        self.wandb = wandb
        where = str(folder) if folder else None
        self.run = wandb.init(**{"project": project, "name": run_name, "dir": where, **settings})
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({**values, STEP: step})

    def picture(self, name: str, image: Image, step: int) -> None:
        self.run.log({name: self.wandb.Image(image), STEP: step})

    def text(self, name: str, value: str) -> None:
        self.run.config.update({name: value})

    def close(self) -> None:
        self.run.finish()


class Trackers:
    """The trackers of the run; none on ranks other than 0, or without --logging_dir / --log_with.

    A tracker that fails (full disk, network) is removed with one warning: logging must not end a training.
    """

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.scalars(values, step))

    def picture(self, name: str, image: Image, step: int) -> None:
        self._each(lambda tracker: tracker.picture(name, image, step))

    def text(self, name: str, value: str) -> None:
        self._each(lambda tracker: tracker.text(name, value))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                action(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                log.warning(no_more_curves(tracker.where, error))


def no_more_curves(where: str, error: Exception) -> str:
    """The warning for a log that cannot be written."""
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return f"{where}: {reason}: no more curves are written, the training goes on"


def _without_tensorboard(previous: ExceptHook) -> ExceptHook:
    """An exception hook that ignores errors of TensorBoard's threads, which its next call raises again."""

    def hook(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            previous(args)

    return hook


def check_trackers(options: LoggingOptions) -> None:
    """Check that the logging packages are installed and their settings are valid. Raises UserError."""
    if options.log_with in ("wandb", "all") and importlib.util.find_spec("wandb") is None:
        raise UserError(f"--log_with {options.log_with}: the package is not installed: pip install wandb")
    if options.logging_dir and options.log_with != "wandb" and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--logging_dir: the package is not installed: pip install tensorboard")
    if options.logging_dir:
        try:
            Path(options.logging_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--logging_dir: {options.logging_dir} cannot be made or used: {reason}") from None
    tracker_settings(options)
    unused = [f"--{name}" for name in needs_log(options) if getattr(options, name)]
    if unused:
        needed = "--log_with wandb" if options.logging_dir else "--logging_dir or --log_with wandb"
        log.warning(f"{', '.join(unused)}: no effect without {needed}")


def needs_log(options: LoggingOptions) -> tuple[str, ...]:
    """Names of the logging options that have no effect in this run.

    The name of the wandb run is not among them: graphical programs always give it.
    """
    if options.log_with in ("wandb", "all"):
        return ()
    if options.logging_dir:
        return ("wandb_api_key",)
    return ("log_prefix", "log_tracker_name", "log_tracker_config", "log_config", "wandb_api_key")


def tracker_settings(options: LoggingOptions) -> dict[str, dict[str, object]]:
    """--log_tracker_config: arguments under [tensorboard] and [wandb]. Raises UserError."""
    if not options.log_tracker_config:
        return {}
    settings = read_toml(Path(options.log_tracker_config), "--log_tracker_config")
    where = f"--log_tracker_config: {options.log_tracker_config}"
    wrong = [unknown(where, key, KINDS, kind="table") for key in settings if key not in KINDS]
    wrong += [
        f"{where}: {key} expects a table: [{key}]" for key in KINDS if not isinstance(settings.get(key, {}), dict)
    ]
    wrong = wrong or [f"{where}: [tensorboard] {line}" for line in _tensorboard_problems(settings)]
    raise_problems(wrong)
    return settings


def _tensorboard_problems(settings: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    """Problems of the arguments under [tensorboard]. Those under [wandb] are checked by wandb."""
    given = settings.get("tensorboard", {})
    yield from unknown_names("arguments", [key for key in given if key not in OF_TENSORBOARD], OF_TENSORBOARD)
    for key, kind in OF_TENSORBOARD.items():
        if key not in given:
            continue
        try:
            value = convert(given[key], kind)
        except ValueError as error:
            yield f"{key} {error}"
        else:
            wrong = text_problem(value, path=True) if kind is str else between(0, MOST)(value)
            if wrong:
                yield f"{key} {wrong}"


def open_trackers(options: LoggingOptions, *, main_process: bool, project: str) -> Trackers:
    """Open the trackers of the run. The log folder is `<logging_dir>/<log_prefix><time>`, as in sd-scripts."""
    if not main_process or (options.logging_dir is None and options.log_with is None):
        return Trackers([])
    kind = options.log_with or "tensorboard"
    name = options.log_tracker_name or project
    folder = (
        Path(options.logging_dir) / f"{options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
        if options.logging_dir
        else None
    )
    settings = tracker_settings(options)
    makers: list[tuple[str, Callable[[], Tracker]]] = []
    if kind in ("tensorboard", "all") and folder is not None:
        own = settings.get("tensorboard", {})
        makers.append((f"--logging_dir: {folder}", partial(TensorBoardTracker, folder / name, own)))
    if kind in ("wandb", "all"):
        key, own = options.wandb_api_key, settings.get("wandb", {})
        makers.append(("--log_with wandb", partial(WandbTracker, name, options.wandb_run_name, folder, key, own)))
    trackers: list[Tracker] = []
    for where, make in makers:
        try:
            trackers.append(make())
        except Exception as error:  # wandb raises its own classes: no network, unknown key, wrong argument
            log.warning(no_more_curves(where, error))
    return Trackers(trackers)
