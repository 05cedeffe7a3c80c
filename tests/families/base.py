# SPDX-License-Identifier: Apache-2.0
"""What a family brings to the contract tests: tiny models, and its training loss written down a second time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.types import Batch
from tests.trainers.helpers import Adapters

# options of the run, a batch, adapters (keys of a kohya file), the micro-step's generator -> mean loss
Loss = Callable[[dict[str, Any], Batch, Adapters, torch.Generator], Tensor]


@dataclass(frozen=True)
class Case:
    """One architecture in one configuration."""

    family: str  # whose scripts train it, of library.families.registry
    make: Callable[[Path], dict[str, Any]]  # writes a tiny model below a folder; the options that name it
    loss: Loss  # from libraries and formulas only
    options: dict[str, Any] = field(default_factory=dict)  # of every run
    overfit: dict[str, Any] = field(default_factory=dict)  # what makes the network of the overfitting test larger
    make_deep: Callable[[Path], dict[str, Any]] | None = None  # one with blocks enough to swap some, where that differs
