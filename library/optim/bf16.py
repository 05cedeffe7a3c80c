# SPDX-License-Identifier: Apache-2.0
"""Updates of bf16 weights that are exact on average (stochastic rounding) or exact (the remainder is kept).

A bf16 number has 8 significant bits: an update smaller than 1/512 of its weight rounds to nothing, however often it is
repeated. Here the optimizer works on float32 copies of weights and gradients, a few weights at a time, and the result
is written back in one of two ways:

    stochastic   rounded up or down at random, so that the expected value is the float32 one
    kahan        rounded to nearest; the remainder is kept in 16 more bits and added in the next step, as in Kahan
                 summation (1965). Both parts together are exactly the float32 weight

    built = build_bf16(choice, groups, "stochastic", seed=run_seed)       # in place of choice.build(groups)

The optimizer's states are float32. Both ways are elementwise, never read a value on the host, and are the same in every
process: the random numbers for a weight depend on (seed, its number of steps, its index), and not on which weights are
stepped together or in which order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from library.exchange import Rows
from library.optim.in_backward import only
from library.optim.optimizers import BuiltOptimizer, OptimizerChoice
from library.rng import torch_generator

LOW_BITS = 16  # bits that a float32 has beyond a bf16
CHUNK = 1 << 24  # float32 numbers in memory at a time; a single larger weight may exceed it
STATE_KEY = "bf16_update"


# ---- numbers --------------------------------------------------------------------------------------------------------


def round_stochastic(x: Tensor, generator: torch.Generator | None, rows: Rows | None = None) -> Tensor:
    """Round float32 to a neighbouring bf16 at random; the expected value is x. Infinities and nan are kept.

    Adds uniform noise below the last bf16 digit and truncates: the bits of floats are ordered like their magnitudes.
    rows: of a shard.
    """

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randint(0, 1 << LOW_BITS, shape, dtype=torch.int32, device=x.device, generator=generator)

    noise = draw(x.shape) if rows is None else rows.noise(x, draw)
    rounded = (noise.add_(x.view(torch.int32)) >> LOW_BITS).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isfinite(), rounded, x.bfloat16())


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 into (nearest bf16, int16 remainder in units of the last float32 digit). `join` is the inverse.

    The remainder of infinities and nan is 0.
    """
    bits = x.view(torch.int32)
    high = (bits + (1 << LOW_BITS - 1)) >> LOW_BITS
    low = (bits - (high << LOW_BITS)).to(torch.int16)
    finite = x.isfinite()
    nearest = torch.where(finite, high.to(torch.int16).view(torch.bfloat16), x.bfloat16())
    return nearest, torch.where(finite, low, 0)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers that `split` took apart, exactly."""
    return ((high.view(torch.int16).to(torch.int32) << LOW_BITS) + low).view(torch.float32)


# ---- one weight -----------------------------------------------------------------------------------------------------


class Weight:
    """A bf16 weight and its float32 shadow: a parameter of the inner optimizer that has memory only while in use."""

    def __init__(self, real: Tensor, number: int, *, keeps_rest: bool, rows: Rows | None = None) -> None:
        """rows: of a shard."""
        self.real, self.number, self.rows = real, number, rows
        self.steps = 0
        self.empty = torch.zeros((), device=real.device).expand(real.shape)  # the shape without the memory
        self.shadow = nn.Parameter(self.empty)
        self.rest = torch.zeros_like(real, dtype=torch.int16) if keeps_rest else None

    def show(self) -> None:
        """Fill the shadow with the weight and its gradient."""
        real = self.real.detach()
        self.shadow.data = real.float() if self.rest is None else join(real, self.rest)
        self.shadow.grad = None if self.real.grad is None else self.real.grad.float()

    def take(self, seed: int) -> None:
        """Write the updated shadow back to the weight."""
        real, value = self.real.detach(), self.shadow.detach()
        if self.rest is None:
            generator = torch_generator(seed, "bf16 update", self.steps, self.number, device=value.device)
            real.copy_(round_stochastic(value, generator, self.rows))
        else:
            nearest, rest = split(value)
            real.copy_(nearest)
            self.rest.copy_(rest)
        self.steps += 1

    def look(self) -> None:
        """Write the shadow to the weight for evaluation; the remainder stays that of the training weight."""
        self.real.detach().copy_(self.shadow.detach())

    def hide(self) -> None:
        """Free the float32 memory."""
        self.shadow.grad = None
        self.shadow.data = self.empty


# ---- all weights ----------------------------------------------------------------------------------------------------


class Bf16Optimizer(torch.optim.Optimizer):
    """An optimizer of bf16 weights that runs an inner optimizer on their float32 shadows.

    whole: the inner optimizer needs all weights at once (it computes something over all of them, or counts its steps
    per group); all float32 copies are then in memory together. rows: of those weights that are shards.
    """

    def __init__(
        self,
        build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        groups: Sequence[dict[str, Any]],
        rounding: str,
        *,
        seed: int,
        whole: bool = True,
        chunk: int = CHUNK,
        rows: Mapping[Tensor, Rows] | None = None,
    ) -> None:
        # super().__init__ is not called: groups, defaults and states are those of the inner optimizer
        self.seed, self.whole, self.chunk = seed, whole, chunk
        numbers, kahan = count(), rounding == "kahan"
        rows = rows or {}
        self.weights = [
            [Weight(p, next(numbers), keeps_rest=kahan, rows=rows.get(p)) for p in group["params"]] for group in groups
        ]
        self._weight_of = {weight.real: weight for own in self.weights for weight in own}
        shadows = [{**group, "params": [w.shadow for w in own]} for group, own in zip(groups, self.weights)]
        self.inner = build(shadows)
        self._name(lambda weight: weight.real)

    def _name(self, which: Callable[[Weight], Tensor]) -> None:
        for group, own in zip(self.inner.param_groups, self.weights, strict=True):
            group["params"] = [which(weight) for weight in own]

    @contextmanager
    def _inside(self) -> Iterator[torch.optim.Optimizer]:
        """The inner optimizer with its own parameters in its groups."""
        self._name(lambda weight: weight.shadow)
        try:
            yield self.inner
        finally:
            self._name(lambda weight: weight.real)

    # ---- the interface of torch.optim.Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.inner.defaults

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """The inner optimizer's states, by weight."""
        pairs = ((real, weight.shadow) for real, weight in self._weight_of.items())
        return {real: self.inner.state[shadow] for real, shadow in pairs if shadow in self.inner.state}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for real in self._weight_of:
            if set_to_none:
                real.grad = None
            elif real.grad is not None:
                real.grad.zero_()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step all weights, a chunk at a time; inside `only`, the weights that it names."""
        assert closure is None, "the loss is evaluated once per step"
        for parts in self._chunks():
            weights = [weight for part in parts.values() for weight in part]
            for weight in weights:
                weight.show()
            with only(self.inner, {i: [weight.shadow for weight in part] for i, part in parts.items()}):
                self.inner.step()
            for weight in weights:
                weight.take(self.seed)
                weight.hide()

    def _chunks(self) -> Iterator[dict[int, list[Weight]]]:
        """The weights that are stepped together, by index of their group."""
        visible = [[self._weight_of[p] for p in group["params"]] for group in self.param_groups]
        if self.whole:
            yield dict(enumerate(visible))
            return
        for i, own in enumerate(visible):
            part: list[Weight] = []
            size = 0
            for weight in own:
                if part and size + weight.real.numel() > self.chunk:
                    yield {i: part}
                    part, size = [], 0
                part.append(weight)
                size += weight.real.numel()
            if part:
                yield {i: part}

    # ---- train and eval modes of schedule-free optimizers

    def train(self) -> None:
        self._change_mode("train")

    def eval(self) -> None:
        self._change_mode("eval")

    @torch.no_grad()
    def _change_mode(self, mode: str) -> None:
        weights = self._weight_of.values()
        with self._inside() as inner:
            for weight in weights:
                weight.show()
            getattr(inner, mode)()
            for weight in weights:
                weight.look()
                weight.hide()

    # ---- states

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, the number of steps and the remainders."""
        with self._inside() as inner:
            state = inner.state_dict()
        weights = self._weight_of.values()
        steps = max(weight.steps for weight in weights)  # between steps it is the same for all
        return {**state, STATE_KEY: {"steps": steps, "rests": [weight.rest for weight in weights]}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state`. Raises ValueError when it was saved for other weights or another --bf16_update."""
        own = dict(state)
        kept = own.pop(STATE_KEY)
        with self._inside() as inner:
            inner.load_state_dict(own)
        for weight, rest in zip(self._weight_of.values(), kept["rests"], strict=True):
            weight.steps = kept["steps"]
            if (rest is None) != (weight.rest is None):
                raise ValueError("the state was saved with another --bf16_update")
            if weight.rest is not None:
                weight.rest.copy_(rest)


def build_bf16(
    choice: OptimizerChoice, groups: list[dict[str, Any]], rounding: str, *, seed: int, chunk: int = CHUNK,
    rows: Mapping[Tensor, Rows] | None = None,
) -> BuiltOptimizer:  # fmt: skip
    """Like `choice.build(groups)`, for bf16 weights. rounding: "stochastic", "kahan", or "plain" (to nearest).

    rows: of those weights that are shards. What a shard becomes does not depend on the number of shards.
    Raises UserError when the optimizer refuses its settings.
    """
    if rounding == "plain":
        return choice.build(groups)
    groups = choice.divided(groups)
    built: list[BuiltOptimizer] = []

    def build(shadows: list[dict[str, Any]]) -> torch.optim.Optimizer:
        built.append(choice.build(shadows))
        return built[0].optimizer

    whole = not choice.row.by_weight
    optimizer = Bf16Optimizer(build, groups, rounding, seed=seed, whole=whole, chunk=chunk, rows=rows)
    built[0].optimizer = optimizer
    return built[0]
