# SPDX-License-Identifier: Apache-2.0
"""Torch's own files (.ckpt, .pt, .pth, .bin): a pickle and the numbers of its tensors. No code of theirs is run."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.byte_paths import plain_path
from library.errors import UserError

INERT_NAMES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
)
LEVEL = "state_dict"  # below which the weights of a training program lie, sometimes twice
DEEPEST = 8  # levels


class _Ignored:
    """Stands for a class that a checkpoint only names (Lightning's callbacks are listed by class)."""


def read_pickle(path: Path, classes: Sequence[type] = ()) -> Any:
    """What a file holds. classes: further ones that may be in it. Raises UserError when it is damaged or wants more.

    Tensors are mapped where their bytes lie in the file as they are: they take memory when they are touched.
    """
    allowed: list[Any] = [*((_Ignored, name) for name in INERT_NAMES), *classes]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings(), plain_path(path) as readable:
            warnings.simplefilter("ignore")  # about the pickle's protocol
            return torch.load(readable, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {_refusal(str(error))}; use the .safetensors file of this model") from None
    except Exception:  # bytes at random make the unpickler raise errors of any class
        raise UserError(f"{path} is damaged or no torch checkpoint; download or copy it again") from None


def _can_be_mapped(path: Path) -> bool:
    """True for the layout that torch writes since 1.6, unless another program has compressed it."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    with zipfile.ZipFile(path) as archive:
        return all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())


def _refusal(message: str) -> str:
    """What torch did not want to load, from the middle of its long message."""
    named = re.search(r"[Uu]nsupported (?:global: )?GLOBAL ([\w.]+)", message, re.ASCII)
    if named:
        return f"it wants to run code ({named.group(1)[:100]}), which a model file has no need of"
    return "it is damaged, or holds more than tensors"


def named_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint, which may lie below `state_dict`. Raises UserError for those that are not plain."""
    for _ in range(DEEPEST):
        if not isinstance(content, dict) or not isinstance(content.get(LEVEL), dict):
            break
        content = content[LEVEL]
    return plain_tensors(path, content if isinstance(content, dict) else {})


def plain_tensors(path: Path, table: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Named tensors of a table. Raises UserError for tensors that are not plain ones."""
    tensors = {name: value for name, value in table.items() if isinstance(name, str) and isinstance(value, Tensor)}
    for problem in _problems(tensors):
        raise UserError(f"{path}: {problem}")
    return tensors


def _problems(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for name, tensor in tensors.items():
        if not name.isprintable():
            yield f"a tensor is called {name[:100]!r}: the file is damaged"
        elif tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
            kind = "nested" if tensor.is_nested else str(tensor.layout if not tensor.is_quantized else tensor.dtype)
            yield f"{name} is a tensor of another kind ({kind.removeprefix('torch.')}): weights are plain tensors"
        elif tensor.is_meta:
            yield f"{name} has a shape and no numbers (it is on the meta device): the file was not written whole"
        elif tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            yield f"{name} says that it is larger than what the file holds of it: the file is damaged"
