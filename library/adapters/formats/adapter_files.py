# SPDX-License-Identifier: Apache-2.0
"""Adapter files on disk: one file, or the folder that PEFT writes (adapter_model and adapter_config.json)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.adapters.formats.peft_config import with_alphas
from library.adapters.formats.peft_folder import CONFIG, PEFT_FILES
from library.adapters.formats.recognition import BUNDLED
from library.byte_paths import plain_path
from library.errors import UserError, first_names
from library.log import get_logger

TORCH_SUFFIXES = (".pt", ".ckpt", ".pth", ".bin")


def adapter_file(path: str | Path) -> Path:
    """The file that holds the tensors: `path`, or the one inside a folder of PEFT. Raises UserError."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such adapter file")
    found = next((path / name for name in PEFT_FILES if (path / name).is_file()), None)
    if found is None:
        raise UserError(f"{path} is a folder without {PEFT_FILES[0]}; give an adapter file, or a folder of PEFT")
    return found


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All adapter tensors of a file. Raises UserError when it is missing, damaged or holds something else.

    Alphas that diffusers wrote into the header, or PEFT into adapter_config.json, become tensors `<layer>.alpha`.
    Embeddings that OneTrainer bundles with an adapter are left out with a warning.
    """
    found = load_tensors(path)
    bundled = [key for key in found if key.startswith(BUNDLED)]
    if bundled:
        names = first_names(bundled)
        get_logger().warning("%s: %d embeddings are not adapters and are not read: %s", path, len(bundled), names)
        found = {key: value for key, value in found.items() if not key.startswith(BUNDLED)}
    file = adapter_file(path)
    return with_alphas(found, read_metadata(path), file, file.with_name(CONFIG))


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors exactly as a file has them. Raises UserError."""
    file = adapter_file(path)
    try:
        if file.suffix in TORCH_SUFFIXES:
            found = torch.load(file, map_location="cpu", weights_only=True)
        else:
            from safetensors.torch import load_file

            with plain_path(file) as readable:
                found = load_file(readable)
    except Exception as error:  # readers raise many kinds; each means the same to the user
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable adapter file ({reason})") from None
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path}: holds no adapter tensors")
    return {str(key): value for key, value in found.items()}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The header entries of a .safetensors file; none for other files."""
    file = adapter_file(path)
    if file.suffix in TORCH_SUFFIXES:
        return {}
    from safetensors import safe_open

    with plain_path(file) as readable, safe_open(readable, "pt") as opened:
        return dict(opened.metadata() or {})


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    """Write a file: with torch and without metadata for its suffixes, else with safetensors."""
    path = Path(path)
    if path.suffix in TORCH_SUFFIXES:
        torch.save(dict(tensors), path)
    else:
        from safetensors.torch import save_file

        save_file(dict(tensors), path, metadata=dict(metadata or {}) or None)


def by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`name.suffix` keys as name -> suffix -> tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, suffix = key.partition(".")
        found.setdefault(name, {})[suffix] = value
    return found
