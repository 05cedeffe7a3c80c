# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps during the backward pass, so that the gradients of a model are never all in memory.

A unit is a set of weights that are stepped together, as soon as the last of their gradients has arrived; the gradients
are freed at once. The step is taken by the run's one optimizer, which sees only the weights of the unit during the
call. States, their file, learning rates, schedule and resume are therefore those of the plain step, and a run may
switch between the two. Only for optimizers that update each weight on its own (`OptimizerRow.by_weight`).

Clipping differs: the norm of all gradients is known only when the last has arrived, and the first are freed by then.
Each gradient is clipped by its own norm instead. Without clipping the result is bit-identical to the plain step.

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

from library.errors import raise_problems
from library.optim.options import FullOptimizerOptions

SIZE = 1 << 25  # numbers in a unit of --fused_backward_pass; a single larger weight may exceed it
EPS = 1e-6  # the same as in torch's clip_grad_norm_


@contextmanager
def only(optimizer: torch.optim.Optimizer, parts: Mapping[int, Sequence[Tensor]]) -> Iterator[None]:
    """Restrict the optimizer to some weights inside the context. parts: index of a group -> some of its weights."""
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
        """max_norm: limit of each gradient's norm; 0 does not clip. changed: called with the weights after their step.

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
        self._missing = [len(unit) for unit in self.units]  # gradients that have not arrived yet
        self._here: set[Tensor] = set()
        self._stepped: set[Tensor] = set()
        self.started = False  # weights may have changed in this step, so it cannot be repeated from the start
        self._norms: list[Tensor] = []

    def last_micro_batch(self, is_last: bool) -> None:
        """Call it before each backward pass. Gradients accumulate in all but the last one of a step."""
        self._armed = is_last
        self._start()

    def step_now(self, parameters: Sequence[Tensor]) -> None:
        """Step those of these weights that have a gradient, in the last backward pass: no more gradients will come."""
        if self._armed:
            self._step([p for p in parameters if p.grad is not None and p in self._unit and p not in self._stepped])

    def finish(self) -> Tensor:
        """Step the remaining weights, with or without a gradient. Call it after the last backward pass.

        Returns the norm of all gradients before clipping, 0-dim, float32, on the device.
        """
        self._step([p for p in self._group if p not in self._stepped])
        self._armed = False
        norms, (first, *_) = self._norms, self._group
        self._start()
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=first.device)

    def remove(self) -> None:
        """Remove the hooks: backward passes no longer step weights."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _arrived(self, parameter: Tensor) -> None:
        if not self._armed:
            return
        if parameter in self._stepped:
            raise RuntimeError("a weight got another gradient after its step in the same backward pass")
        if parameter in self._here:  # used in several blocks that were recomputed one by one
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
        """Record the norms and clip each gradient by its own."""
        norms = torch._foreach_norm(gradients, 2, torch.float32)
        self._norms += norms
        if self.max_norm:
            factors = (self.max_norm / (torch.stack(norms) + EPS)).clamp_(max=1.0)
            torch._foreach_mul_(gradients, list(factors.unbind()))


# ---- which weights are a unit ---------------------------------------------------------------------------------------


def units(
    groups: Sequence[Mapping[str, Any]], blocks: Sequence[nn.Module], options: FullOptimizerOptions
) -> list[list[nn.Parameter]]:
    """The weights of the optimizer's groups, divided into units as the options say.

    blocks: the model's blocks in the order of execution. Weights outside of them (embedders, text encoders) count as
    one more block, which comes first, in the order of the groups.
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
    """Consecutive weights of up to `size` numbers: stepping many small weights one by one is slow."""
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
    """At most `count` runs of consecutive weights with about the same number of elements."""
    total, before = sum(p.numel() for p in parameters), 0
    shares: list[list[nn.Parameter]] = [[] for _ in range(count)]
    for p in parameters:
        shares[min(count - 1, (before + p.numel() // 2) * count // max(total, 1))].append(p)
        before += p.numel()
    return [share for share in shares if share]


def check_in_backward(
    option: str, optimizer: str, *, by_weight: bool, scaled: bool, processes: int, deepspeed: bool
) -> None:
    """Raises UserError when this run cannot step weights during the backward pass as `option` asks.

    optimizer: its name. scaled: gradients are scaled (fp16), and only after the pass is it known whether that worked.
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
    raise_problems(problems)
