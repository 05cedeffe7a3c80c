# SPDX-License-Identifier: Apache-2.0
"""Learning rates against the golden values; bad names and settings; state round trip."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.optim.optimizers import BuiltOptimizer, choose_optimizer
from library.optim.options import OptimizerOptions, SchedulerOptions
from library.optim.schedulers import SCHEDULES, build_scheduler, check_scheduler

GOLDEN = json.loads((Path(__file__).parents[1] / "data_files" / "optim" / "lr_schedules.json").read_text())
REFUSED = {"ValueError"}  # today's scripts refuse these for a reason; their TypeErrors are defects that are mended here


def sgd(lr=1.0, groups=1):
    params = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr / (i + 1)} for i in range(groups)]
    return BuiltOptimizer(torch.optim.SGD(params, lr=lr), "torch.optim.sgd.SGD", True, False, None)


def rates(scheduler, optimizer, steps, loss=None):
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        assert found[-1] == optimizer.optimizer.param_groups[0]["lr"]
        optimizer.optimizer.step()
        scheduler.step(loss)
    return found


def golden_options(name, args):
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
    if "lr_scheduler_type" not in given:
        given["lr_scheduler"] = name.split(".")[0]
    return SchedulerOptions(**given)


def cases(with_rates):
    return [n for n, c in GOLDEN["cases"].items() if ("lr" in c) == with_rates and not n.startswith("adafactor")]


@pytest.mark.parametrize("name", cases(with_rates=True))
def test_rates_equal_golden(name):
    case = GOLDEN["cases"][name]
    options, optimizer = golden_options(name, case["args"]), sgd()
    assert list(options.problems()) == []
    found = rates(build_scheduler(options, optimizer, total_steps=100), optimizer, 100)
    assert [found[i] for i in GOLDEN["steps"]] == pytest.approx(case["lr"], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", [n for n in cases(with_rates=False) if GOLDEN["cases"][n]["error"] in REFUSED])
def test_refused_with_one_line(name):
    options = golden_options(name, GOLDEN["cases"][name]["args"])
    with pytest.raises(UserError) as caught:
        build_scheduler(options, sgd(), total_steps=100)
    (line,) = caught.value.problems
    assert "constant_with_warmup" in line or "--lr_scheduler_min_lr_ratio" in line


def test_cosine_warmup_with_min_lr():
    options = SchedulerOptions(
        lr_scheduler="cosine_warmup_with_min_lr", lr_warmup_steps=4, lr_scheduler_min_lr_ratio=0.1
    )
    optimizer = sgd()
    found = rates(build_scheduler(options, optimizer, total_steps=12), optimizer, 12)
    wave = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * i / 8, dtype=torch.float64))) for i in range(1, 9)]
    want = [0.25, 0.5, 0.75, 1.0, *(float(0.1 + 0.9 * w) for w in wave)]
    assert found == pytest.approx(want)


def test_plateau_lowers_the_rate_when_the_loss_stays():
    options = SchedulerOptions(
        lr_scheduler="reduce_lr_on_plateau",
        lr_scheduler_args=("patience=1", "factor=0.5"),
        lr_scheduler_min_lr_ratio=0.3,
    )
    optimizer = sgd()
    scheduler = build_scheduler(options, optimizer, total_steps=100)
    assert scheduler.needs_loss
    assert rates(scheduler, optimizer, 7, loss=1.0) == [1.0, 1.0, 1.0, 0.5, 0.5, 0.3, 0.3]
    with pytest.raises(ValueError, match="has to be given the loss"):
        scheduler.step()


def test_warmup_as_a_fraction():
    options = SchedulerOptions(lr_scheduler="linear", lr_warmup_steps=0.1)
    optimizer = sgd()
    assert rates(build_scheduler(options, optimizer, total_steps=50), optimizer, 6) == [0, 0.2, 0.4, 0.6, 0.8, 1]


@pytest.mark.parametrize("warmup_type", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("decay_type", ["linear", "cosine", "1-sqrt"])
def test_warmup_stable_decay_shapes(warmup_type, decay_type):
    options = SchedulerOptions(
        lr_scheduler="warmup_stable_decay",
        lr_warmup_steps=4,
        lr_decay_steps=4,
        lr_scheduler_args=(f"warmup_type='{warmup_type}'", f"decay_type='{decay_type}'"),
    )
    optimizer = sgd()
    found = rates(build_scheduler(options, optimizer, total_steps=12), optimizer, 13)
    middle = {"linear": 0.5, "cosine": 0.5, "1-sqrt": 1 - 0.5**0.5}
    assert [found[0], found[2], found[4], found[8], found[10], found[12]] == pytest.approx(
        [0, middle[warmup_type], 1, 1, middle[decay_type], 0]
    )


def test_each_group_keeps_its_own_rate():
    optimizer = sgd(groups=2)
    scheduler = build_scheduler(SchedulerOptions(lr_scheduler="linear"), optimizer, total_steps=10)
    optimizer.optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.9, 0.45])


# ---- with optimizers that bring their own schedule ----------------------------------------------------------------


def test_adafactor_shows_its_own_rate():
    choice = choose_optimizer(OptimizerOptions(optimizer_type="Adafactor", learning_rate=1e-4))
    scheduler = build_scheduler(SchedulerOptions(), choice.toy(), total_steps=100)
    assert scheduler.get_last_lr()[0] == GOLDEN["cases"]["adafactor:0.0001"]["lr"][0] == 1e-4
    scheduler.step()
    assert scheduler.get_last_lr() == [1e-2]  # relative step: min(1e-2, 1/sqrt(1))
    for _ in range(39_999):
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([1 / 200])


def test_adafactor_with_its_own_rate_off_takes_any_schedule():
    options = OptimizerOptions(optimizer_type="adafactor", learning_rate=1e-3, optimizer_args=("relative_step=False",))
    scheduler = build_scheduler(SchedulerOptions(lr_scheduler="linear"), choose_optimizer(options).toy(), total_steps=2)
    assert scheduler.get_last_lr() == [1e-3]
    with pytest.raises(UserError, match="is for --optimizer_type Adafactor with relative_step=True"):
        build_scheduler(SchedulerOptions(lr_scheduler="adafactor:1e-4"), choose_optimizer(options).toy(), total_steps=2)


@pytest.mark.parametrize("given", ["cosine", "constant"])
def test_schedule_free_says_that_the_schedule_has_no_effect(given, caplog):
    choice = choose_optimizer(OptimizerOptions(optimizer_type="AdamWScheduleFree", learning_rate=1e-3))
    options = SchedulerOptions(lr_scheduler=given, lr_warmup_steps=5)
    with caplog.at_level(logging.WARNING):
        check_scheduler(options, choice, total_steps=10)
    assert ["has its own schedule" in r.message for r in caplog.records] == [True]
    scheduler = build_scheduler(options, choice.toy(), total_steps=10)
    assert [scheduler.scheduler.lr_lambdas[0](step) for step in (0, 5, 10)] == [1.0, 1.0, 1.0]


def test_long_warmup_is_a_warning(caplog):
    choice = choose_optimizer(OptimizerOptions(learning_rate=1e-3))
    with caplog.at_level(logging.WARNING):
        check_scheduler(SchedulerOptions(lr_scheduler="linear", lr_warmup_steps=20), choice, total_steps=10)
    assert ["is longer than the run of 10 steps" in r.message for r in caplog.records] == [True]


# ---- state --------------------------------------------------------------------------------------------------------

NEEDED = {
    "cosine_with_min_lr": {"lr_scheduler_min_lr_ratio": 0.1},
    "cosine_warmup_with_min_lr": {"lr_scheduler_min_lr_ratio": 0.1},
    "warmup_stable_decay": {"lr_decay_steps": 9},
    "piecewise_constant": {"lr_scheduler_args": ("step_rules='1:5,0.5:12,0.1'",)},
    "reduce_lr_on_plateau": {"lr_scheduler_args": ("patience=0",)},
    "CosineAnnealingLR": {"lr_scheduler": "constant", "lr_scheduler_type": "CosineAnnealingLR"},
    "OneCycleLR": {"lr_scheduler": "constant", "lr_scheduler_type": "torch.optim.lr_scheduler.OneCycleLR"},
}
NEEDED["CosineAnnealingLR"]["lr_scheduler_args"] = ("T_max=7",)
NEEDED["OneCycleLR"]["lr_scheduler_args"] = ("max_lr=2.0", "total_steps=40")


@pytest.mark.parametrize("name", sorted({*SCHEDULES, *NEEDED}))
def test_state_round_trip(name):
    given = {"lr_scheduler": name, **NEEDED.get(name, {})}
    if SCHEDULES.get(name) and name not in ("constant", "piecewise_constant"):
        given["lr_warmup_steps"] = 6
    options = SchedulerOptions(**given)
    first, second = sgd(groups=2), sgd(groups=2)
    one = build_scheduler(options, first, total_steps=30)
    rates(one, first, 9, loss=1.0)
    two = build_scheduler(options, second, total_steps=30)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert two.get_last_lr() == one.get_last_lr()
    assert rates(two, second, 15, loss=1.0) == rates(one, first, 15, loss=1.0)


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"lr_scheduler": "cosin"}, r"--lr_scheduler: unknown name 'cosin'\. Did you mean 'cosine'"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": ("num_cycles=2",)}, "unknown key 'num_cycles'"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("num_cycle=2",)}, "Did you mean 'num_cycles'"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("num_cycles='x'",)}, "num_cycles expects a number, got 'x'"),
        ({"lr_scheduler": "piecewise_constant"}, "needs --lr_scheduler_args"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 101}, "longer than the run of 100 steps"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_scheduler_args": ("decay_type='line'",)}, "mean 'linear'"),
        ({"lr_scheduler_type": "StepLP"}, "Did you mean 'StepLR'"),
        ({"lr_scheduler_type": "StepLR"}, "StepLR needs step_size"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_siz=3",)}, "Did you mean 'step_size'"),
        ({"lr_scheduler_type": "no_such_package.Thing"}, "pip install no_such_package"),
        ({"lr_scheduler": "adafactor:x"}, "is for --optimizer_type Adafactor"),
        ({"lr_scheduler_type": "StepLR", "lr_warmup_steps": 5}, "StepLR has no warm-up"),
        ({"lr_scheduler": "reduce_lr_on_plateau", "lr_warmup_steps": 5}, "reduce_lr_on_plateau has no warm-up"),
    ],
)
def test_bad_input(given, line):
    with pytest.raises(UserError, match=line):
        build_scheduler(SchedulerOptions(**given), sgd(), total_steps=100)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ("max_lr=1", "total_steps=10")}, "fails at step"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_size='x'",)}, "refused|fails at step 1"),
        ({"lr_scheduler_type": "ExponentialLR", "lr_scheduler_args": ("gamma=-2",)}, "the learning rate becomes"),
        ({"lr_scheduler_type": "..x"}, "names no class"),
        ({"lr_scheduler": "inverse_sqrt", "lr_scheduler_args": ("timescale=-5",)}, "inverse_sqrt refused"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules='nan:10,1'",)}, "factor:until step"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules='-1:10,1'",)}, "multiplied by -1"),
    ],
)
def test_what_would_end_the_run_later_is_found_before(given, line):
    chosen = choose_optimizer(OptimizerOptions(learning_rate=1e-3))
    with pytest.raises(UserError, match=line):
        check_scheduler(SchedulerOptions(**given), chosen, total_steps=100)
    if "total_steps=10" in str(given):  # with --max_train_epochs the length is only known later
        check_scheduler(SchedulerOptions(**given), chosen, total_steps=10**9)


def test_polynomial_needs_a_rate_above_its_end():
    with pytest.raises(UserError, match="must be greater"):
        build_scheduler(SchedulerOptions(lr_scheduler="polynomial"), sgd(lr=1e-8), total_steps=10)


def test_steps_are_whole_or_a_fraction():
    (problem,) = SchedulerOptions(lr_scheduler="linear", lr_warmup_steps=1.5).problems()
    assert problem == "--lr_warmup_steps 1.5: give whole steps, a fraction below 1 or a percentage up to 100%"
    assert list(SchedulerOptions(lr_warmup_steps=0.5, lr_decay_steps=3).problems()) == []


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"lr_scheduler": "cosine", "lr_decay_steps": 5}, "--lr_decay_steps has no effect with cosine"),
        ({"lr_scheduler": "linear", "lr_scheduler_timescale": 5}, "--lr_scheduler_timescale has no effect with linear"),
        ({"lr_scheduler": "cosine", "lr_scheduler_min_lr_ratio": 0.1}, "--lr_scheduler_min_lr_ratio has no effect"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 5, "lr_scheduler_min_lr_ratio": 0.1}, None),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1}, None),
        ({"lr_scheduler": "inverse_sqrt", "lr_scheduler_timescale": 5}, None),
    ],
)
def test_options_that_the_schedule_does_not_read(given, line, caplog):
    choice = choose_optimizer(OptimizerOptions(learning_rate=1e-3))
    with caplog.at_level(logging.WARNING, logger="trainyard"):
        check_scheduler(SchedulerOptions(**given), choice, total_steps=100)
    found = [r.getMessage() for r in caplog.records if r.name == "trainyard"]
    assert [text.startswith(line) for text in found] == [True] if line else found == []


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_longer_run_has_its_own_rates_at_once(name):
    """The state of a run of 20 steps continued as one of 40: from the next step on the rates are those of 40 steps.

    The same state continued at its own length has the rates that it would have had, to the bit.
    """
    own = {"lr_scheduler_min_lr_ratio": 0.1, "lr_decay_steps": 0.5, "lr_warmup_steps": 0.2}
    no_warmup = name in ("constant", "piecewise_constant")
    args = ("step_rules='1:10,0.1:20,0.01'",) if name == "piecewise_constant" else None
    given = {**own, "lr_warmup_steps": 0 if no_warmup else 0.2, "lr_scheduler_args": args}
    options = SchedulerOptions(lr_scheduler=name, **given)
    first = sgd(groups=2)
    scheduler = build_scheduler(options, first, total_steps=20)
    rates(scheduler, first, 7)
    saved = first.optimizer.state_dict(), scheduler.state_dict()
    for total in (20, 40):
        whole, resumed = sgd(groups=2), sgd(groups=2)
        expected = rates(build_scheduler(options, whole, total_steps=total), whole, 14)[7:]
        resumed.optimizer.load_state_dict(copy.deepcopy(saved[0]))
        again = build_scheduler(options, resumed, total_steps=total)
        again.load_state_dict(copy.deepcopy(saved[1]))
        assert rates(again, resumed, 7) == expected


def test_lowest_rate_of_a_plateau_is_the_one_that_is_given():
    """torch keeps it in the state, and a new --lr_scheduler_min_lr_ratio would do nothing."""
    built = [
        build_scheduler(
            SchedulerOptions(lr_scheduler="reduce_lr_on_plateau", lr_scheduler_min_lr_ratio=ratio), sgd(), total_steps=9
        )
        for ratio in (0.1, 0.5)
    ]
    built[1].load_state_dict(built[0].state_dict())
    assert built[1].scheduler.min_lrs == [0.5]
