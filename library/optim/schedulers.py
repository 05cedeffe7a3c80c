# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules: one formula per name, which maps the optimizer step to a factor of the base rate.

`step()` is called once per optimizer step, whatever the number of processes, so all lengths are in optimizer steps.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from library.errors import UserError, unknown
from library.log import get_logger
from library.optim.optimizers import BuiltOptimizer, OptimizerChoice
from library.optim.options import SchedulerOptions
from library.optim.settings import check_settings, first_line, import_class, read_settings
from library.values import MOST, cut, number, whole_number

FLAG, TYPE_FLAG, ARGS_FLAG = "--lr_scheduler", "--lr_scheduler_type", "--lr_scheduler_args"
LOWEST_POLYNOMIAL_LR = 1e-7
INVERSE_SQRT_TIMESCALE = 10_000
TINY = 1e-6  # a rate of 0 may come out this far below 0 through rounding
MOST_TRIED = 10_000  # steps for which a foreign class is tried

Factor = Callable[[int], float]


@dataclass(frozen=True)
class ScheduleConfig:
    """Inputs of the formulas: lengths in optimizer steps, and the values of the options."""

    total: int
    warmup: int
    decay: int
    cycles: int
    power: float
    timescale: int | None
    min_ratio: float | None
    base_lr: float

    def progress(self, step: int) -> float:
        """Fraction of the run after the warm-up that has passed: 0 to 1, and beyond after the end."""
        return (step - self.warmup) / max(1, self.total - self.warmup)


# ---- formulas: factor after the warm-up ---------------------------------------------------------------------------


def constant(config: ScheduleConfig) -> Factor:
    return lambda step: 1.0


def linear(config: ScheduleConfig) -> Factor:
    return lambda step: max(0.0, (config.total - step) / max(1, config.total - config.warmup))


def cosine(config: ScheduleConfig, *, num_cycles: float = 0.5) -> Factor:
    return lambda step: max(0.0, cosine_wave(num_cycles * 2 * config.progress(step)))


def cosine_with_restarts(config: ScheduleConfig) -> Factor:
    def factor(step: int) -> float:
        progress = config.progress(step)
        return 0.0 if progress >= 1 else cosine_wave((config.cycles * progress) % 1)

    return factor


def polynomial(config: ScheduleConfig, *, lr_end: float = LOWEST_POLYNOMIAL_LR) -> Factor:
    if config.base_lr <= lr_end:
        raise UserError(f"{FLAG} polynomial ends at {lr_end:g}: --learning_rate {config.base_lr:g} must be greater")
    end = lr_end / config.base_lr
    return lambda step: end if step > config.total else (1 - end) * (1 - config.progress(step)) ** config.power + end


def inverse_sqrt(config: ScheduleConfig, *, timescale: int | None = None) -> Factor:
    scale = timescale or config.timescale or config.warmup or INVERSE_SQRT_TIMESCALE
    return lambda step: 1 / math.sqrt((step + scale - config.warmup) / scale)


def cosine_with_min_lr(config: ScheduleConfig, *, min_lr: float | None = None) -> Factor:
    low = lowest(config, min_lr, "cosine_with_min_lr")
    return lambda step: low + (1 - low) * cosine_wave(config.cycles * config.progress(step))


def cosine_warmup_with_min_lr(
    config: ScheduleConfig, *, min_lr: float | None = None, warmup_lr_rate: float | None = None
) -> Factor:
    """Like cosine_with_min_lr, one step ahead; the warm-up starts at `warmup_lr_rate`, or at 1 / warm-up steps."""
    low = lowest(config, min_lr, "cosine_warmup_with_min_lr")

    def factor(step: int) -> float:
        if step >= config.warmup:
            return low + (1 - low) * cosine_wave(config.cycles * config.progress(step + 1))
        if warmup_lr_rate is None:
            return (step + 1) / config.warmup
        return warmup_lr_rate + (1 - warmup_lr_rate) * step / max(1, config.warmup - 1)

    return factor


