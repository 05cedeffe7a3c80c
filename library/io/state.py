# SPDX-License-Identifier: Apache-2.0
"""The resumable state of a run: everything that the next step depends on, saved atomically, read without running code.

A state is a folder:
    weights.safetensors   the trained weights
    optimizer.pt          optimizer, scheduler, scaler and EMA
    train_state.json      position in the run, loss history, and a fingerprint of everything that must not change
    manifest.json         size and sha256 of the other files

train_state.json also contains the sha256 of weights.safetensors and optimizer.pt, so that parts of different states are
not mixed up. Seeds are derived from counters (`library.rng`), so data order and random draws need no more than the
position and the fingerprint.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from library.byte_paths import plain_path
from library.errors import UserError, nearest, raise_problems
from library.io.atomic import SaveError, atomic_folder, clean_leftovers
from library.io.checkpoint import require_finite, require_present
from library.io.tensor_file import data_bytes, stream_digest, write_safetensors
from library.text_files import parse_json

FORMAT, VERSION = "trainyard state", 1
WEIGHTS, OPTIMIZER, FACTS, MANIFEST = "weights.safetensors", "optimizer.pt", "train_state.json", "manifest.json"
# Types that optimizers may keep besides tensors and plain values. They hold numbers only; loading them runs no code.
NUMPY_TYPES: list[Any] = [
    numpy.dtype,
    numpy.ndarray,
    numpy.float64(0).__reduce__()[0],  # functions that numpy refers to in pickles; their module depends on the version
    numpy.zeros(0).__reduce__()[0],
    *{type(numpy.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool")},
]


@dataclass
class StateParts:
    """The content of a state, taken between two optimizer steps.

    `optimizer`, `scheduler`, `scaler` and `ema` contain numbers, texts, tensors and containers of them.
    """

    weights: dict[str, Tensor]
    step: int  # optimizer steps done
    epoch: int  # epochs finished
    batch: int  # the next micro-batch of the epoch under way
    fingerprint: dict[str, Any]  # "--network_dim" -> 16, "dataset" -> digest ...: must be equal on resume; JSON values
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] | None = None
    ema: dict[str, Any] | None = None
    losses: list[float] = field(default_factory=list)


JSON_PARTS = ("step", "epoch", "batch", "fingerprint", "losses")
TORCH_PARTS = ("optimizer", "scheduler", "scaler", "ema")
OPTIONAL_PARTS = ("scaler", "ema")
BELONGS = "parts"  # key of train_state.json: sha256 of the files that belong to it
MOST_JSON = 64 << 20  # bytes; larger files are refused
# Errors of reading arbitrary JSON: deep nesting is a RecursionError, a number of 5,000 digits a ValueError
DAMAGED_JSON = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


# ---- save ---------------------------------------------------------------------------------------------------------


def save_state(folder: str | Path, parts: StateParts) -> Path:
    """Write a state. An older one with that name is replaced as a whole. Returns the folder.

    Raises SaveError (disk), StopTraining (a weight is not finite, or empty), TypeError (an optimizer keeps something
    that is neither a number nor a tensor and could not be read back).
    """
    folder = Path(folder)
    weights = {n: t.detach().to("cpu").contiguous() for n, t in parts.weights.items()}
    require_present(weights, folder)
    require_finite(weights, folder)
    bundle = {name: _alone(getattr(parts, name)) for name in TORCH_PARTS}
    size = data_bytes(weights) + sum(leaf.nbytes for leaf in tree_leaves(bundle) if isinstance(leaf, Tensor))
    facts = {"format": FORMAT, "version": VERSION, **{name: getattr(parts, name) for name in JSON_PARTS}}
    with atomic_folder(folder, size=size) as temp:
        write_safetensors(temp / WEIGHTS, weights, {"format": "pt"})
        _write_bundle(temp / OPTIMIZER, bundle, folder)
        manifest = {name: _identity(temp / name) for name in (WEIGHTS, OPTIMIZER)}
        facts[BELONGS] = {name: identity["sha256"] for name, identity in manifest.items()}
        (temp / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        manifest[FACTS] = _identity(temp / FACTS)
        (temp / MANIFEST).write_text(json.dumps({"format": FORMAT, "version": VERSION, "files": manifest}, indent=1))
    return folder


def _write_bundle(path: Path, bundle: dict[str, Any], folder: Path) -> None:
    with open(path, "wb") as file:
        torch.save(bundle, file)
    try:
        _read_bundle(path, mmap=True)  # what cannot be read back must fail now, not on resume
    except pickle.UnpicklingError as error:
        raise TypeError(f"a part of the state cannot be read back without running code: {error}") from error
    except RuntimeError as error:
        raise SaveError(f"{folder}: what was written does not read back ({error}); nothing was changed") from error


def _read_bundle(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    with torch.serialization.safe_globals(NUMPY_TYPES), plain_path(path) as readable:
        return torch.load(readable, map_location="cpu", weights_only=True, mmap=mmap)


def _alone(value: Any) -> Any:
    """A copy on the CPU in which no tensor is a view of a larger storage. Containers become plain dicts and lists."""
    if isinstance(value, Tensor):
        tensor = value.detach().to("cpu")
        return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size() else tensor
    if isinstance(value, Mapping):
        return {k: _alone(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_alone(v) for v in value)
    return value


def _identity(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": stream_digest(file)}


# ---- load ---------------------------------------------------------------------------------------------------------


def load_state(folder: str | Path) -> StateParts:
    """Read a state, with tensors on the CPU. Raises UserError when it is missing, damaged or from another program."""
    folder = Path(folder)
    clean_leftovers(folder.parent)
    verify_state(folder)
    bundle = _bundle(folder / OPTIMIZER)
    return StateParts(weights=_weights(folder / WEIGHTS), **_facts(folder), **bundle)


def _weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with plain_path(path) as readable:
            return load_file(readable)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(_damaged(path, str(error))) from None


def _bundle(path: Path) -> dict[str, Any]:
    try:
        bundle = _read_bundle(path)
    except pickle.UnpicklingError:
        raise UserError(f"--resume: {path} holds more than numbers; it is not loaded") from None
    except Exception as error:  # reading an arbitrary pickle may raise anything
        raise UserError(_damaged(path, f"{type(error).__name__}: {error}")) from None
    if not isinstance(bundle, dict) or bundle.keys() != set(TORCH_PARTS):
        raise UserError(_damaged(path, f"it does not hold {', '.join(TORCH_PARTS)}"))
    for name, value in bundle.items():
        if not (isinstance(value, dict) or (value is None and name in OPTIONAL_PARTS)):
            raise UserError(_damaged(path, f"{name} is a {type(value).__name__}"))
    return bundle


def _damaged(path: Path, reason: str) -> str:
    first = " ".join(reason.split())
    return f"--resume: {path} is damaged ({first[:200]}); use another state"


def read_facts(folder: str | Path) -> dict[str, Any]:
    """Step, epoch, batch, fingerprint and losses of a state, for checks before a model is loaded.

    Checks the sizes of all files, not their content. Raises UserError.
    """
    folder = Path(folder)
    clean_leftovers(folder.parent)
    verify_state(folder, content=False)
    return _facts(folder)


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts = _json_of(folder / FACTS)
        found = {name: facts[name] for name in JSON_PARTS}
        wrong = next((name for name in JSON_PARTS if not _is_fact(name, found[name])), None)
        belongs, files = facts.get(BELONGS), _json_of(folder / MANIFEST)["files"]
        strangers = [name for name in belongs or () if belongs[name] != files[name]["sha256"]]
    except DAMAGED_JSON as error:
        raise UserError(_damaged(folder / FACTS, f"{type(error).__name__}: {error}")) from None
    if wrong is not None:
        raise UserError(_damaged(folder / FACTS, f"its {wrong} is {_short(found[wrong])}"))
    if strangers:
        raise UserError(f"--resume: {folder}: {' and '.join(strangers)} of another state; use a whole one")
    return found


def _is_fact(name: str, value: Any) -> bool:
    if name == "fingerprint":
        return isinstance(value, dict) and type(value.get("seed", 0)) is int
    if name == "losses":
        return isinstance(value, list) and all(type(v) in (int, float) and math.isfinite(v) for v in value)
    return type(value) is int and 0 <= value < 2**63


def _json_of(path: Path) -> Any:
    """Raises DAMAGED_JSON errors."""
    if not path.is_file() or path.stat().st_size > MOST_JSON:
        raise ValueError("no file of facts")
    return parse_json(path.read_bytes())


def verify_state(folder: Path, *, content: bool = True) -> None:
    """Compare the files with the manifest: sizes and, with `content`, sha256. Raises UserError."""
    if not folder.is_dir():
        raise UserError(_not_there(folder))
    if not (folder / MANIFEST).is_file():
        raise UserError(_foreign(folder))
    files = _manifest(folder)
    problems = []
    for name, expected in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != expected["size"]:
            state = "is missing" if found is None else f"has {found:,} of {expected['size']:,} bytes"
            problems.append(f"--resume: {path} {state}; use another state")
        elif content and _identity(path) != expected:
            problems.append(f"--resume: {path} is damaged (its content is not what was written); use another state")
    raise_problems(problems)


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> size and sha256, from the manifest. Raises UserError."""
    try:
        manifest = _json_of(folder / MANIFEST)
        files, version = manifest["files"], manifest["version"]
        good = type(version) is int and (version > VERSION or files.keys() == {WEIGHTS, OPTIMIZER, FACTS})
        good = good and all(type(part["size"]) is int and type(part["sha256"]) is str for part in files.values())
    except DAMAGED_JSON:
        good = False
    if not good:
        raise UserError(f"--resume: {folder / MANIFEST} is damaged; use another state")
    if version > VERSION:
        raise UserError(f"--resume: {folder} is of a newer Trainyard (state version {version}, known: {VERSION})")
    return files


