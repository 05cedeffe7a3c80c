# SPDX-License-Identifier: Apache-2.0
"""Files of textual inversion: the rows of one word, for each text encoder of a model.

Written: `emb_params` (count, width) for models of one text encoder, `clip_l` and `clip_g` for SDXL, which A1111/Forge,
ComfyUI and diffusers read. Also read: A1111's own .pt (`string_to_param`), diffusers' `learned_embeds` (the word is
the key), and a tensor alone. The word itself is the file's name in most programs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.errors import UserError
from library.weights.new_tokens import NewWord
from library.weights.torch_files import plain_tensors, read_pickle
from library.weights.weight_files import PICKLE_SUFFIXES, open_weights

ALONE = "emb_params"  # name of the rows in the file of a model with one text encoder


def published_rows(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file of these rows. rows: encoder -> (count, width)."""
    return {ALONE: next(iter(rows.values()))} if len(rows) == 1 else dict(rows)


def read_rows(path: Path, words: Mapping[str, NewWord]) -> dict[str, Tensor]:
    """Encoder -> (count, width) float32. Raises UserError when the file does not hold a word like `words`."""
    tensors = {name: _table(path, name, value) for name, value in _read(path).items()}
    rows = _assign(path, tensors, tuple(words))
    problems = []
    for name, word in words.items():
        count, width = rows[name].shape
        if width != word.width:
            problems.append(
                f"{path}: vectors of width {width}, the text encoder {name} has {word.width}: the file is of another "
                f"kind of model{_kind_of(width)}"
            )
        elif count != len(word.ids):
            problems.append(f"{path} holds {count} vectors: give --num_vectors_per_token {count}")
    if problems:
        raise UserError(dict.fromkeys(problems))
    return rows


def _kind_of(width: int) -> str:
    kinds = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL"}
    return f" ({kinds[width]})" if width in kinds else ""


def _assign(path: Path, tensors: Mapping[str, Tensor], encoders: Sequence[str]) -> dict[str, Tensor]:
    """Which tensor is of which encoder. Of a model with one encoder the name does not matter."""
    if len(encoders) == 1:
        if len(tensors) != 1:
            names = ", ".join(sorted(tensors))
            raise UserError(f"{path} holds {names}, not the vectors of one text encoder: it is of another model")
        return {encoders[0]: next(iter(tensors.values()))}
    missing = [name for name in encoders if name not in tensors]
    if missing:
        raise UserError(f"{path} lacks {' and '.join(missing)}: it is no textual inversion file of this kind of model")
    return {name: tensors[name] for name in encoders}


def _table(path: Path, name: str, value: Tensor) -> Tensor:
    if value.ndim not in (1, 2) or not value.is_floating_point():
        raise UserError(f"{path}: {name} is no list of vectors; this is no textual inversion file")
    return value.detach().float().reshape(-1, value.shape[-1])


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors that are vectors of words, by their names."""
    if path.is_file() and path.suffix in PICKLE_SUFFIXES:
        # the first textual inversion files hold their vectors in a ParameterDict
        return _vectors(path, read_pickle(path, [nn.ParameterDict]))
    file = open_weights(path)
    return {name: file.tensor(name).clone() for name in file.shapes}


def _vectors(path: Path, content: Any) -> dict[str, Tensor]:
    """The tensors of a file's content: a tensor, a table of tensors, or A1111's table with one below it."""
    if isinstance(content, Tensor):
        return plain_tensors(path, {ALONE: content})
    table = content.get("string_to_param", content) if isinstance(content, dict) else {}
    tensors = plain_tensors(path, dict(table.items()) if isinstance(table, (dict, nn.ParameterDict)) else {})
    if not tensors:
        raise UserError(f"{path} holds no vectors: it is no textual inversion file")
    return tensors