# progress 0..1 -> factor 0..1
RISES: dict[str, Callable[[float], float]] = {
    "linear": lambda p: p,
    "cosine": lambda p: 0.5 * (1 - math.cos(math.pi * p)),
    "1-sqrt": lambda p: 1 - math.sqrt(1 - p),
}
# progress 0..1 and number of half waves -> factor 1..0
FALLS: dict[str, Callable[[float, int], float]] = {
    "linear": lambda p, cycles: 1 - p,
    "cosine": lambda p, cycles: cosine_wave(cycles * p),
    "1-sqrt": lambda p, cycles: 1 - math.sqrt(p),
}


def warmup_stable_decay(config: ScheduleConfig, *, warmup_type: str = "linear", decay_type: str = "cosine") -> Factor:
    """Rise from the minimum to 1, stay there, and fall to the minimum over the last `decay` steps."""
    for name, value in (("warmup_type", warmup_type), ("decay_type", decay_type)):
        if value not in RISES:
            raise UserError(unknown(f"{ARGS_FLAG} {name}", str(value), RISES))
    if config.warmup + config.decay > config.total:
        raise UserError(
            f"{FLAG} warmup_stable_decay: --lr_warmup_steps {config.warmup} and --lr_decay_steps {config.decay} "
            f"are longer than the run of {config.total} steps"
        )
    low = config.min_ratio or 0.0
    stable_end = config.total - config.decay

    def shape(step: int) -> float:
        if step < config.warmup:
            return RISES[warmup_type](step / config.warmup)
        if step < stable_end:
            return 1.0
        progress = (step - stable_end) / max(1, config.decay)
        if progress >= 1:
            return 0.0
        return FALLS[decay_type](progress, config.cycles)

    return lambda step: low + (1 - low) * shape(step)


def piecewise_constant(config: ScheduleConfig, *, step_rules: str = "") -> Factor:
    """Factors by step: "1:10,0.1:20,0.01" is 1 before step 10, 0.1 before step 20, and 0.01 afterwards."""
    *rules, last = step_rules.split(",")
    try:
        factors = [(whole_number(end), number(value)) for value, end in (rule.split(":") for rule in rules)]
        final = number(last)
    except ValueError:
        raise UserError(
            f"{FLAG} piecewise_constant needs {ARGS_FLAG} \"step_rules='1:10,0.1:20,0.01'\" "
            f"(factor:until step, ..., last factor), got '{cut(step_rules)}'"
        ) from None
    return lambda step: next((value for end, value in sorted(factors) if step < end), final)


def cosine_wave(turns: float) -> float:
    """A cosine from 0 to 1: 1 at 0, 0 at 1, 1 at 2."""
    return 0.5 * (1 + math.cos(math.pi * turns))


def lowest(config: ScheduleConfig, min_lr: float | None, name: str) -> float:
    """The lowest factor: --lr_scheduler_min_lr_ratio, or `min_lr` divided by the base rate. Raises UserError."""
    if config.min_ratio is not None:
        return config.min_ratio
    if min_lr is not None:
        return min_lr / config.base_lr
    raise UserError(f"{FLAG} {name} needs its lowest rate: give --lr_scheduler_min_lr_ratio (0.1, for example)")


SCHEDULES: dict[str, Callable[..., Factor]] = {
    "constant": constant,
    "constant_with_warmup": constant,
    "linear": linear,
    "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts,
    "polynomial": polynomial,
    "inverse_sqrt": inverse_sqrt,
    "cosine_with_min_lr": cosine_with_min_lr,
    "cosine_warmup_with_min_lr": cosine_warmup_with_min_lr,
    "warmup_stable_decay": warmup_stable_decay,
    "piecewise_constant": piecewise_constant,
}
# the common linear warm-up from 0 precedes all others
WITHOUT_COMMON_WARMUP = ("constant", "cosine_warmup_with_min_lr", "warmup_stable_decay", "piecewise_constant")
NO_WARMUP = {"constant": "use constant_with_warmup", "reduce_lr_on_plateau": "leave it out"}
ONLY_FOR = {  # option -> the schedules that read it
    "lr_decay_steps": ("warmup_stable_decay",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": (
        "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau",
    ),
}  # fmt: skip
OF_OPTIONS = ("min_lrs",)  # attributes that torch's schedules save in their state although options set them
OTHER_NAMES = ("reduce_lr_on_plateau", "adafactor:<learning rate>")