def _not_there(folder: Path) -> str:
    if folder.is_file():
        return f"--resume: {folder} is a file; give the folder whose name ends in -state"
    states = [p.name for p in folder.parent.iterdir() if (p / MANIFEST).is_file()] if folder.parent.is_dir() else []
    hint = nearest(folder.name, states)
    if hint:
        return f"--resume: {folder} does not exist. Did you mean {folder.parent / hint}?"
    return f"--resume: {folder} does not exist" + (f". There are: {', '.join(sorted(states))}" if states else "")


def _foreign(folder: Path) -> str:
    names = {p.name for p in folder.iterdir()}
    if "optimizer.bin" in names and names & {"model.safetensors", "pytorch_model.bin"}:
        weights = folder / ("model.safetensors" if "model.safetensors" in names else "pytorch_model.bin")
        return (
            f"--resume: {folder} is a state of sd-scripts, which cannot be continued; "
            f"start from its weights with --network_weights {weights}"
        )
    inside = [p.name for p in folder.iterdir() if (p / MANIFEST).is_file()]
    if inside:
        return f"--resume: {folder} holds states, it is none; give one of {', '.join(sorted(inside))}"
    return f"--resume: {folder} is not a state: {MANIFEST} is missing"


# ---- comparing with the current run -------------------------------------------------------------------------------


