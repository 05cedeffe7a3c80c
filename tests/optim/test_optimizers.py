# SPDX-License-Identifier: Apache-2.0
"""Names, settings, groups and messages. That each optimizer works is in tests/contracts/test_optimizers.py."""

from __future__ import annotations

import logging

import pytest
import torch

from library.errors import UserError
from library.optim.optimizers import OPTIMIZERS, choose_optimizer
from library.optim.options import EmaOptions, OptimizerOptions, SchedulerOptions
from library.optim.schedulers import build_scheduler
from library.optim.settings import import_class


def choose(name="", *args, **more):
    return choose_optimizer(OptimizerOptions(optimizer_type=name, optimizer_args=args or None, **more))


def groups(*rates):
    return [{"params": [torch.nn.Parameter(torch.zeros(2, 2))], "lr": rate, "name": f"group{rate}"} for rate in rates]


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        (lambda: choose(), "torch.optim.adamw.AdamW"),
        (lambda: choose("adamw", "weight_decay=0.1", "betas=.9,.99"), "(weight_decay=0.1,betas=(0.9, 0.99))"),
        (lambda: choose("SGDNESTEROV"), "torch.optim.sgd.SGD(momentum=0.9)"),
        (lambda: choose("SGDNesterov", "momentum=0.5"), "torch.optim.sgd.SGD(momentum=0.5)"),
        (lambda: choose("RMSprop"), "torch.optim.rmsprop.RMSprop"),
        (lambda: choose("torch.optim.NAdam"), "torch.optim.nadam.NAdam"),
        (lambda: choose("lion_pytorch.Lion"), "lion_pytorch.lion_pytorch.Lion"),
        (lambda: choose(use_lion_optimizer=True), "lion_pytorch.lion_pytorch.Lion"),
        (lambda: choose("Adafactor"), "transformers.optimization.Adafactor(relative_step=True)"),
    ],
)
def test_names(choice, name):
    assert choice().metadata_name.endswith(name)


def test_old_flag_for_8bit():
    pytest.importorskip("bitsandbytes")
    assert choose(use_8bit_adam=True).metadata_name == "bitsandbytes.optim.adamw.AdamW8bit"


def test_groups_keep_their_rates_and_names():
    built = choose("AdamW", learning_rate=1e-3).build(groups(1e-4, 5e-4))
    assert [g["lr"] for g in built.optimizer.param_groups] == [1e-4, 5e-4]
    assert [g["name"] for g in built.optimizer.param_groups] == ["group0.0001", "group0.0005"]


def test_sgd_nesterov_is_nesterov():
    (group,) = choose("SGDNesterov").build(groups(1.0)).optimizer.param_groups
    assert group["nesterov"] is True and group["momentum"] == 0.9


def test_elementwise_column():
    assert choose("AdamW").toy().elementwise and choose("Adamax").toy().elementwise
    assert not OPTIMIZERS["AdamW8bit"].elementwise and not choose("Adafactor").toy().elementwise
    assert not choose("lion_pytorch.Lion").toy().elementwise  # unknown: the safe answer


def test_adafactor_makes_its_own_rate():
    choice = choose("Adafactor", learning_rate=1e-4)
    built = choice.build(groups(1e-4, 5e-4))
    assert built.schedule == "adafactor:0.0001"
    assert [g["lr"] for g in built.optimizer.param_groups] == [None, None]
    fixed = choose("Adafactor", "relative_step=False", "scale_parameter=False", learning_rate=1e-4)
    assert fixed.schedule is None and [g["lr"] for g in fixed.build(groups(1.0)).optimizer.param_groups] == [1.0]


def test_adafactor_warmup_init_switches_relative_step_on(caplog):
    with caplog.at_level(logging.WARNING):
        choice = choose("Adafactor", "warmup_init=True", "relative_step=False")
    assert choice.settings["relative_step"] is True and "warmup_init needs relative_step" in caplog.text


@pytest.mark.parametrize("name", ["DAdaptAdam", "DAdaptAdaGrad", "Prodigy"])
def test_one_rate_for_all_groups(name, caplog):
    with caplog.at_level(logging.WARNING):
        built = choose(name, learning_rate=1.0).build(groups(0.5, 1.0, 0.0))
    assert [g["lr"] for g in built.optimizer.param_groups] == [1.0, 1.0, 0.0]
    assert [r.message for r in caplog.records] == [
        f"{name} takes one learning rate for everything: 1 is used (given: 0.5, 1)"
    ]