def with_warmup(factor: Factor, warmup: int) -> Factor:
    """A linear rise from 0 over `warmup` steps, followed by `factor`."""
    return lambda step: step / warmup if step < warmup else factor(step)


# ---- what the trainer holds ---------------------------------------------------------------------------------------


class RelativeStepRate(LRScheduler):
    """The rate that Adafactor computes for itself: `initial` before the first step, then min(1e-2, 1/sqrt(step)).

    For display only. The scale of each tensor (scale_parameter) is left out: reading it would wait for the device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, initial: float) -> None:
        self.optimizer, self.initial, self.last_epoch = optimizer, initial, 0

    def step(self, epoch: int | None = None) -> None:
        self.last_epoch += 1

    def get_last_lr(self) -> list[float | torch.Tensor]:
        return [self._rate(group) for group in self.optimizer.param_groups]

    def _rate(self, group: Mapping[str, Any]) -> float:
        if self.last_epoch == 0:
            return self.initial
        start = 1e-6 * self.last_epoch if group["warmup_init"] else 1e-2
        return min(start, 1 / math.sqrt(self.last_epoch))

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]


class BuiltScheduler:
    """A learning-rate schedule. Wraps torch's schedules, some of which take the loss, in one interface."""

    def __init__(self, scheduler: LRScheduler) -> None:
        self.scheduler = scheduler

    @property
    def needs_loss(self) -> bool:
        """Whether `step` takes the averaged loss (a number on the host)."""
        return isinstance(self.scheduler, ReduceLROnPlateau)

    def step(self, loss: float | None = None) -> None:
        """Advance the schedule. Call it after every optimizer step."""
        if not self.needs_loss:
            self.scheduler.step()
        elif loss is None:
            raise ValueError("this schedule has to be given the loss")
        else:
            self.scheduler.step(loss)  # type: ignore[arg-type]

    def get_last_lr(self) -> list[float]:
        """The rate of each group for the next step."""
        return [float(rate) for rate in self.scheduler.get_last_lr()]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next `step` depends on except the optimizer's groups."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state` exactly. Load the optimizer's state first: recursive schedules read its rates.

        The rate of the next step is that of this schedule, which may differ from the one that was saved.
        """
        own = {name: vars(self.scheduler)[name] for name in OF_OPTIONS if name in vars(self.scheduler)}
        self.scheduler.load_state_dict(dict(state))
        vars(self.scheduler).update(own)
        if type(self.scheduler) is LambdaLR:
            scheduler, groups = self.scheduler, self.scheduler.optimizer.param_groups
            rates = [base * of(scheduler.last_epoch) for base, of in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
            for group, rate in zip(groups, rates):
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            scheduler._last_lr = rates


def rates_of(options: SchedulerOptions, choice: OptimizerChoice, total_steps: int, steps: Sequence[int]) -> list[Any]:
    """A fingerprint of the schedule that the options describe: its factors at up to a few thousand of these steps."""
    scheduler = build_scheduler(options, choice.toy(), total_steps=total_steps).scheduler
    if type(scheduler) is LambdaLR:
        chosen = steps[:: max(1, len(steps) // 2000)]
        return [factor(step) for factor in scheduler.lr_lambdas for step in chosen]
    return [vars(scheduler)[name] for name in OF_OPTIONS if name in vars(scheduler)]


# ---- from options -------------------------------------------------------------------------------------------------


def check_scheduler(options: SchedulerOptions, choice: OptimizerChoice, *, total_steps: int) -> None:
    """Find every mistake before a model is loaded, and warn about options without effect. Raises UserError."""
    toy = choice.toy()
    built = build_scheduler(options, toy, total_steps=total_steps)
    if options.lr_scheduler_type and toy.schedule is None:
        _try_foreign(options, built, total_steps)
    name = effective_name(options, toy)
    chosen = options.lr_scheduler_type or name
    for option, names in ONLY_FOR.items():
        if vars(options)[option] and chosen not in names:
            get_logger().warning(f"--{option} has no effect with {chosen}: it is for {', '.join(names)}")
    given = (
        options.lr_scheduler_type
        or options.lr_scheduler != "constant"
        or options.lr_warmup_steps
        or options.lr_scheduler_args
    )
    if toy.schedule is not None and given and not options.lr_scheduler.startswith("adafactor"):
        get_logger().warning(
            f"{choice.name} has its own schedule: the options --lr_scheduler... and --lr_warmup_steps have no effect"
        )
    elif options.lr_warmup_steps and name == "piecewise_constant":
        get_logger().warning("--lr_warmup_steps: --lr_scheduler piecewise_constant has no warm-up; step_rules say all")
    elif (warmup := config_of(options, toy.optimizer, total_steps).warmup) > total_steps:
        get_logger().warning(
            f"--lr_warmup_steps {warmup} is longer than the run of {total_steps} steps: the full rate is never reached"
        )


def build_scheduler(options: SchedulerOptions, built: BuiltOptimizer, *, total_steps: int) -> BuiltScheduler:
    """Build the schedule of a run of `total_steps` optimizer steps. Raises UserError for bad names and settings."""
    name = effective_name(options, built)
    given = read_settings(options.lr_scheduler_args or (), ARGS_FLAG)
    if built.schedule is None and options.lr_warmup_steps:
        _refuse_warmup(options, name)
    if options.lr_scheduler_type and built.schedule is None:
        return BuiltScheduler(_foreign(options.lr_scheduler_type, built.optimizer, given))
    if name.startswith("adafactor:"):
        return BuiltScheduler(RelativeStepRate(built.optimizer, _adafactor_rate(name, built.optimizer)))
    if name == "reduce_lr_on_plateau":
        return BuiltScheduler(_plateau(options, built.optimizer, given))
    if built.schedule is not None:  # the optimizer brings its own schedule: settings and warm-up do not apply to it
        return BuiltScheduler(LambdaLR(built.optimizer, lambda step: 1.0))
    factor = schedule_factor(name, config_of(options, built.optimizer, total_steps), given)
    return BuiltScheduler(LambdaLR(built.optimizer, factor))


def effective_name(options: SchedulerOptions, built: BuiltOptimizer) -> str:
    """Name of the schedule in effect: some optimizers bring their own."""
    return options.lr_scheduler.lower() if built.schedule is None else built.schedule


def _refuse_warmup(options: SchedulerOptions, name: str) -> None:
    """Raises UserError when the schedule cannot use --lr_warmup_steps."""
    if options.lr_scheduler_type:
        raise UserError(f"--lr_warmup_steps: {TYPE_FLAG} {options.lr_scheduler_type} has no warm-up: leave one out")
    if name in NO_WARMUP:
        raise UserError(f"--lr_warmup_steps: {FLAG} {name} has no warm-up: {NO_WARMUP[name]}")


def schedule_factor(name: str, config: ScheduleConfig, given: Mapping[str, Any]) -> Factor:
    """The formula with this name, including its warm-up. Raises UserError."""
    formula = SCHEDULES.get(name)
    if formula is None:
        raise UserError(unknown(FLAG, name, [*SCHEDULES, *OTHER_NAMES], kind="name"))
    check_settings(given, formula, f"{ARGS_FLAG} ({name})", {"config"})
    try:
        factor = formula(config, **given)
        factor = factor if name in WITHOUT_COMMON_WARMUP else with_warmup(factor, config.warmup)
        for step in {0, config.warmup, config.total // 2, config.total}:  # shows settings of a wrong type or size
            if not 0 <= factor(step) <= MOST:
                raise ValueError(f"the rate is multiplied by {factor(step):g} at step {step}")
    except UserError:
        raise
    except Exception as error:  # whatever a formula makes of a setting that it cannot use
        shown = ", ".join(f"{k}={v!r}" for k, v in given.items())
        raise UserError(f"{ARGS_FLAG}: {name} refused {shown}: {first_line(error)}") from None
    return factor


def config_of(options: SchedulerOptions, optimizer: torch.optim.Optimizer, total_steps: int) -> ScheduleConfig:
    """Options as numbers of steps: a float is a fraction of the run."""

    def steps(value: int | float) -> int:
        return int(value * total_steps) if isinstance(value, float) else value

    return ScheduleConfig(
        total=total_steps,
        warmup=steps(options.lr_warmup_steps),
        decay=steps(options.lr_decay_steps),
        cycles=options.lr_scheduler_num_cycles,
        power=options.lr_scheduler_power,
        timescale=options.lr_scheduler_timescale,
        min_ratio=options.lr_scheduler_min_lr_ratio,
        base_lr=float(optimizer.defaults["lr"] or 0),
    )


def _foreign(path: str, optimizer: torch.optim.Optimizer, given: Mapping[str, Any]) -> LRScheduler:
    """An instance of a class of torch.optim.lr_scheduler, or of module.Class. Raises UserError."""
    cls = import_class(path, default_module="torch.optim.lr_scheduler", base=LRScheduler, flag=TYPE_FLAG)
    check_settings(given, cls, ARGS_FLAG, {"self", "optimizer"})
    return _construct(cls, path, optimizer, given)


def _try_foreign(options: SchedulerOptions, built: BuiltScheduler, total_steps: int) -> None:
    """Run through the schedule with a toy: some classes fail after a number of steps. Raises UserError."""
    steps = min(total_steps, MOST_TRIED) if total_steps < MOST else 1  # MOST: the run's length is not known yet
    step = 0
    try:
        while step < steps:
            step += 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the toy's weights are never stepped
                built.step(0.0)
            if not all(-TINY <= rate <= MOST for rate in built.get_last_lr()):
                raise ValueError(f"the learning rate becomes {built.get_last_lr()[0]:g}")
    except Exception as error:  # another project's class may end with anything
        given = ", ".join(options.lr_scheduler_args or ()) or "no settings"
        where = f"{TYPE_FLAG} {options.lr_scheduler_type}"
        raise UserError(f"{where} fails at step {step} of the run, with {given}: {first_line(error)}") from None


def _plateau(options: SchedulerOptions, optimizer: torch.optim.Optimizer, given: Mapping[str, Any]) -> LRScheduler:
    """A schedule that lowers the rate when the averaged loss stops falling; patience is in optimizer steps."""
    check_settings(given, ReduceLROnPlateau, ARGS_FLAG, {"self", "optimizer"})
    settings = dict(given)
    if options.lr_scheduler_min_lr_ratio is not None:
        settings.setdefault("min_lr", [g["lr"] * options.lr_scheduler_min_lr_ratio for g in optimizer.param_groups])
    return _construct(ReduceLROnPlateau, "reduce_lr_on_plateau", optimizer, settings)


def _construct(cls: type, name: str, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]) -> LRScheduler:
    missing = [
        p.name
        for p in list(inspect.signature(cls).parameters.values())[1:]
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in settings
    ]
    if missing:
        raise UserError(f"{ARGS_FLAG}: {name} needs {', '.join(f'{m}=...' for m in missing)}")
    try:
        return cls(optimizer, **settings)
    except Exception as error:  # another project's class may end with anything
        shown = ", ".join(f"{k}={v!r}" for k, v in settings.items())
        raise UserError(f"{ARGS_FLAG}: {name} refused {shown}: {first_line(error)}") from None


def _adafactor_rate(name: str, optimizer: torch.optim.Optimizer) -> float:
    """The number in `adafactor:<learning rate>`. Raises UserError for optimizers without relative_step."""
    if not all(group.get("relative_step") for group in optimizer.param_groups):
        raise UserError(f"{FLAG} {name} is for --optimizer_type Adafactor with relative_step=True")
    try:
        return number(name.partition(":")[2])
    except ValueError:
        raise UserError(f"{FLAG} {name}: a number is needed after 'adafactor:'") from None