def compare(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Differences between two fingerprints, one line each: "--network_dim was 16, is 32". Tables go key by key."""
    return list(_differences(json.loads(json.dumps(saved)), json.loads(json.dumps(current)), ""))


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in [*saved, *(k for k in current if k not in saved)]:
        old, new = saved.get(key), current.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key} ")
        elif old != new:
            was = _short(old) if key in saved else "not noted"  # the state was saved before this was recorded
            yield f"{prefix}{key} was {was}, is {_short(new)}"


def unlike(own: Any, found: Any, where: str) -> str | None:
    """The first place where `found` differs from `own` in structure: a text for a number, another number of items.

    Compares only keys that both have; whoever reads the state handles the others. None: there is no difference.
    """
    if isinstance(own, Mapping):
        if not isinstance(found, Mapping):
            return where
        pairs = [(own[key], found[key], f"{where} {key}") for key in own if key in found]
    elif isinstance(own, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(own) != len(found):
            return where
        pairs = [(mine, other, f"{where} {i}") for i, (mine, other) in enumerate(zip(own, found))]
    else:
        number = isinstance(own, Real) and not isinstance(own, bool)
        return where if number and not isinstance(found, (Real, Tensor)) else None
    return next((place for pair in pairs if (place := unlike(*pair)) is not None), None)


def _short(value: Any) -> str:
    text = "not set" if value in (None, "", []) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def newest_state(output_dir: str | Path, output_name: str | None) -> Path | None:
    """The state with the most steps of this --output_name; among equals the newest. None when there is none."""
    output_dir = Path(output_dir)
    clean_leftovers(output_dir)
    if not output_dir.is_dir():
        return None
    stems = (re.escape(output_name),) if output_name else ("last", "epoch", "at")
    pattern = re.compile(rf"({'|'.join(stems)})(-\d{{6,}}|-step\d{{8,}})?-state")
    found = []
    for path in sorted(output_dir.iterdir()):
        if pattern.fullmatch(path.name) and (path / MANIFEST).is_file():
            try:
                step = read_facts(path)["step"]
            except UserError:
                continue
            found.append((step, (path / MANIFEST).stat().st_mtime_ns, path))
    return max(found)[-1] if found else None
