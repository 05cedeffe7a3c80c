# SPDX-License-Identifier: Apache-2.0
"""Within a training step, the host asks the device for no value: it would wait, and the device would stand idle then.

A CPU has no queue to wait for, so the places that would wait are counted: methods of Tensor that give a number or a
copy on the host, and operations whose result has as many elements as the contents say. In these runs nothing of the
kind is left, also not on tensors that never leave the host. The options that touch a step have their runs on the
card, where copies from ordinary memory show, too: tests/on_card/test_no_waits.py.
"""

from __future__ import annotations

import inspect
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

from library.optim.optimizers import BNB, OPTIMIZERS, choose_optimizer
from library.optim.options import OptimizerOptions
from library.trainers.guards import StepReader
from library.trainers.trainer import Trainer
from library.types import Batch
from tests.families import CASES
from tests.trainers.wait_cases import MASKED, Ground, WaitCase, run_watched

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
    "aten::_linalg_check_errors",
)
HOST_DRAWS = ("dylora_layer.py", "sd3_positions.py")  # these draw on the host, so that no device has to be asked
WRAPPERS = ("_compile.py", "eval_frame.py")  # torch's, between a call and its operation


class Watch(TorchDispatchMode):
    """Collects where something waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def note(self, what: str, frame: FrameType | None) -> None:
        stack = [
            entry
            for entry in traceback.extract_stack(frame)
            if entry.filename != __file__ and not entry.filename.endswith(WRAPPERS)
        ]
        if stack[-1].filename.endswith(HOST_DRAWS):
            return
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


class Watching(Trainer):
    """A loop that collects for each step what would wait."""

    patch: pytest.MonkeyPatch
    counted: list[list[str]]

    def train_step(self, batches: Sequence[Batch]) -> None:
        with watched(self.patch) as found:
            super().train_step(batches)
        self.counted.append(list(found))


def waits(case: WaitCase, ground: Ground, output: Path, patch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would wait in each step of a run."""
    return run_watched(Watching, case, ground.values(case, output), patch=patch, counted=[]).loop.counted


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("waits"))


@pytest.mark.parametrize("cached", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("name", CASES)
def test_no_step_of_any_family_waits(
    name: str, cached: bool, small: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uncached, text encoders learn, and captions of several lengths are masked where the family can do so."""
    values = {**MASKED.get(name, {}), "ema_decay": 0.9}
    if cached:
        values |= {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
        values.pop("weighted_captions", None)
    assert waits(WaitCase(name, values), small, tmp_path, monkeypatch) == [[], []]


# ---- optimizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.package != BNB])
def test_optimizers_do_not_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of bitsandbytes is a call of its library.

    Those that find their rate compute it in Python, from sums that they fetch from the device: they wait in their own
    files, and nowhere else.
    """
    choice = choose_optimizer(OptimizerOptions(optimizer_type=name, learning_rate=1.0))
    built = choice.toy()
    weights = [p for group in built.optimizer.param_groups for p in group["params"]]
    with watched(monkeypatch) as found:
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            built.optimizer.step()
    assert bool(found) == choice.row.finds_rate, found
    own = {path.name for path in Path(inspect.getfile(choice.cls)).parent.glob("*.py")}
    assert all(line.rpartition(" > ")[2].partition(":")[0] in own for line in found), found


def test_adafactor_computes_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, for weights below and above the smallest size that its rate knows."""
    from transformers.optimization import Adafactor

    start = [torch.zeros(3, 4), torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.full((4,), 1e-4)]
    results = []
    for build in (
        lambda p: Adafactor([p]),
        lambda p: choose_optimizer(OptimizerOptions(optimizer_type="Adafactor")).build([{"params": [p]}]).optimizer,
    ):
        weights = [torch.nn.Parameter(value.clone()) for value in start]
        for weight in weights:
            optimizer = build(weight)
            for step in range(3):
                weight.grad = torch.full_like(weight, 0.1 * (step + 1))
                optimizer.step()
        results.append(weights)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert not torch.equal(results[0][0], start[0])


# ---- numbers that are logged ----------------------------------------------------------------------------------------


def test_numbers_arrive_together(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = StepReader(lag=4)
    others = {"rate": 0.5, "norm": torch.tensor(2.0), "count": torch.tensor(3), "wide": torch.tensor(1.5).double()}
    with watched(monkeypatch) as found:
        reader.push(
            1,
            torch.tensor(4.0),
            torch.tensor(5.0),
            ["a"],
            own_loss=torch.tensor(4.0),
            scaler_skips=False,
            others=others,
        )
    assert found == []
    (report,) = reader.flush()
    assert (report.loss, report.grad_norm) == (4.0, 5.0)
    assert report.others == {"rate": 0.5, "norm": 2.0, "count": 3.0, "wide": 1.5}


# ---- the watch itself -----------------------------------------------------------------------------------------------


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
        lambda x: torch.linalg.inv(x.diag() + 1),
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