def test_low_rate_for_a_rate_finder_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        choose("Prodigy", learning_rate=1e-4)
    assert "wants a rate of about 1" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize(
    ("name", "args", "line"),
    [
        ("AdmW", (), r"--optimizer_type: unknown name 'AdmW'\. Did you mean 'Adam"),
        ("AdamW", ("weight_decai=0.1",), "unknown key 'weight_decai'. Did you mean 'weight_decay'"),
        ("AdamW", ("weight_decay",), "'weight_decay' is not of the form name=value"),
        ("AdamW", ("weight_decay=a=1",), "is not of the form name=value"),
        ("AdamW", ("weight_decay=abc",), "--optimizer_args: weight_decay=abc: expects a number, True, False, None"),
        ("AdamW", ("eps=1", "eps=2"), "eps is given twice"),
        ("AdamW", ("lr=1",), "give it as --learning_rate"),
        ("AdamW", ("betas=0.9",), "--optimizer_args: betas expects 2 numbers such as (0.9, 0.999), got 0.9"),
        ("AdamW", ("betas=(2, 3)",), "--optimizer_args: betas must be between 0 and 1, got (2, 3)"),
        ("AdamW", ("betas=(1, 2, 3)",), "betas expects 2 numbers such as (0.9, 0.999), got (1, 2, 3)"),
        ("AdamWScheduleFree", ("betas=0.9",), "betas expects 2 numbers"),
        ("Prodigy", ("betas=(0.9,)",), "betas expects 2 numbers"),
        ("Prodigy", ("weight_decay=-1",), "weight_decay must be at least 0, got -1"),
        ("Lion", ("weight_decay=True",), "weight_decay expects a number, got True"),
        ("AdamW8bit", ("weight_decay=1e999",), "weight_decay=1e999: must be between"),
        ("AdamW", ("capturable=True",), "capturable=True: no CUDA graphs are made here; leave it out"),
        ("RMSprop", ("maximize=True",), "the loss is made smaller, not larger"),
        ("AdamW", ("amsgrad='yes'",), "amsgrad expects True or False, got 'yes'"),
        ("AdamW", ("weight_decay=" + "(" * 5000,), "weight_decay=((("),
        ("AdamW", ("weight_decay=" + "9" * 5000,), "weight_decay=999"),
        ("..x", (), "'..x' names no class: expects Name or module.Name"),
        ("torch.optim.AdamW.x", (), "there is no module torch.optim.AdamW"),
        ("torch.optim.Optimizer", (), "has no Optimizer named 'Optimizer'"),
        ("SGDNesterov", ("nesterov=False",), "nesterov is set by the name"),
        ("SGDNesterov", ("momentum=0",), "refused with"),
        ("CAME", ("beta=(0.9, 0.99)",), "--optimizer_args: unknown key 'beta'. Did you mean 'betas'"),
        ("CAME", ("betas=(0.9, 0.99)",), "betas expects 3 numbers such as (0.9, 0.999, 0.9999)"),
        ("SOAP", ("precondition_frequency=0",), "--optimizer_type SOAP: refused with"),
        ("Muon", ("adamw_lr=1e-4",), "adamw_lr is set by the name that was chosen and cannot be given"),
        (
            "torch.optim.Muon",
            (),
            "cannot be used here: it takes matrices only; Muon, without torch.optim",
        ),
        ("ProdigyPlusScheduleFree", ("fused_back_pass=True",), "fused_back_pass is set by the name"),
        ("AdEMAMix8bit", ("alfa=5",), "unknown key 'alfa'. Did you mean 'alpha'"),
        ("LBFGS", (), "cannot be used here: it evaluates the loss several times"),
        ("no_such_package.optim.Thing", (), "package no_such_package is not installed: pip install no_such_package"),
        ("lion_pytorch.Lyon", (), "has no Optimizer named 'Lyon'. Did you mean 'Lion'"),
        ("torch.optim.lr_scheduler.StepLR", (), "has no Optimizer named 'StepLR'"),
    ],
)
def test_bad_input(name, args, line):
    with pytest.raises(UserError) as caught:
        choose(name, *args)
    assert len(caught.value.problems) == 1
    assert line.replace("\\", "") in caught.value.problems[0]


def test_all_wrong_settings_at_once():
    with pytest.raises(UserError) as caught:
        choose("AdamW", "weight_decai=0.1", "bettas=(0.9, 0.99)")
    assert len(caught.value.problems) == 2


