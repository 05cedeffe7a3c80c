# SPDX-License-Identifier: Apache-2.0
"""The predicted memory of optimizer states is that of the states."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from library.optim.optimizers import OPTIMIZERS, choose_optimizer
from library.optim.options import OptimizerOptions
from library.planner.optimizer_memory import appetite

NAMES = [
    "AdamW", "AdamW8bit", "Adafactor", "AdEMAMix", "AdEMAMix8bit", "CAME", "Muon", "SOAP", "ProdigyPlusScheduleFree",
]  # fmt: skip
SHAPES = [(16, 400), (300, 64), (5000,), (8, 12, 3, 3), (40,)]


@pytest.mark.parametrize(
    "name", [name for name in NAMES if importlib.util.find_spec(OPTIMIZERS[name].path.partition(".")[0])]
)
def test_states(name: str) -> None:
    arguments = ("max_precondition_dim=350",) if name == "SOAP" else None
    choice = choose_optimizer(OptimizerOptions(optimizer_type=name, learning_rate=1.0, optimizer_args=arguments))
    weights = [torch.nn.Parameter(torch.full(shape, 0.1)) for shape in SHAPES]
    optimizer = choice.build([{"params": weights}]).optimizer
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.full_like(weight, 1e-3)
        optimizer.step()
    found = [leaf for weight in weights for leaf in tree_leaves(optimizer.state[weight]) if isinstance(leaf, Tensor)]
    taken = sum(leaf.nbytes for leaf in found if leaf.numel() not in (1, 256))  # 256: a table that all weights share
    assert appetite(choice, torch.float32).states(SHAPES) == pytest.approx(taken, rel=0.1)
