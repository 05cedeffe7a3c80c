# SPDX-License-Identifier: Apache-2.0
"""Options of the optimizer, the learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options import at_least, between, int_or_fraction, option
from library.values import rate


@dataclass(frozen=True)
class OptimizerOptions:
    """Which optimizer learns, how fast, and with which settings."""

    optimizer_type: str = option(
        "", help="Name of an optimizer (AdamW when not given), a class of torch.optim, or any module.Class."
    )
    use_8bit_adam: bool = option(False, help="The same as --optimizer_type AdamW8bit.")
    use_lion_optimizer: bool = option(False, help="The same as --optimizer_type Lion.")
    learning_rate: float = option(2e-6, help="Learning rate of everything that has no rate of its own.", check=rate)
    max_grad_norm: float = option(
        1.0, help="Scale the gradient down to this norm where it is larger; 0 switches that off.", check=at_least(0)
    )
    optimizer_args: tuple[str, ...] | None = option(
        None, help='Settings of the optimizer as name=value, for example weight_decay=0.01 "betas=(0.9, 0.99)".'
    )
    fused_backward_pass: bool = option(
        False,
        help="Step each weight as soon as its gradient is there.",
        answer="the gradients of what is trained here are small; full training has it",
    )

    @property
    def name(self) -> str:
        """The optimizer that is meant, as the user wrote it."""
        if self.use_8bit_adam:
            return "AdamW8bit"
        if self.use_lion_optimizer:
            return "Lion"
        return self.optimizer_type or "AdamW"

    @property
    def kahan(self) -> bool:
        """Whether the optimizer's name says that weights in bf16 keep what rounding cuts off."""
        return self.name.lower().endswith("kahan")

    def problems(self) -> Iterator[str]:
        """Combinations that make no sense."""
        flags = {"--use_8bit_adam": self.use_8bit_adam, "--use_lion_optimizer": self.use_lion_optimizer}
        given = [flag for flag, value in flags.items() if value]
        if self.optimizer_type:
            given.append("--optimizer_type")
        if len(given) > 1:
            yield f"{' and '.join(given)} each name an optimizer: give one of them"


IN_BACKWARD = (
    "during the backward pass, as soon as their gradients are there, which are freed at once. --max_grad_norm then "
    "limits the norm of each weight's gradient, not the norm of all gradients together; with --max_grad_norm 0 the "
    "result is that of the plain step."
)


@dataclass(frozen=True)
class FullOptimizerOptions(OptimizerOptions):
    """Which optimizer learns, how fast, with which settings, and when in a step."""

    fused_backward_pass: bool = option(False, help=f"Step weights one after the other {IN_BACKWARD}")
    blockwise_fused_optimizers: bool = option(False, help=f"Step the weights of a block together {IN_BACKWARD}")
    fused_optimizer_groups: int | None = option(
        None, help=f"Step weights in this many groups {IN_BACKWARD}", check=at_least(1), zero_is_unset=True
    )

    @property
    def in_backward(self) -> str | None:
        """The option that asks for steps during the backward pass."""
        return next(self._ways(), None)

    def _ways(self) -> Iterator[str]:
        for name in ("fused_backward_pass", "blockwise_fused_optimizers", "fused_optimizer_groups"):
            if vars(self)[name]:
                yield f"--{name}"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        given = list(self._ways())
        if len(given) > 1:
            yield f"{' and '.join(given)} each say which weights are stepped together: give one of them"


@dataclass(frozen=True)
class SchedulerOptions:
    """How the learning rate changes over the run."""

    lr_scheduler: str = option("constant", help="Name of the learning-rate schedule.")
    lr_scheduler_type: str = option(
        "", help="A class of torch.optim.lr_scheduler or any module.Class instead of --lr_scheduler."
    )
    lr_scheduler_args: tuple[str, ...] | None = option(None, help="Settings of the schedule as name=value.")
    lr_warmup_steps: int | float = option(
        0,
        help="Raise the learning rate from 0 over this many steps (below 1: a fraction of the run; or 5%).",
        parse=int_or_fraction,
        check=at_least(0),
    )
    lr_decay_steps: int | float = option(
        0,
        help="Length of the fall of warmup_stable_decay, in steps (below 1: a fraction of the run; or 5%).",
        parse=int_or_fraction,
        check=at_least(0),
    )
    lr_scheduler_num_cycles: int = option(
        1, help="Number of cycles of the schedules with restarts or minimum.", check=at_least(1)
    )
    lr_scheduler_power: float = option(1.0, help="Exponent of the polynomial schedule.", check=at_least(0))
    lr_scheduler_timescale: int | None = option(
        None, help="Time scale of inverse_sqrt in steps (the warm-up steps, or 10000).", check=at_least(1)
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None, help="Lowest learning rate of the schedules with a minimum, relative to the first.", check=between(0, 1)
    )

    def problems(self) -> Iterator[str]:
        """Combinations that make no sense."""
        for flag, value in (("--lr_warmup_steps", self.lr_warmup_steps), ("--lr_decay_steps", self.lr_decay_steps)):
            if isinstance(value, float) and value > 1:
                yield f"{flag} {value:g}: give whole steps, a fraction below 1 or a percentage up to 100%"


@dataclass(frozen=True)
class EmaOptions:
    """A moving average of the trained weights."""

    ema_decay: float | None = option(
        None, help="Keep a moving average of the trained weights with this decay (0.999 is usual) and save that.",
        check=between(0, 1),
    )  # fmt: skip
