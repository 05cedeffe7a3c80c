# SPDX-License-Identifier: Apache-2.0
"""Checks that a file or folder belongs to the family it is given to. Others are refused with a line about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from library.errors import UserError
from library.families.detect import NO_ANSWERS, foreign_file, foreign_pipeline
from library.weights.loading import read_json
from library.weights.weight_files import WeightFile


def class_named(path: Path) -> str:
    """The `_class_name` of a configuration of diffusers; empty if there is no such file or entry."""
    return str(read_json(path).get("_class_name", "")) if path.is_file() else ""


def require_own_file(file: WeightFile, family: str, answers: Mapping[str, str] = NO_ANSWERS) -> None:
    """Raise UserError unless the file is a checkpoint of the family. answers: as for `foreign_file`."""
    foreign = foreign_file(file.shapes, family, answers)
    if foreign:
        raise UserError(f"{file.path} is {foreign}")


def require_own_folder(path: Path, family: str, answers: Mapping[str, str] = NO_ANSWERS) -> None:
    """Raise UserError if the folder is a pipeline of another family. answers: as for `foreign_file`."""
    foreign = foreign_pipeline(class_named(path / "model_index.json"), family, answers)
    if foreign:
        raise UserError(f"{path} is {foreign}")
