# SPDX-License-Identifier: Apache-2.0
"""Hashes of weights, remembered by (path, size, mtime) so that a restart does not read gigabytes to know a cache's key.

They are kept in `trainyard/fingerprints.json` in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache). The file is
only a memory: when it is damaged, lost or not writable, the weights are read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from library.text_files import parse_json
from library.weights.weight_files import WeightFile, open_weights

FORMAT = "1"  # of what is hashed; a change makes all remembered hashes void
MOST_ENTRIES = 1000  # the oldest are forgotten
# A file written to so recently may be written to again without a new time: some file systems count in steps of 2 s
SETTLED_NS = 2_000_000_000


def weights_fingerprint(file: WeightFile, prefix: str, settings: str) -> str:
    """Hash of settings and of names below `prefix`, dtypes, shapes and bytes: equal only for equal contents.

    The file is only read when this hash is not remembered.
    """
    compute = lambda: hash_weights(file.path, prefix, settings)
    key = _key(file, prefix, settings)
    return _remembered(key, compute) if key is not None else compute()


def hash_weights(path: Path, prefix: str, settings: str) -> str:
    """The hash of `weights_fingerprint`, computed by reading all weights."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    file = open_weights(path)  # a mapping of its own: what it touches is given back at the end
    for name in sorted(n for n in file.shapes if n.startswith(prefix)):
        tensor = file.tensor(name)
        digest.update(f"{name[len(prefix) :]} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _key(file: WeightFile, prefix: str, settings: str) -> str | None:
    """What was hashed, and the state of its files. None when one of them changed just now or is not there."""
    states = []
    for path in file.files:
        try:
            stat = path.stat()
        except OSError:
            return None
        if time.time_ns() - stat.st_mtime_ns < SETTLED_NS:
            return None
        states.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    return json.dumps([FORMAT, prefix, settings, *states])


# ---- the memory -----------------------------------------------------------------------------------------------------


def _remembered(key: str, compute: Callable[[], str]) -> str:
    known = _load().get(key)
    if known is not None:
        return known
    value = compute()
    _save({**_load(), key: value})  # loaded again: another run may have added to it meanwhile
    return value


def memory_file() -> Path:
    """Where digests are remembered."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "trainyard" / "fingerprints.json"


def _load() -> dict[str, str]:
    try:
        content = parse_json(memory_file().read_bytes())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: a user without a home
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if isinstance(value, str)}


def _save(entries: dict[str, str]) -> None:
    """Whole or not at all. A folder that cannot be written to is ignored; of two runs at once one may be forgotten."""
    text = json.dumps(dict([*entries.items()][-MOST_ENTRIES:]), indent=0)
    try:
        path = memory_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as temp:
                temp.write(text)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except (OSError, RuntimeError):
        return
