# SPDX-License-Identifier: Apache-2.0
"""Weights that are stepped during the backward pass, so that the gradients of a model are never all in memory.

A unit is some weights that are stepped together, as soon as the last of their gradients is there; the gradients are
freed at once. The step is that of the run's one optimizer, which sees only the weights of the unit for the call. So
states, their file, learning rates, schedule and resume are those of the plain step, and a run may change from one to
the other. Only for optimizers whose update of a weight depends on that weight alone (`Row.by_weight`).

Clipping differs: the norm of all gradients is known only when the last of them is there, and the first are gone by
then. Each gradient is therefore scaled down to the limit by its own norm. Without a limit the result is the plain one,
to the last bit.

    in_backward = InBackward(optimizer, units(groups, blocks, options), max_norm)
    for each micro-batch:
        in_backward.last_micro_batch(index == last)
        loss.backward()
    norm = in_backward.finish()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.optim.options import FullOptimizerOptions

SIZE = 1 << 25  # numbers in a unit of --fused_backward_pass, beside single weights that are larger
EPS = 1e-6  # as torch's clip_grad_norm_ has it


@contextmanager
def only(optimizer: torch.optim.Optimizer, parts: Mapping[int, Sequence[Tensor]]) -> Iterator[None]:
    """Inside it the optimizer knows these weights and no others. parts: number of a group -> some of its weights."""
    groups = optimizer.param_groups
    kept = {i: groups[i]["params"] for i in parts}
    optimizer.param_groups = [groups[i] for i in parts]
    for i, part in parts.items():
        groups[i]["params"] = list(part)
    try:
        yield
    finally:
        for i, params in kept.items():
            groups[i]["params"] = params
        optimizer.param_groups = groups


class InBackward:
    """Steps the weights of `units` as their gradients arrive. Every weight of the optimizer is in one unit."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        units: Sequence[Sequence[Tensor]],
        max_norm: float,
        changed: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> None:
        """max_norm: of each gradient; 0 does not clip. changed: is told which weights have just been stepped.

        Raises ValueError when the units are not exactly the optimizer's weights.
        """
        self.optimizer, self.units, self.max_norm, self.changed = optimizer, units, max_norm, changed
        self._group = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._unit = {p: i for i, unit in enumerate(units) for p in unit}
        if self._group.keys() != self._unit.keys() or sum(map(len, units)) != len(self._unit):
            raise ValueError("each weight of the optimizer has to be in one unit")
        self._armed = False
        self._start()
        self._handles = [p.register_post_accumulate_grad_hook(self._arrived) for p in self._unit]

    def _start(self) -> None:
        self._missing = [len(unit) for unit in self.units]  # gradients that have not come yet
        self._here: set[Tensor] = set()
        self._stepped: set[Tensor] = set()
        self.started = False  # whether weights of this step may have changed: it cannot be done again from the start
        self._norms: list[Tensor] = []

    def last_micro_batch(self, is_last: bool) -> None:
        """Before each backward pass. In all but the last of a step, gradients add up as usual."""
        self._armed = is_last
        self._start()

    def step_now(self, parameters: Sequence[Tensor]) -> None:
        """Step what of these has a gradient and was not stepped, in the last backward pass: no more will come."""
        if self._armed:
            self._step([p for p in parameters if p.grad is not None and p in self._unit and p not in self._stepped])

    def finish(self) -> Tensor:
        """After the last backward pass: step what is left, weights without a gradient among it.

        Returns the norm of all gradients before clipping, 0-dim, float32, on the device.
        """
        self._step([p for p in self._group if p not in self._stepped])
        self._armed = False
        norms, (first, *_) = self._norms, self._group
        self._start()
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=first.device)

    def remove(self) -> None:
        """Backward passes are the usual ones again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _arrived(self, parameter: Tensor) -> None:
        if not self._armed:
            return
        if parameter in self._stepped:
            raise RuntimeError("a weight got another gradient after its step in the same backward pass")
        if parameter in self._here:  # used in several parts that were recomputed one by one
            return
        self._here.add(parameter)
        number = self._unit[parameter]
        self._missing[number] -= 1
        if not self._missing[number]:
            self._step([p for p in self.units[number] if p not in self._stepped])

    @torch.no_grad()
    def _step(self, parameters: Sequence[Tensor]) -> None:
        if not parameters:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            self._clip(gradients)
        parts: dict[int, list[Tensor]] = {}
        for p in parameters:
            parts.setdefault(self._group[p], []).append(p)
        self.started = True
        with only(self.optimizer, parts):
            self.optimizer.step()
        for p in parameters:
            p.grad = None
        self._stepped.update(parameters)
        if self.changed is not None:
            self.changed(parameters)

    def _clip(self, gradients: list[Tensor]) -> None:
        """Collect the norms, and scale each gradient down to the limit."""
        norms = torch._foreach_norm(gradients, 2, torch.float32)
        self._norms += norms
        if self.max_norm:
            factors = (self.max_norm / (torch.stack(norms) + EPS)).clamp_(max=1.0)
            torch._foreach_mul_(gradients, list(factors.unbind()))


# ---- which weights are a unit ---------------------------------------------------------------------------------------


def units(
    groups: Sequence[Mapping[str, Any]], blocks: Sequence[nn.Module], options: FullOptimizerOptions
) -> list[list[nn.Parameter]]:
    """The weights of the optimizer's groups, as the options want them stepped together.

    blocks: of the model in the order of execution. Weights outside of them (embedders, text encoders) are taken in the
    order of the groups, as those of one more block that comes first.
    """
    learning = {p: None for group in groups for p in group["params"]}
    inside: list[list[nn.Parameter]] = []
    for block in blocks:
        inside.append([p for p in block.parameters() if p in learning])
        for p in inside[-1]:
            del learning[p]
    outside = list(learning)
    if options.fused_optimizer_groups:
        return _shares([*outside, *(p for block in inside for p in block)], options.fused_optimizer_groups)
    if options.blockwise_fused_optimizers:
        return [*_runs(outside), *(block for block in inside if block)]
    return [run for block in (outside, *inside) for run in _runs(block)]


def _runs(parameters: Sequence[nn.Parameter], size: int = SIZE) -> list[list[nn.Parameter]]:
    """Neighbours together, up to `size` numbers: many small weights cost as much time as few large ones."""
    runs: list[list[nn.Parameter]] = []
    room = 0
    for p in parameters:
        if not runs or p.numel() > room:
            runs.append([])
            room = size
        runs[-1].append(p)
        room -= p.numel()
    return runs


def _shares(parameters: Sequence[nn.Parameter], count: int) -> list[list[nn.Parameter]]:
    """At most `count` runs of nearly as many numbers each."""
    total, before = sum(p.numel() for p in parameters), 0
    shares: list[list[nn.Parameter]] = [[] for _ in range(count)]
    for p in parameters:
        shares[min(count - 1, (before + p.numel() // 2) * count // max(total, 1))].append(p)
        before += p.numel()
    return [share for share in shares if share]


def check_in_backward(
    option: str, optimizer: str, *, by_weight: bool, scaled: bool, processes: int, deepspeed: bool
) -> None:
    """Raises UserError, naming the option, where this run cannot step weights during the backward pass.

    optimizer: its name. scaled: fp16 gradients with a scale that is known to be right only after the pass.
    """
    problems = []
    if not by_weight:
        problems.append(
            f"{option} steps weights one after the other, and {optimizer} needs all of them at once: leave one of them "
            "out, or use AdamW, AdamW8bit, Adafactor or Lion"
        )
    if scaled:
        problems.append(
            f"{option} does not work with --mixed_precision fp16: only after the whole backward pass is it known "
            "whether the scaled gradients are finite; use bf16"
        )
    if deepspeed:
        problems.append(f"{option} does not work with --deepspeed, which steps the weights itself")
    elif processes > 1:
        problems.append(f"{option} works in one process only: the gradients of {processes} are joined after the pass")
    if problems:
        raise UserError(problems)
