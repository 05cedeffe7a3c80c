# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name: a table, the checks of their settings, and one interface to all of them.

    choice = choose_optimizer(options)          # cheap, before any model is loaded; every mistake is found here
    built = choice.build(network.param_groups(...))

To add an optimizer, add a row to OPTIMIZERS.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError, unknown
from library.log import get_logger
from library.optim.options import OptimizerOptions
from library.optim.settings import check_settings, class_names, first_line, import_class, read_settings
from library.optim.without_waits import rate_on_device, without_synchronizing

ParamGroup = dict[str, Any]  # {"params": [...], "lr": float, ...}
FLAG, ARGS_FLAG = "--optimizer_type", "--optimizer_args"
TRAINING_WEIGHTS = "training_weights"  # key of a state that was taken in eval mode


@dataclass(frozen=True)
class OptimizerRow:
    """An entry of the table: the class of an optimizer and what the trainer needs to know about it."""

    path: str  # module.Class
    package: str = ""  # what to pip install; "": a dependency of the project
    defaults: Mapping[str, Any] = field(default_factory=dict)  # settings that --optimizer_args may change
    fixed: Mapping[str, Any] = field(default_factory=dict)  # settings that the name stands for
    quick: Mapping[str, Any] = field(default_factory=dict)  # the fast implementation, unless --optimizer_args choose
    elementwise: bool = False  # each element is updated on its own: tensors may share a buffer (flat.py)
    finds_rate: bool = False  # estimates its step size; the learning rate is a factor near 1, the same for all groups
    schedule_free: bool = False  # has train() and eval() modes and a schedule of its own
    adjust: Callable[[torch.optim.Optimizer], None] | None = None  # called with each new optimizer
    together: bool = False  # counts its steps once for all weights of a group, which are therefore stepped together
    twofold: bool = False  # has two states in one tensor, which is not of the weight's shape
    bases: bool = False  # keeps two square matrices for each axis of a weight up to max_precondition_dim
    groups: Callable[[list[ParamGroup]], list[ParamGroup]] | None = None  # how the groups are divided; twice is once
    foreign: bool = False  # neither in this table nor in torch: nothing is known about it

    @property
    def by_weight(self) -> bool:
        """Whether each weight is updated on its own, and nothing is counted per group."""
        return not (self.finds_rate or self.schedule_free or self.together or self.foreign)

    @property
    def block(self) -> int | None:
        """How many neighbouring elements of a weight are updated together; None: all, or those of a row or column."""
        if self.elementwise:
            return 1
        return 256 if self.path.startswith("bitsandbytes.") and not self.twofold else None

    @property
    def paged(self) -> bool:
        """Whether its states move to main memory by themselves when the card is full."""
        return ".Paged" in self.path


def matrices_apart(groups: list[ParamGroup]) -> list[ParamGroup]:
    """Divide each group into its matrices (convolutions included), for Muon, and the rest, for AdamW."""
    found = []
    for group in groups:
        parts: dict[bool, list[Tensor]] = {True: [], False: []}
        for weight in group["params"]:
            parts[group.get("use_muon", weight.ndim > 1)].append(weight)
        found += [{**group, "params": part, "use_muon": muon} for muon, part in parts.items() if part]
    return found


