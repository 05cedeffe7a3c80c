# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name: a table, the check of their settings, and one interface for all of them.

    choice = choose_optimizer(options)          # cheap: before any model is loaded; every mistake is found here
    built = choice.build(network.param_groups(...))

New optimizer: one row of OPTIMIZERS.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError, unknown
from library.log import get_logger
from library.optim.options import OptimizerOptions
from library.optim.settings import check_settings, class_names, first_line, import_class, read_settings
from library.optim.without_waits import rate_on_device, without_synchronizing

FLAG, ARGS_FLAG = "--optimizer_type", "--optimizer_args"
TRAINING_WEIGHTS = "training_weights"  # key of a state that was taken in eval mode


@dataclass(frozen=True)
class Row:
    """One optimizer."""

    path: str  # module.Class
    package: str = ""  # what pip installs it from ("" comes with the project)
    defaults: Mapping[str, Any] = field(default_factory=dict)  # settings that --optimizer_args may change
    fixed: Mapping[str, Any] = field(default_factory=dict)  # settings that make the name what it is
    quick: Mapping[str, Any] = field(default_factory=dict)  # how it is computed where --optimizer_args do not say
    elementwise: bool = False  # an element's update depends on that element only: tensors may be joined (flat.py)
    finds_rate: bool = False  # estimates its step size; the learning rate is one factor near 1 for all groups
    schedule_free: bool = False  # has train() and eval() weights and its own schedule
    adjust: Callable[[torch.optim.Optimizer], None] | None = None  # done to each that is built
    foreign: bool = False  # a class that this table and torch do not have: nothing is known of it

    @property
    def by_weight(self) -> bool:
        """Whether a weight's update depends on that weight only, and nothing is counted per group."""
        return not (self.finds_rate or self.schedule_free or self.foreign)

    @property
    def paged(self) -> bool:
        """Whether its states leave the card by themselves where there is no room."""
        return ".Paged" in self.path


MOMENTUM: Mapping[str, Any] = {"momentum": 0.9}
NESTEROV: Mapping[str, Any] = {"nesterov": True}
BNB, DADAPT, SCHEDULE_FREE = "bitsandbytes", "dadaptation", "schedulefree"
PREPRINT = Row("dadaptation.experimental.DAdaptAdamPreprint", DADAPT, finds_rate=True)

OPTIMIZERS: dict[str, Row] = {
    "AdamW": Row("torch.optim.AdamW", quick={"fused": True}, elementwise=True),  # the others need a second buffer
    "SGDNesterov": Row("torch.optim.SGD", defaults=MOMENTUM, fixed=NESTEROV, elementwise=True),
    "AdamW8bit": Row(
        "bitsandbytes.optim.AdamW8bit", BNB, adjust=without_synchronizing
    ),  # not elementwise: 8-bit states share a scale per 256
    "PagedAdamW8bit": Row("bitsandbytes.optim.PagedAdamW8bit", BNB),
    "PagedAdamW": Row("bitsandbytes.optim.PagedAdamW", BNB, elementwise=True),
    "PagedAdamW32bit": Row("bitsandbytes.optim.PagedAdamW32bit", BNB, elementwise=True),
    "Lion8bit": Row("bitsandbytes.optim.Lion8bit", BNB, adjust=without_synchronizing),
    "PagedLion8bit": Row("bitsandbytes.optim.PagedLion8bit", BNB),
    "SGDNesterov8bit": Row(
        "bitsandbytes.optim.SGD8bit", BNB, defaults=MOMENTUM, fixed=NESTEROV, adjust=without_synchronizing
    ),
    "Lion": Row("lion_pytorch.Lion", "lion-pytorch", elementwise=True),
    "DAdaptation": PREPRINT,
    "DAdaptAdamPreprint": PREPRINT,
    "DAdaptAdaGrad": Row("dadaptation.DAdaptAdaGrad", DADAPT, finds_rate=True),
    "DAdaptAdam": Row("dadaptation.DAdaptAdam", DADAPT, finds_rate=True),
    "DAdaptAdan": Row("dadaptation.DAdaptAdan", DADAPT, finds_rate=True),
    "DAdaptAdanIP": Row("dadaptation.experimental.DAdaptAdanIP", DADAPT, finds_rate=True),
    "DAdaptLion": Row("dadaptation.DAdaptLion", DADAPT, finds_rate=True),
    "DAdaptSGD": Row("dadaptation.DAdaptSGD", DADAPT, finds_rate=True),
    "Prodigy": Row("prodigyopt.Prodigy", "prodigyopt", finds_rate=True),
    "Adafactor": Row("transformers.optimization.Adafactor", adjust=rate_on_device),
    "RAdamScheduleFree": Row("schedulefree.RAdamScheduleFree", SCHEDULE_FREE, elementwise=True, schedule_free=True),
    "AdamWScheduleFree": Row("schedulefree.AdamWScheduleFree", SCHEDULE_FREE, elementwise=True, schedule_free=True),
    "SGDScheduleFree": Row("schedulefree.SGDScheduleFree", SCHEDULE_FREE, elementwise=True, schedule_free=True),
}
BY_LOWER_NAME = {name.lower(): row for name, row in OPTIMIZERS.items()}
ELEMENTWISE_IN_TORCH = {"Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD"}
NOT_HERE = {
    "capturable": "no CUDA graphs are made here",
    "differentiable": "nothing is learned through the steps",
    "maximize": "the loss is made smaller, not larger",
}
WAYS = {"fused", "foreach", "capturable", "differentiable"}  # settings of torch's optimizers that exclude each other
NOT_FOR_TRAINING = {
    "LBFGS": "it evaluates the loss several times per step",
    "SparseAdam": "it takes sparse gradients only",
}