def test_muon_steps_matrices_and_adamw_the_rest():
    """With one learning rate: Muon's step of a matrix is as long as one of AdamW's."""
    matrix, kernel, bias = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((24, 16), (8, 4, 3, 3), (16,)))
    group = {"params": [matrix, bias, kernel], "lr": 1e-2, "name": "all"}
    optimizer = choose("Muon", learning_rate=1e-2).build([group, {"params": [], "lr": 1.0}]).optimizer
    first, second = optimizer.param_groups
    assert ([*first["params"]], [*second["params"]]) == ([matrix, kernel], [bias])
    assert (first["lr"], second["lr"], first["name"], second["name"]) == (1e-2, 1e-2, "all", "all")
    draw = torch.Generator().manual_seed(0)
    for weight in (matrix, kernel, bias):
        weight.grad = torch.randn(weight.shape, generator=draw)
    plain = [p.detach().clone().requires_grad_() for p in (bias,)]
    plain[0].grad = bias.grad.clone()
    optimizer.step()
    torch.optim.AdamW(plain, lr=1e-2, betas=(0.9, 0.95), eps=1e-10, weight_decay=0).step()
    assert torch.allclose(bias, plain[0], atol=1e-6)
    values = torch.linalg.svdvals(matrix.detach())
    assert values.max() / values.min() < 2  # near to an orthogonal matrix
    assert 0.1e-2 < matrix.square().mean().sqrt() < 0.4e-2


def test_kahan_is_how_weights_in_bf16_are_updated():
    options = OptimizerOptions(optimizer_type="adamw8bitKahan")
    assert options.kahan and not OptimizerOptions(optimizer_type="AdamW8bit").kahan
    assert OPTIMIZERS["AdamW8bitKahan"] == OPTIMIZERS["AdamW8bit"]


def test_prints_of_other_packages_are_not_shown(capsys):
    pytest.importorskip("prodigyplus")
    choose("ProdigyPlusScheduleFree", learning_rate=1.0).build(groups(1.0))
    assert capsys.readouterr().out == ""


def test_missing_package_of_the_table_names_what_pip_installs():
    for name in ("CAME", "SOAP", "Muon", "ProdigyPlusScheduleFree"):
        row = OPTIMIZERS[name]
        module, _, cls = row.path.partition(".")
        package = f"package {row.package} is not installed: pip install {row.package}"
        with pytest.raises(UserError, match=package):
            import_class(f"{module}_gone.{cls}", default_module="", base=object, flag="--x", package=row.package)
    with pytest.raises(UserError, match="package lion-pytorch is not installed: pip install lion-pytorch"):
        import_class("lion_pytorch_gone.Lion", default_module="", base=object, flag="--x", package="lion-pytorch")


def test_old_flags_exclude_the_new_one():
    (problem,) = OptimizerOptions(optimizer_type="Lion", use_8bit_adam=True).problems()
    assert "--use_8bit_adam and --optimizer_type" in problem
    assert list(OptimizerOptions(use_8bit_adam=True).problems()) == []


def test_every_row_has_a_package_that_pip_can_install():
    for name, row in OPTIMIZERS.items():
        assert row.package or row.path.startswith(("torch.", "transformers.")), name


def test_ema_is_off_by_default():
    assert EmaOptions().ema_decay is None


@pytest.mark.parametrize("name", ["AdamW", "AdamWScheduleFree"])
def test_weights_in_fp16_that_would_become_nan(name):
    if name not in ("AdamW",):
        pytest.importorskip("schedulefree")
    choice = choose(name, learning_rate=1e-4)
    with pytest.raises(UserError, match=f"--optimizer_type {name} makes weights in float16 not finite") as caught:
        choice.check_dtype(torch.float16)
    assert len(caught.value.problems) == 1
    choice.check_dtype(torch.bfloat16)


def test_optimizers_for_weights_in_fp16():
    choose("lion_pytorch.Lion", learning_rate=1e-4).check_dtype(torch.float16)
    choose("SGDNesterov", learning_rate=1e-4).check_dtype(torch.float16)


def test_adamw_is_fused_unless_the_settings_say_otherwise():
    plain = choose("AdamW", learning_rate=1e-3)
    assert plain.toy().optimizer.defaults["fused"] and plain.metadata_name == "torch.optim.adamw.AdamW"
    for setting in ("foreach=True", "fused=False"):
        asked = choose("AdamW", setting, learning_rate=1e-3).toy().optimizer
        assert not asked.defaults["fused"]


def test_8bit_optimizers_take_schedules():
    """Their step is changed so that it does not synchronize; schedules wrap it once more."""
    built = choose("AdamW8bit", learning_rate=1e-2).toy()
    scheduler = build_scheduler(SchedulerOptions(lr_scheduler="linear"), built, total_steps=4)
    (weight,) = built.optimizer.param_groups[0]["params"]
    weight.grad = torch.ones_like(weight)
    built.optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.75e-2] and bool((weight < 0).all())