def uncounted(optimizer: Any) -> None:
    """Make an optimizer forget how often it stepped each group, which it counts and never reads.

    Its state is then the same whether weights are stepped together or one after the other.
    """
    step: Callable[..., Any] = optimizer.step

    def step_and_forget(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        for group in self.param_groups:
            group.pop("step", None)
        return result

    optimizer.step = MethodType(step_and_forget, optimizer)  # torch's schedules expect a method


MOMENTUM: Mapping[str, Any] = {"momentum": 0.9}
NESTEROV: Mapping[str, Any] = {"nesterov": True}
BNB, DADAPT, PYTORCH_OPTIMIZER = "bitsandbytes", "dadaptation", "pytorch-optimizer"
PREPRINT = OptimizerRow("dadaptation.experimental.DAdaptAdamPreprint", DADAPT, finds_rate=True)

OPTIMIZERS: dict[str, OptimizerRow] = {
    # fused: torch's other implementations need a second buffer
    "AdamW": OptimizerRow("torch.optim.AdamW", quick={"fused": True}, elementwise=True),
    "SGDNesterov": OptimizerRow("torch.optim.SGD", defaults=MOMENTUM, fixed=NESTEROV, elementwise=True),
    # not elementwise: 8-bit states share a scale per 256
    "AdamW8bit": OptimizerRow("bitsandbytes.optim.AdamW8bit", BNB, adjust=without_synchronizing),
    # its second name says how weights in bf16 are updated: `OptimizerOptions.kahan`
    "AdamW8bitKahan": OptimizerRow("bitsandbytes.optim.AdamW8bit", BNB, adjust=without_synchronizing),
    "PagedAdamW8bit": OptimizerRow("bitsandbytes.optim.PagedAdamW8bit", BNB),
    "PagedAdamW": OptimizerRow("bitsandbytes.optim.PagedAdamW", BNB, elementwise=True),
    "PagedAdamW32bit": OptimizerRow("bitsandbytes.optim.PagedAdamW32bit", BNB, elementwise=True),
    "Lion8bit": OptimizerRow("bitsandbytes.optim.Lion8bit", BNB, adjust=without_synchronizing),
    "PagedLion8bit": OptimizerRow("bitsandbytes.optim.PagedLion8bit", BNB),
    "SGDNesterov8bit": OptimizerRow(
        "bitsandbytes.optim.SGD8bit", BNB, defaults=MOMENTUM, fixed=NESTEROV, adjust=without_synchronizing
    ),
    **{
        f"AdEMAMix{bits}": OptimizerRow(
            f"bitsandbytes.optim.AdEMAMix{bits}", BNB, twofold=True, adjust=without_synchronizing
        )
        for bits in ("", "8bit")
    },
    **{
        f"PagedAdEMAMix{bits}": OptimizerRow(f"bitsandbytes.optim.PagedAdEMAMix{bits}", BNB, twofold=True)
        for bits in ("", "8bit")
    },
    "Lion": OptimizerRow("lion_pytorch.Lion", "lion-pytorch", elementwise=True),
    "DAdaptation": PREPRINT,
    "DAdaptAdamPreprint": PREPRINT,
    "DAdaptAdaGrad": OptimizerRow("dadaptation.DAdaptAdaGrad", DADAPT, finds_rate=True),
    "DAdaptAdam": OptimizerRow("dadaptation.DAdaptAdam", DADAPT, finds_rate=True),
    "DAdaptAdan": OptimizerRow("dadaptation.DAdaptAdan", DADAPT, finds_rate=True),
    "DAdaptAdanIP": OptimizerRow("dadaptation.experimental.DAdaptAdanIP", DADAPT, finds_rate=True),
    "DAdaptLion": OptimizerRow("dadaptation.DAdaptLion", DADAPT, finds_rate=True),
    "DAdaptSGD": OptimizerRow("dadaptation.DAdaptSGD", DADAPT, finds_rate=True),
    "Prodigy": OptimizerRow("prodigyopt.Prodigy", "prodigyopt", finds_rate=True),
    "ProdigyPlusScheduleFree": OptimizerRow(
        "prodigyplus.ProdigyPlusScheduleFree",
        "prodigy-plus-schedule-free",
        finds_rate=True,
        schedule_free=True,
        # rounding would differ between processes: weights in bf16 are updated by bf16.py
        fixed={"fused_back_pass": False, "stochastic_rounding": False},
    ),
    "CAME": OptimizerRow("pytorch_optimizer.CAME", PYTORCH_OPTIMIZER, adjust=uncounted),
    "SOAP": OptimizerRow(
        "pytorch_optimizer.SOAP", PYTORCH_OPTIMIZER, defaults={"max_precondition_dim": 10000}, together=True, bases=True
    ),
    "Muon": OptimizerRow(
        "pytorch_optimizer.Muon",
        PYTORCH_OPTIMIZER,
        together=True,
        groups=matrices_apart,
        defaults={"use_adjusted_lr": True},  # a matrix moves as far as with AdamW: one learning rate fits both
        fixed={"adamw_lr": 1.0},  # each group has its own
    ),
    "Adafactor": OptimizerRow("transformers.optimization.Adafactor", adjust=rate_on_device),
    **{
        f"{name}ScheduleFree": OptimizerRow(
            f"schedulefree.{name}ScheduleFree", "schedulefree", elementwise=True, schedule_free=True
        )
        for name in ("RAdam", "AdamW", "SGD")
    },
}
BY_LOWER_NAME = {name.lower(): row for name, row in OPTIMIZERS.items()}
ELEMENTWISE_IN_TORCH = {"Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD"}
NOT_HERE = {
    "capturable": "no CUDA graphs are made here",
    "differentiable": "nothing is learned through the steps",
    "maximize": "the loss is made smaller, not larger",
}
IMPLEMENTATIONS = {"fused", "foreach", "capturable", "differentiable"}  # of torch's optimizers; at most one is set
NOT_FOR_TRAINING = {
    "LBFGS": "it evaluates the loss several times per step",
    "Muon": "it takes matrices only; Muon, without torch.optim, steps the other weights with AdamW",
    "SparseAdam": "it takes sparse gradients only",
}


@dataclass
class BuiltOptimizer:
    """An optimizer and what the trainer needs to know about it."""

    optimizer: torch.optim.Optimizer
    name_for_metadata: str  # "torch.optim.adamw.AdamW(weight_decay=0.1)"
    elementwise: bool
    schedule_free: bool
    schedule: str | None  # the schedule that this optimizer requires in place of --lr_scheduler

    _training_weights: list[Tensor] | None = field(default=None, init=False, repr=False)  # kept while in eval mode

    def train_mode(self) -> None:
        """Switch to the training weights, bit-identical to those before `eval_mode`. This is the initial mode."""
        if not self.schedule_free:
            return
        self.optimizer.train()  # type: ignore[attr-defined]
        if self._training_weights is not None:
            # eval() and train() are not exact inverses: without this, a run would depend on how often it is previewed
            torch._foreach_copy_(self._weights(), self._training_weights)
            self._training_weights = None

    def eval_mode(self) -> None:
        """Switch to the weights that previews and saves use."""
        if self.schedule_free and self._training_weights is None:
            self._training_weights = [p.to("cpu", copy=True) for p in self._weights()]  # the card may be full
            self.optimizer.eval()  # type: ignore[attr-defined]

    def _weights(self) -> list[Tensor]:
        return [p.detach() for group in self.optimizer.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on except the weights. Works in both modes."""
        state = self.optimizer.state_dict()
        if self._training_weights is not None:
            state[TRAINING_WEIGHTS] = self._training_weights
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state` exactly and switch to train mode. Load the weights first.

        Raises ValueError for a state of other sizes.
        """
        own = dict(state)
        self._training_weights = own.pop(TRAINING_WEIGHTS, None)
        self.optimizer.load_state_dict(own)
        _restore_dtypes(self.optimizer, own)
        self.train_mode()


def _restore_dtypes(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restore the dtypes of `state`, such as fp32 moments of bf16 weights, which `load_state_dict` casts to bf16."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    ids = [i for group in state["param_groups"] for i in group["params"]]
    for parameter, number in zip(parameters, ids, strict=True):
        for key, saved in state["state"].get(number, {}).items():
            if isinstance(saved, Tensor) and optimizer.state[parameter][key].dtype != saved.dtype:
                device = optimizer.state[parameter][key].device
                optimizer.state[parameter][key] = saved.detach().clone().to(device)


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer whose settings have been checked and that has not been built yet."""

    name: str  # as the user wrote it
    cls: type[torch.optim.Optimizer]
    row: OptimizerRow
    settings: Mapping[str, Any]  # given settings and defaults
    learning_rate: float | None  # None: the optimizer computes its own
    schedule: str | None

    @property
    def metadata_name(self) -> str:
        """`module.Class(k=v,k=v)`, without parentheses when nothing is set."""
        text = ",".join(f"{k}={v}" for k, v in self.settings.items())
        return f"{self.cls.__module__}.{self.cls.__name__}" + (f"({text})" if text else "")

    def divided(self, param_groups: list[ParamGroup]) -> list[ParamGroup]:
        """Copies of the groups, as the optimizer wants them divided."""
        divide = self.row.groups
        return [dict(group) for group in (param_groups if divide is None else divide(param_groups))]

    def build(self, param_groups: list[dict[str, Any]], *, quick: bool = True) -> BuiltOptimizer:
        """Build the optimizer over groups of {"params", "lr", ...}. Raises UserError when it refuses its settings.

        quick: use the fast implementation, unless the settings choose one.
        """
        groups = self.divided(param_groups)
        if self.learning_rate is None:
            groups = [{k: v for k, v in group.items() if k != "lr"} for group in groups]
        elif self.row.finds_rate:
            self._one_rate(groups)
        way = {} if IMPLEMENTATIONS & self.settings.keys() or not quick else self.row.quick
        try:
            with redirect_stdout(io.StringIO()) as said:  # some print what they think of their settings
                optimizer = self.cls(groups, lr=self.learning_rate, **way, **self.row.fixed, **self.settings)  # type: ignore[call-arg]
        except Exception as error:  # the class is another project's: it may end with anything
            raise UserError(f"{FLAG} {self.name}: refused with {self.described()}: {first_line(error)}") from None
        for line in said.getvalue().splitlines():
            get_logger().debug(line)
        optimizer.defaults.setdefault("lr", self.learning_rate)  # schedules read it; Muon sets that of groups only
        row = self.row
        if row.adjust is not None:
            row.adjust(optimizer)
        built = BuiltOptimizer(optimizer, self.metadata_name, row.elementwise, row.schedule_free, self.schedule)
        built.train_mode()
        return built

    def toy(self) -> BuiltOptimizer:
        """The same optimizer over four numbers, for checks. Raises UserError like `build`."""
        return self.build([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}])

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Check that weights of this dtype stay finite when gradients are 0 or small. Raises UserError.

        In fp16 eps and the squares of typical gradients underflow, so Adam and its relatives divide 0 by 0;
        bitsandbytes, Lion and others keep float32 states or do not divide.
        """
        weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=dtype))
        # not the fast implementation: it computes in float32, which hides that squares underflow in the states
        optimizer = self.build([{"params": [weight]}], quick=False).optimizer
        for gradient in (0.0, 1e-4):
            weight.grad = torch.full_like(weight, gradient)
            try:
                optimizer.step()
            except Exception:  # foreign code, perhaps for GPUs only: it cannot be checked on this machine
                return
        if not bool(torch.isfinite(weight).all()):
            raise UserError(
                f"{FLAG} {self.name} makes weights in {str(dtype).partition('.')[2]} not finite (small numbers are 0 "
                "there): leave --full_fp16 out, or use AdamW8bit or Lion"
            )

    def described(self) -> str:
        """The settings in the user's terms, for messages."""
        return ", ".join([f"learning_rate={self.learning_rate}", *(f"{k}={v!r}" for k, v in self.settings.items())])

    def _one_rate(self, groups: list[dict[str, Any]]) -> None:
        """Set the highest rate for all groups that learn: these optimizers have one step size, some refuse several."""
        base = self.learning_rate or 0.0
        rates = {float(group.get("lr", base)) for group in groups} - {0.0}
        if len(rates) > 1:
            shown = ", ".join(f"{rate:g}" for rate in sorted(rates))
            get_logger().warning(
                f"{self.name} takes one learning rate for everything: {max(rates):g} is used (given: {shown})"
            )
        for group in groups:
            if group.get("lr") != 0:
                group["lr"] = max(rates, default=base)


def choose_optimizer(options: OptimizerOptions) -> OptimizerChoice:
    """The optimizer named by the options. Its settings are tried on a toy. Raises UserError."""
    name = options.name
    row, cls = find_optimizer(name)
    given = read_settings(options.optimizer_args or (), ARGS_FLAG)
    check_settings(given, cls, ARGS_FLAG, {"self", "params", "lr", *row.fixed}, named=not row.foreign)
    idle = [f"{ARGS_FLAG}: {key}={given[key]}: {why}" for key, why in NOT_HERE.items() if given.get(key)]
    if idle:
        raise UserError(f"{line}; leave it out" for line in idle)
    settings = {**row.defaults, **given}
    rate: float | None = options.learning_rate
    schedule = "constant" if row.schedule_free else None
    if row is OPTIMIZERS["Adafactor"]:
        rate, schedule = _adafactor_rules(settings, options.learning_rate)
    if row.finds_rate and options.learning_rate <= 0.1:
        get_logger().warning(
            f"--learning_rate {options.learning_rate:g}: {name} finds its own step size and wants a rate of about 1"
        )
    choice = OptimizerChoice(name, cls, row, settings, rate, schedule)
    _check_steps(choice)
    return choice


def _check_steps(choice: OptimizerChoice) -> None:
    """Take two steps with a toy. Raises UserError when they fail because of the settings."""
    toy = choice.toy()
    if choice.settings == choice.row.defaults:
        return
    plain = replace(choice, settings=choice.row.defaults)
    error = _error_of_steps(toy.optimizer)
    if error is not None and _error_of_steps(plain.toy().optimizer) is None:
        raise UserError(f"{FLAG} {choice.name}: fails with {choice.described()}: {first_line(error)}")


def _error_of_steps(optimizer: torch.optim.Optimizer) -> Exception | None:
    """The error that a toy's steps end with. Optimizers for GPUs may fail on the CPU whatever their settings."""
    try:
        for _ in range(2):
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    weight.grad = torch.full_like(weight, 1e-3)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about being slow without a GPU
                optimizer.step()
    except Exception as error:
        return error
    return None


def find_optimizer(name: str) -> tuple[OptimizerRow, type[torch.optim.Optimizer]]:
    """The table row and the class of an optimizer, by its name.

    The name is one of the table in any case, a class of torch.optim, or module.Class. Raises UserError.
    """
    row = BY_LOWER_NAME.get(name.lower())
    base = torch.optim.Optimizer
    if row is not None:
        return row, import_class(row.path, default_module="torch.optim", base=base, flag=FLAG, package=row.package)
    short = name.removeprefix("torch.optim.")
    in_torch = class_names(torch.optim, base)
    if short in NOT_FOR_TRAINING:
        raise UserError(f"{FLAG} {name} cannot be used here: {NOT_FOR_TRAINING[short]}")
    if "." not in name and name not in in_torch:
        raise UserError(unknown(FLAG, name, [*OPTIMIZERS, *in_torch], kind="name"))
    cls = import_class(name, default_module="torch.optim", base=base, flag=FLAG)
    elementwise, foreign = short in ELEMENTWISE_IN_TORCH, short not in in_torch
    return OptimizerRow(name, elementwise=elementwise, schedule_free=_has_modes(cls), foreign=foreign), cls


def _has_modes(cls: type) -> bool:
    """Whether a class is schedule-free: it has train() and eval(), which torch's own optimizers do not."""
    return callable(getattr(cls, "train", None)) and callable(getattr(cls, "eval", None))


def _adafactor_rules(settings: dict[str, Any], learning_rate: float) -> tuple[float | None, str | None]:
    """Rate and schedule of Adafactor. With relative_step (the default) it computes its rate (Shazeer & Stern 2018)."""
    settings.setdefault("relative_step", True)
    if settings.get("warmup_init") and not settings["relative_step"]:
        get_logger().warning(f"{ARGS_FLAG}: warmup_init needs relative_step: it is switched on")
        settings["relative_step"] = True
    if settings["relative_step"]:
        return None, f"adafactor:{learning_rate}"
    return learning_rate, None