@dataclass
class BuiltOptimizer:
    """An optimizer and what the trainer has to know about it."""

    optimizer: torch.optim.Optimizer
    name_for_metadata: str  # "torch.optim.adamw.AdamW(weight_decay=0.1)"
    elementwise: bool
    schedule_free: bool
    schedule: str | None  # the schedule that this optimizer asks for instead of --lr_scheduler

    _training_weights: list[Tensor] | None = field(default=None, init=False, repr=False)  # kept while in eval mode

    def train_mode(self) -> None:
        """Weights as training needs them: bit for bit those that `eval_mode` left. The mode after building."""
        if not self.schedule_free:
            return
        self.optimizer.train()  # type: ignore[attr-defined]
        if self._training_weights is not None:
            # there and back again is only nearly the identity: a run must not depend on how often it was looked at
            torch._foreach_copy_(self._weights(), self._training_weights)
            self._training_weights = None

    def eval_mode(self) -> None:
        """Weights as they are shown and saved."""
        if self.schedule_free and self._training_weights is None:
            self._training_weights = [p.to("cpu", copy=True) for p in self._weights()]  # the card may be full
            self.optimizer.eval()  # type: ignore[attr-defined]

    def _weights(self) -> list[Tensor]:
        return [p.detach() for group in self.optimizer.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on besides the weights, in either mode."""
        state = self.optimizer.state_dict()
        if self._training_weights is not None:
            state[TRAINING_WEIGHTS] = self._training_weights
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state` exactly, in train mode. Load the weights first. Raises ValueError when sizes differ."""
        own = dict(state)
        self._training_weights = own.pop(TRAINING_WEIGHTS, None)
        self.optimizer.load_state_dict(own)
        _restore_dtypes(self.optimizer, own)
        self.train_mode()


def _restore_dtypes(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Undo a rounding: `load_state_dict` casts states to their parameter's dtype (fp32 moments of bf16 weights)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    ids = [i for group in state["param_groups"] for i in group["params"]]
    for parameter, number in zip(parameters, ids, strict=True):
        for key, saved in state["state"].get(number, {}).items():
            if isinstance(saved, Tensor) and optimizer.state[parameter][key].dtype != saved.dtype:
                device = optimizer.state[parameter][key].device
                optimizer.state[parameter][key] = saved.detach().clone().to(device)


@dataclass(frozen=True)
class OptimizerChoice:
    """A checked optimizer, not built yet."""

    name: str  # as the user wrote it
    cls: type[torch.optim.Optimizer]
    row: Row
    settings: Mapping[str, Any]  # given and default settings
    learning_rate: float | None  # None: the optimizer makes its own
    schedule: str | None

    @property
    def metadata_name(self) -> str:
        """`module.Class(k=v,k=v)`, without parentheses when nothing is set."""
        text = ",".join(f"{k}={v}" for k, v in self.settings.items())
        return f"{self.cls.__module__}.{self.cls.__name__}" + (f"({text})" if text else "")

    def build(self, param_groups: list[dict[str, Any]], *, quick: bool = True) -> BuiltOptimizer:
        """The optimizer over groups of {"params", "lr", ...}. Raises UserError when it refuses its settings.

        quick: compute it in the quick way, unless the settings choose one.
        """
        groups = [dict(group) for group in param_groups]
        if self.learning_rate is None:
            groups = [{k: v for k, v in group.items() if k != "lr"} for group in groups]
        elif self.row.finds_rate:
            self._one_rate(groups)
        way = {} if WAYS & self.settings.keys() or not quick else self.row.quick
        try:
            optimizer = self.cls(groups, lr=self.learning_rate, **way, **self.row.fixed, **self.settings)  # type: ignore[call-arg]
        except Exception as error:  # the class is another project's: it may end with anything
            raise UserError(f"{FLAG} {self.name}: refused with {self.described()}: {first_line(error)}") from None
        row = self.row
        if row.adjust is not None:
            row.adjust(optimizer)
        built = BuiltOptimizer(optimizer, self.metadata_name, row.elementwise, row.schedule_free, self.schedule)
        built.train_mode()
        return built

    def toy(self) -> BuiltOptimizer:
        """The same over four numbers, for checks. Raises UserError as `build` does."""
        return self.build([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}])

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Weights of this dtype stay finite where gradients are 0 or small. Raises UserError.

        In fp16 the squares of usual gradients and eps are 0, so that Adam and its kin divide 0 by 0; bitsandbytes, Lion
        and others keep float32 states or divide by nothing.
        """
        weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=dtype))
        # the plain way: the quick one computes in float32, and hides that squares are 0 in the states
        optimizer = self.build([{"params": [weight]}], quick=False).optimizer
        for gradient in (0.0, 1e-4):
            weight.grad = torch.full_like(weight, gradient)
            try:
                optimizer.step()
            except Exception:  # foreign code, perhaps only for a GPU: then this machine cannot tell
                return
        if not bool(torch.isfinite(weight).all()):
            raise UserError(
                f"{FLAG} {self.name} makes weights in {str(dtype).partition('.')[2]} not finite (small numbers are 0 "
                "there): leave --full_fp16 out, or use AdamW8bit or Lion"
            )

    def described(self) -> str:
        """The settings as the user knows them."""
        return ", ".join([f"learning_rate={self.learning_rate}", *(f"{k}={v!r}" for k, v in self.settings.items())])

    def _one_rate(self, groups: list[dict[str, Any]]) -> None:
        """Give all groups that learn the highest rate: these optimizers know one step size, some stop otherwise."""
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
    """The optimizer that the options name, with its settings checked on a toy. Raises UserError."""
    name = options.name
    row, cls = find_optimizer(name)
    given = read_settings(options.optimizer_args or (), ARGS_FLAG)
    check_settings(given, cls, ARGS_FLAG, {"self", "params", "lr", *row.fixed})
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
    """A toy is built and makes two steps. Raises UserError where it is the settings with which it does not."""
    toy = choice.toy()
    if choice.settings == choice.row.defaults:
        return
    plain = replace(choice, settings=choice.row.defaults)
    error = _error_of_steps(toy.optimizer)
    if error is not None and _error_of_steps(plain.toy().optimizer) is None:
        raise UserError(f"{FLAG} {choice.name}: fails with {choice.described()}: {first_line(error)}")


def _error_of_steps(optimizer: torch.optim.Optimizer) -> Exception | None:
    """What a toy's steps end with: some of those for cards only do so here, whatever their settings."""
    try:
        for _ in range(2):
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    weight.grad = torch.full_like(weight, 1e-3)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is slower without a card
                optimizer.step()
    except Exception as error:
        return error
    return None


def find_optimizer(name: str) -> tuple[Row, type[torch.optim.Optimizer]]:
    """Row and class of a name: of the table whatever its case, of torch.optim, or module.Class. Raises UserError."""
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
    return Row(name, elementwise=elementwise, schedule_free=_has_modes(cls), foreign=foreign), cls


def _has_modes(cls: type) -> bool:
    """A foreign class with train() and eval(), which torch's own optimizers do not have, is schedule-free."""
    return callable(getattr(cls, "train", None)) and callable(getattr(cls, "eval", None))


def _adafactor_rules(settings: dict[str, Any], learning_rate: float) -> tuple[float | None, str | None]:
    """Rate and schedule of Adafactor. With relative_step (the default) it makes its own rate (Shazeer & Stern 2018)."""
    settings.setdefault("relative_step", True)
    if settings.get("warmup_init") and not settings["relative_step"]:
        get_logger().warning(f"{ARGS_FLAG}: warmup_init needs relative_step: it is switched on")
        settings["relative_step"] = True
    if settings["relative_step"]:
        return None, f"adafactor:{learning_rate}"
    return learning_rate, None
