# SPDX-License-Identifier: Apache-2.0
"""Saves of the trained weights: names, retention, checks before the training, and writing."""

from __future__ import annotations

import pickle
import re
import uuid
from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.byte_paths import plain_path
from library.device import without_rounding
from library.errors import StopTraining, UserError, first_names, raise_problems
from library.io.atomic import SaveError, atomic_write, clean_leftovers, free_bytes, remove_folder
from library.io.metadata import tensor_hashes
from library.io.options import SaveOptions, StateOptions, name_problems
from library.io.tensor_file import check_safetensors, data_bytes, write_safetensors
from library.key_tables import LazyTensors
from library.log import get_logger

log = get_logger()

MODEL_INDEX = "model_index.json"  # in every diffusers folder

# ---- names --------------------------------------------------------------------------------------------------------


def last_name(output_name: str | None, extension: str = "") -> str:
    """Name of the final save: `name.safetensors`."""
    return f"{output_name or 'last'}{extension}"


def epoch_name(output_name: str | None, epoch: int, extension: str = "") -> str:
    """Name of the save after an epoch, counted from 1: `name-000001.safetensors`."""
    return f"{output_name or 'epoch'}-{epoch:06d}{extension}"


def step_name(output_name: str | None, step: int, extension: str = "") -> str:
    """Name of the save after an optimizer step: `name-step00000500.safetensors`."""
    return f"{output_name or 'at'}-step{step:08d}{extension}"


def state_name(save_name: str) -> str:
    """Name of a save's state folder: `state_name(epoch_name("a", 3))` is `a-000003-state`."""
    return f"{save_name}-state"


def is_save_of(name: str, output_name: str | None, extension: str) -> bool:
    """Whether a run with this --output_name may give one of its saves this name."""
    own = [re.escape(last_name(output_name)), f"{re.escape(output_name or 'epoch')}-[0-9]{{6,}}"]
    own.append(f"{re.escape(output_name or 'at')}-step[0-9]{{8,}}")
    return re.fullmatch(f"({'|'.join(own)}){re.escape(extension)}", name) is not None


# --save_model_as -> file extension; diffusers layouts are folders
EXTENSIONS = {"safetensors": ".safetensors", "ckpt": ".ckpt", "pt": ".pt", "diffusers": "", "diffusers_safetensors": ""}


@dataclass(frozen=True)
class CheckpointForm:
    """Form of a saved model. epochs and steps are recorded in a .ckpt."""

    kind: str = "safetensors"  # a key of EXTENSIONS
    epochs: int = 0
    steps: int = 0
    dtype: torch.dtype | None = None  # None: each weight keeps its own
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a .safetensors file

    @property
    def is_folder(self) -> bool:
        return not EXTENSIONS[self.kind]

    @property
    def weights_ending(self) -> str:
        """Extension of the weight files in a folder."""
        return ".safetensors" if self.kind == "diffusers_safetensors" else ".bin"


# ---- when to save, and which saves to remove ----------------------------------------------------------------------


