# SPDX-License-Identifier: Apache-2.0
"""Monitoring of a run: numbers are read from the device late and asynchronously, but always before a save."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.device import HostCopy, on_device
from library.errors import StopTraining, first_names

LIKELY_CAUSES = (
    "Likely causes: a learning rate that is too high, fp16 overflow (use --mixed_precision bf16, or --no_half_vae), "
    "or a damaged picture. Nothing was saved over an earlier file; --resume the last state with a lower rate."
)
# fp16: each step that the scaler skips halves its scale, from 65536; after so many in a row the scale is not the cause
MOST_SKIPS = 30


@dataclass(frozen=True)
class StepReport:
    """The numbers of one optimizer step, on the host."""

    step: int
    loss: float
    grad_norm: float
    others: dict[str, float]  # learning rates and other numbers of the step


@dataclass(frozen=True)
class _Pending:
    step: int
    names: list[str]
    values: HostCopy  # loss, gradient norm, loss of this process, then `measured`
    scaler_skips: bool
    measured: list[str]  # names of the other numbers that come from the device
    known: dict[str, float]  # those that were on the host


class StepReader:
    """Returns step reports as they arrive from the device, at most `lag` steps late; stops a run that diverged."""

    def __init__(self, *, lag: int) -> None:
        self.lag = lag
        self._pending: deque[_Pending] = deque()
        self._skipped = 0  # steps in a row that the fp16 scaler left out

    def push(self, step: int, loss: Tensor, grad_norm: Tensor, names: Sequence[str], *, own_loss: Tensor,
             scaler_skips: bool, others: dict[str, float | Tensor]) -> None:  # fmt: skip
        """loss, grad_norm and tensors among `others`: 0-dim, copied to the host together, without waiting for them.

        names, own_loss: pictures and loss of this process. scaler_skips: fp16, where the scaler handles non-finite
        gradients.
        """
        measured = {name: value for name, value in others.items() if isinstance(value, Tensor)}
        known = {name: float(value) for name, value in others.items() if name not in measured}
        numbers = (loss, grad_norm, own_loss, *measured.values())
        values = HostCopy(torch.stack([on_device(number.detach().float(), loss.device) for number in numbers]))
        self._pending.append(_Pending(step, list(names), values, scaler_skips, [*measured], known))

    def arrived(self) -> list[StepReport]:
        """Reports of the steps whose numbers have arrived. Raises StopTraining if one is not finite."""
        return list(self._take(lambda p: p.values.ready or len(self._pending) > self.lag))

    def flush(self) -> list[StepReport]:
        """All outstanding reports; waits for the device. Called before each save."""
        return list(self._take(lambda p: True))

    def _take(self, may_read: Callable[[_Pending], bool]) -> Iterable[StepReport]:
        while self._pending and may_read(self._pending[0]):
            item = self._pending.popleft()
            loss, norm, own_loss, *measured = item.values.value().tolist()
            wrong = "loss" if not math.isfinite(loss) else "gradient norm"
            self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
            may_skip = item.scaler_skips and self._skipped <= MOST_SKIPS
            if not math.isfinite(loss) or (not math.isfinite(norm) and not may_skip):
                elsewhere = not math.isfinite(loss) and math.isfinite(own_loss)
                pictures = "in another process's batch" if elsewhere else first_names(item.names, 8)
                raise StopTraining(
                    f"the {wrong} of step {item.step} is not finite (loss {loss}, gradient norm {norm}). "
                    f"Its pictures: {pictures}. {LIKELY_CAUSES}",
                    only_here=not math.isfinite(own_loss),
                )
            yield StepReport(item.step, loss, norm, {**item.known, **dict(zip(item.measured, measured, strict=True))})


class MovingAverage:
    """Mean of the last `size` losses, shown in the progress bar."""

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self.values: deque[float] = deque(values, maxlen=max(size, 1))

    def add(self, value: float) -> None:
        self.values.append(value)

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values) if self.values else math.nan


class GradientWatch:
    """Records until the first save which modules have received a gradient."""

    def __init__(self, modules: Mapping[str, Sequence[nn.Parameter]]) -> None:
        learning = {name: [p for p in parameters if p.requires_grad] for name, parameters in modules.items()}
        self.silent = {name for name, parameters in learning.items() if parameters}
        self._hooks = {
            name: [p.register_post_accumulate_grad_hook(lambda _, n=name: self._heard(n)) for p in parameters]
            for name, parameters in learning.items()
        }

    def _heard(self, name: str) -> None:
        self.silent.discard(name)
        for handle in self._hooks.pop(name, ()):
            handle.remove()

    def stop(self) -> list[str]:
        """Stop watching. Returns the names of modules whose parameters never received a gradient."""
        for handles in self._hooks.values():
            for handle in handles:
                handle.remove()
        self._hooks.clear()
        return sorted(self.silent)
