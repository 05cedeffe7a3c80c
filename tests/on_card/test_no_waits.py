# SPDX-License-Identifier: Apache-2.0
"""Whole runs in which a wait of the host for the card is an error, from the first step to the first save.

torch reports calls that wait. The simulated card also reports copies from memory that is not page-locked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.optim.optimizers import OPTIMIZERS, choose_optimizer
from library.optim.options import OptimizerOptions
from library.trainers.tracking import Trackers
from library.trainers.trainer import Trainer
from library.types import Batch
from tests.families import CASES
from tests.trainers.helpers import Recorded
from tests.trainers.wait_cases import MASKED, RUNS, Ground, WaitCase, run_watched

pytestmark = pytest.mark.gpu
FP16 = {"mixed_precision": "fp16"}


class Forbidding(Trainer):
    """A loop in which the host must not wait from the first step on, nor between steps."""

    def train_step(self, batches: Sequence[Batch]) -> None:
        assert all(batch.loss_weights.is_pinned() for batch in batches)  # by the loader
        torch.cuda.set_sync_debug_mode("error")
        super().train_step(batches)

    def save(self, trackers: Trackers, write: Callable[[], None]) -> None:
        torch.cuda.set_sync_debug_mode("default")
        super().save(trackers, write)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("waits"))


def run(
    case: WaitCase, ground: Ground, output: Path, before: Callable[[Recorded], None] | None = None, **more: Any
) -> None:  # fmt: skip
    """Two steps on the card, and a file of finite numbers."""
    trainer = run_watched(Forbidding, case, {**ground.values(case, output), **more}, before=before)
    assert trainer.device.type == "cuda" and trainer.position.step == 2
    learned = load_file(output / "x.safetensors")
    assert learned and all(bool(tensor.float().isfinite().all()) for tensor in learned.values())
    if case.method == "network":  # adapters begin at zero
        assert any(bool(tensor.count_nonzero()) for name, tensor in learned.items() if not name.endswith("alpha"))


@pytest.mark.parametrize("name", CASES)
def test_uncached_text_of_every_family(name: str, small: Ground, tmp_path: Path) -> None:
    run(WaitCase(name, MASKED.get(name, {})), small, tmp_path, logging_dir=tmp_path / "log")


def test_batches_of_a_thread(small: Ground, tmp_path: Path) -> None:
    """Where latents are cached; it locks their memory, too."""
    run(WaitCase("sd1", {"cache_latents": True, "max_data_loader_n_workers": 1}), small, tmp_path)


@pytest.mark.parametrize("name", RUNS)
def test_options(name: str, small: Ground, tmp_path: Path) -> None:
    run(RUNS[name], small, tmp_path)


@pytest.mark.parametrize(
    "name", [name for name, row in OPTIMIZERS.items() if not row.finds_rate and "Paged" not in name]
)
def test_optimizers(name: str) -> None:
    """From the second step on: some copy what a weight's state begins as. Small weights have states in 32 bits."""
    weights = [torch.nn.Parameter(torch.zeros(size, device="cuda")) for size in (4, 4096)]
    choice = choose_optimizer(OptimizerOptions(optimizer_type=name, learning_rate=1e-2))
    optimizer = choice.build([{"params": weights}]).optimizer
    for step in range(8 if "RAdam" in name else 3):  # RAdam begins at the sixth
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    assert all(bool((weight < 0).all()) for weight in weights)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux"])
def test_fp16_with_its_scaler(name: str, small: Ground, tmp_path: Path) -> None:
    """AdamW is told on the card whether gradients are finite."""
    run(WaitCase(name, FP16), small, tmp_path)


def test_fp16_with_other_optimizers_waits_in_the_scaler(small: Ground, tmp_path: Path) -> None:
    """torch's scaler asks whether gradients are finite, before the step of an optimizer that cannot be told."""
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation") as caught:
        run(WaitCase("sd1", {**FP16, "optimizer_type": "Lion"}), small, tmp_path)
    assert "grad_scaler.py" in {entry.path.name for entry in caught.traceback[-3:] if isinstance(entry.path, Path)}


def halve(trainer: Recorded) -> None:
    """As after a step that did not fit: one sample at a time."""
    trainer.memory.most_samples = 1


@pytest.mark.parametrize("name", ["sd1", "flux", "lumina", "anima"])
def test_batches_in_parts(name: str, small: Ground, tmp_path: Path) -> None:
    """Cached texts of several lengths, each part cut to its own."""
    cached = {"cache_text_encoder_outputs": True, "network_train_unet_only": True}
    run(WaitCase(name, {**MASKED.get(name, {}), **cached}), small, tmp_path, before=halve)