def epochs_between_saves(options: SaveOptions, total_epochs: int) -> int | None:
    """Number of epochs between saves, from --save_every_n_epochs or --save_n_epoch_ratio; None: no such saves."""
    if options.save_n_epoch_ratio:
        return max(1, total_epochs // options.save_n_epoch_ratio)
    return options.save_every_n_epochs or None


def saves_after_epoch(epoch: int, *, total: int, every: int | None) -> bool:
    """Whether an epoch, counted from 1, ends with a save. The last one is saved under the run's own name only."""
    return every is not None and every > 0 and epoch % every == 0 and epoch < total


def saves_after_step(step: int, *, every: int | None) -> bool:
    """Whether an optimizer step, counted from 1, ends with a save."""
    return every is not None and every > 0 and step > 0 and step % every == 0


def outdated_epoch(epoch: int, *, every: int, keep: int | None) -> int | None:
    """The epoch whose save is removed after that of `epoch`, so that the newest `keep` remain. None: none."""
    if not keep:
        return None
    old = epoch - every * keep
    return old if old > 0 else None


def outdated_step(step: int, *, every: int, keep: int | None) -> int | None:
    """The step whose save is removed after that of `step`: the newest one that is more than `keep` steps old."""
    if not keep:
        return None
    old = step - keep - 1
    old -= old % every
    return old if old > 0 else None


def states_to_keep(save: SaveOptions, state: StateOptions) -> tuple[int | None, int | None]:
    """(epochs, steps) for which states are kept: the options for states, or else those for saves."""
    epochs = state.save_last_n_epochs_state or save.save_last_n_epochs or None
    return epochs, state.save_last_n_steps_state or save.save_last_n_steps or None


def remove_save(folder: str | Path, name: str) -> bool:
    """Remove an outdated save: a file of exactly this name or a diffusers folder. Returns whether there was one."""
    path = Path(folder) / name
    if path.is_file():
        path.unlink(missing_ok=True)
    elif (path / MODEL_INDEX).is_file():
        remove_folder(path)
    else:
        return False
    return True


# ---- before the training ------------------------------------------------------------------------------------------


def check_output(
    folder: str | Path,
    output_name: str | None,
    *,
    files: Iterable[str] = (),
    models: Iterable[str] = (),
    states: Iterable[str] = (),
    needed_bytes: int = 0,
) -> list[str]:
    """Create the output folder and check that the run can write to it, before anything expensive is done.

    files, models (diffusers folders), states: names that the run will write. needed_bytes: room for the largest save
    while the save that it replaces still exists. Removes leftovers of killed runs and returns their final names. Raises
    UserError with every problem.
    """
    folder = Path(folder)
    problems = list(name_problems(output_name))
    trouble = _folder_problem(folder)
    if trouble:
        raise UserError([*problems, trouble])
    leftovers = clean_leftovers(folder)
    for name in files:
        if (folder / name).is_dir():
            problems.append(f"--output_name: {folder / name} is a folder, where the run wants to write a file")
    problems += [text for name in models if (text := _model_problem(folder / name))]
    for name in states:
        if (folder / name).exists() and not (folder / name).is_dir():
            problems.append(f"--output_name: {folder / name} is a file, where the run wants to write a state folder")
    free = free_bytes(folder)
    if free < needed_bytes:
        problems.append(f"--output_dir: {folder} has {free:,} bytes free, but a save needs {needed_bytes:,}")
    raise_problems(problems)
    return leftovers


def _model_problem(path: Path) -> str | None:
    """Why a diffusers folder cannot be written to `path`; None when it can. Only diffusers folders are replaced."""
    if path.exists() and not path.is_dir():
        return f"--output_name: {path} is a file, where the run wants to write a folder"
    if path.is_dir() and not (path / MODEL_INDEX).is_file() and any(path.iterdir()):
        return f"--output_name: {path} is a folder of other things, where the run wants to write a model; rename one"
    return None


def _folder_problem(folder: Path) -> str | None:
    """Why files cannot be written to `folder`, which is created if necessary; None when a trial file succeeds."""
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            return f"--output_dir: {part} is a file; give a folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".trial-{uuid.uuid4().hex}"
        try:
            trial.write_bytes(b"x" * 4096)
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        return f"--output_dir: cannot write into {folder}: {error.strerror or error}"
    return None


# ---- writing ------------------------------------------------------------------------------------------------------


def nonfinite_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with infinite or nan values."""
    return [name for name, tensor in tensors.items() if not is_finite(tensor)]


def is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())


def require_finite(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises StopTraining when a weight is infinite or nan, so that it never replaces a good file."""
    _refuse(nonfinite_names(tensors), len(tensors), "are not finite", path)


def require_present(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises StopTraining when a trained weight is empty because another process holds it."""
    _refuse([name for name, tensor in tensors.items() if not tensor.numel()], len(tensors), "are empty", path)


def _refuse(bad: list[str], total: int, what: str, path: str | Path) -> None:
    if bad:
        raise StopTraining(f"{path} is not written: {len(bad)} of {total} tensors {what} ({first_names(bad)})")


class Ready(LazyTensors):
    """Tensors in the dtype of a file, each moved to main memory when it is read, so that no model is in memory twice.

    Tensors that `dtype` cannot represent are in float32: those with a value that overflows and, with `keep_small`,
    those whose values all underflow.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, *, keep_small: bool = False) -> None:
        self.tensors, self.dtype, self.keep_small = tensors, dtype, keep_small
        self.names = tensors
        self.wide: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name].detach()
        dtype = torch.float32 if name in self.wide else self.dtype
        return tensor.to("cpu", dtype if tensor.is_floating_point() else None).contiguous()

    def check(self, path: str | Path) -> None:
        """Find the tensors that must be in float32, and warn. Raises StopTraining for infinite or nan weights."""
        broken: list[str] = []
        wide: list[str] = []
        for name, tensor in self.tensors.items():
            ready = self[name]
            if not is_finite(ready):
                (wide if is_finite(tensor) else broken).append(name)
            elif self.keep_small and ready.dtype != tensor.dtype and not ready.any() and tensor.any():
                wide.append(name)
        _refuse(broken, len(self), "are not finite", path)
        self.wide = frozenset(wide)
        if wide:
            kind = str(self.dtype).removeprefix("torch.")
            log.warning(
                "%s: %d of %d tensors are written in float32, they have no place in %s: %s",
                path, len(wide), len(self), kind, first_names(wide),
            )  # fmt: skip


