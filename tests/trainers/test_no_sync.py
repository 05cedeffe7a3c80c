# SPDX-License-Identifier: Apache-2.0
"""Within a training step, the host asks the device for no value: it would wait, and the device would stand idle then.

A CPU has no queue to wait for, so the places that would wait are counted: methods of Tensor that give a number or a
copy on the host, and operations whose result has as many elements as the contents say. In these runs nothing of the
kind is left, also not on tensors that never leave the host.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from library.types import Batch
from tests.contracts.test_families import CASES
from tests.trainers.helpers import DEFAULTS, Recorded, make_pictures, make_trainer, subset, write_dataset

METHODS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero")
OPERATIONS = (
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::repeat_interleave.Tensor",
)


class Watch(TorchDispatchMode):
    """Collects where something waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def note(self, what: str, frame: FrameType | None) -> None:
        stack = [entry for entry in traceback.extract_stack(frame) if entry.filename != __file__]
        places = [f"{Path(entry.filename).name}:{entry.lineno} {entry.name}" for entry in stack[-6:]]
        self.found.append(f"{what} in {' > '.join(places)}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        boolean = func.namespace == "aten" and func._opname in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )  # fmt: skip
        if func.name() in OPERATIONS or boolean:
            self.note(func.name(), sys._getframe(1))
        return func(*args, **kwargs)


@contextmanager
def watched(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Inside it everything that would wait is collected."""
    watch = Watch()

    def noting(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            watch.note(f"Tensor.{name}", sys._getframe(1))
            return original(self, *args, **kwargs)

        return method

    with patch.context() as own, watch:
        for name in METHODS:
            own.setattr(Tensor, name, noting(name))
        yield watch.found


class Watched(Recorded):
    """Collects for each step what would wait."""

    patch: pytest.MonkeyPatch
    counted: list[list[str]]

    def train_step(self, batches: Sequence[Batch], first_micro_step: int) -> None:
        with watched(self.patch) as found:
            super().train_step(batches, first_micro_step)
        self.counted.append(list(found))


@pytest.mark.parametrize("name", CASES)
def test_no_step_waits_for_the_device(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    data = write_dataset(tmp_path / "data.toml", subset(make_pictures(tmp_path / "pictures", 4)))
    values = {
        **DEFAULTS, **case.make(tmp_path / "model"), **case.options, "dataset_config": data, "output_dir": tmp_path,
        "network_module": None, "network_train_unet_only": True, "cache_latents": True,
        "cache_text_encoder_outputs": True, "ema_decay": 0.9, "max_train_steps": 2,
    }  # fmt: skip
    trainer = make_trainer(values, family=case.family, cls=Watched)
    trainer.patch, trainer.counted = monkeypatch, []
    assert trainer.run() == 0
    assert trainer.counted == [[], []]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: int(x[0]),
        lambda x: float(x[0]),
        lambda x: [1, 2, 3][x.long()[1]],
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: torch.nonzero(x),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x + 1),
        lambda x: torch.repeat_interleave(x, x.long()),
        lambda x: torch.arange(x.long()[0]),
    ],
)
def test_what_waits_is_found(wait: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(3.0)
    with watched(monkeypatch) as found:
        (x * 2 + 1).sum().sqrt()
        torch.where(x > 1, x, 0)[:, None].repeat_interleave(2, 0)
        x.index_select(0, torch.zeros(2, dtype=torch.long))
        assert found == []
        wait(x)
        assert found != []


def test_backward_passes_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(3.0, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: gradient * (gradient > 0).nonzero().shape[0])
    with watched(monkeypatch) as found:
        y.sum().backward()
        assert len(found) == 2 and "nonzero" in found[0]  # the method, and the operation in it
