# SPDX-License-Identifier: Apache-2.0
"""The options of the script that trains a ControlNet-LLLite. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import between, option
from library.trainers.options import TrainerOptions


@dataclass(frozen=True)
class LLLiteOptions:
    """The control network. Its learning rate is --learning_rate."""

    cond_emb_dim: int | None = option(
        None, help="Numbers per token that the control image becomes (default: 32).", check=between(2, 65536)
    )
    network_dim: int | None = option(
        None, help="Width of the small network behind each controlled layer (default: 64).", check=between(1, 65536)
    )
    network_dropout: float | None = option(
        None, help="Share of activations dropped inside the network.", check=between(0, 0.999)
    )
    network_weights: str | None = option(
        None, help="Start from this ControlNet-LLLite file, which decides the sizes.", path=True
    )


@dataclass(frozen=True)
class LLLiteTrainerOptions(TrainerOptions):
    """ControlNet-LLLite."""

    lllite: LLLiteOptions