def in_precision(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, path: str | Path) -> dict[str, Tensor]:
    """An adapter's tensors in main memory in `dtype`, or in float32, with a warning, if `dtype` cannot represent them.

    Alphas are never rounded. Raises StopTraining for infinite or nan weights.
    """
    alphas = {name: without_rounding(tensor, dtype) for name, tensor in tensors.items() if name.endswith(".alpha")}
    weights = {name: tensor for name, tensor in tensors.items() if name not in alphas}
    ready = Ready(weights, dtype, keep_small=True)  # an adapter of zeros would be no training at all
    ready.check(path)
    return {name: alphas[name] if name in alphas else ready[name] for name in tensors}


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    hashes: bool = True,
    others: Mapping[str, Tensor] | None = None,
    beside: Mapping[str, Any] | None = None,
) -> Path:
    """Write weights atomically, one tensor at a time, in `dtype` if given (see `Ready`).

    The extension of `path` selects the format:

    .safetensors: with `metadata` and, for adapters (`hashes`), the hashes of `metadata.tensor_hashes`.
    .ckpt, .pt, .bin: a pickle of the tensors; with `beside`, they are under "state_dict" next to the items of `beside`.

    others: more tensors, which may have any values, for names that are not in `tensors`. Raises SaveError (disk,
    permissions) and StopTraining (a weight is infinite or nan).
    """
    path = Path(path)
    ready: Any = Ready(tensors, dtype)
    ready.check(path)
    if others is not None:
        ready = ChainMap(ready, Ready(others, dtype))  # type: ignore[arg-type]
    size = data_bytes(ready)
    if path.suffix == ".safetensors":
        complete = {**metadata, **(tensor_hashes(dict(ready), metadata) if hashes else {})}
        written: list[str] = []
        return atomic_write(
            path,
            lambda temp: written.append(write_safetensors(temp, ready, complete)),
            lambda temp: check_safetensors(temp, written[0]),
            size=size,
        )
    alone: dict[str, Any] = {n: _alone(t) for n, t in ready.items()}
    content = alone if beside is None else {"state_dict": alone, **beside}
    return atomic_write(path, lambda t: _write_pickle(t, content), lambda t: _check_pickle(t, content), size=size)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in its own storage: of a slice, the whole storage would be pickled."""
    own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if own else tensor.clone()


def _write_pickle(path: Path, content: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        torch.save(content, file)


def _check_pickle(path: Path, content: dict[str, Any]) -> None:
    try:
        with plain_path(path) as readable:
            again = torch.load(readable, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise SaveError(f"{path.parent}: what was written does not read back: {error}") from error
    inside = "state_dict"
    if again.keys() != content.keys() or (inside in content and again[inside].keys() != content[inside].keys()):
        raise SaveError(f"{path.parent}: what was written reads back with other content")


def remove_state(folder: str | Path, name: str, marker: str = "train_state.json") -> bool:
    """Remove an outdated state folder, if it contains a state. Returns whether there was one."""
    path = Path(folder) / name
    if not (path / marker).is_file():
        return False
    remove_folder(path)
    return True
