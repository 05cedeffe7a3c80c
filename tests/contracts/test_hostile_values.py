# SPDX-License-Identifier: Apache-2.0
"""Values that no run can use, over every option of every script, tool and dataset file: refused in one line each."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from pathlib import Path
from typing import Any

import pytest

from library.cli import METHODS, option_groups
from library.data.config import key_specs
from library.errors import UserError
from library.families.registry import FAMILIES
from library.options import Spec, resolve, specs
from library.values import LARGEST_FLOAT, SEEDS, rate
from tools.make_options_doc import SCRIPTS

ROOT = Path(__file__).parents[2]
# Every value is a text of the command line; `huge` ones are also what a TOML or JSON file may hold.
HUGE = ("1e30", "-1e30", str(10**18 + 1), "9" * 5000, "inf", "-inf", "nan", "1e400", "1_000")
SMALL = ("-1", "0", "0.5", "1e-30", str(2**53 + 1))
TOML_VALUES: tuple[Any, ...] = (
    10**18 + 1, 10**400, 1e30, float("inf"), float("nan"), True, [], [[1]], {}, {"a": 1}, "\0", "\ud800", "a" * 10**5,
)  # fmt: skip
UNLIMITED = {"seed", "validation_seed", "vram_budget"}  # have larger limits of their own


def option_classes_of_tools() -> dict[str, type]:
    """Each dataclass of options in the tools, by where it stands."""
    found: dict[str, type] = {}
    for path in sorted([*ROOT.glob("networks/*.py"), *ROOT.glob("tools/*.py")]):
        if path.stem in ("__init__", "make_base_model", "score_lora"):  # scripts of the base model, which is ours
            continue
        module = importlib.import_module(f"{path.parent.name}.{path.stem}")
        for name, cls in vars(module).items():
            fields = dataclasses.fields(cls) if isinstance(cls, type) and dataclasses.is_dataclass(cls) else ()
            if fields and all("option" in f.metadata for f in fields):
                found[f"{cls.__module__}.{name}"] = cls
    return found


def all_specs() -> dict[str, Spec]:
    """Every option there is, once for each form that it has."""
    found = {f"file {key}": spec for key, spec in key_specs().items()}
    for script, (method, family) in SCRIPTS.items():
        found |= {f"{script} {name}": spec for name, spec in specs(option_groups(method, family)).items()}
    for where, cls in option_classes_of_tools().items():
        found |= {f"{where} {name}": spec for name, spec in specs({"own": cls}).items()}
    once = {(spec.name, str(spec.hint), id(spec.info)): where for where, spec in reversed([*found.items()])}
    return {where: found[where] for where in sorted(once.values())}


SPECS = all_specs()


def is_numeric(spec: Spec) -> bool:
    hints = [spec.hint, *typing.get_args(spec.hint)]
    return bool({int, float} & {inner for hint in hints for inner in (hint, *typing.get_args(hint))})


def numbers_in(value: Any) -> list[float]:
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def read(spec: Spec, value: Any) -> Any:
    """The value, or None where it is refused in a line that can be read."""
    try:
        return spec.read(value)
    except ValueError as error:
        (line,) = UserError(str(error)).lines()
        assert 0 < len(line) < 2100 and "Traceback" not in line, line
        return None


@pytest.mark.parametrize("value", [*HUGE, *SMALL])
def test_numbers_have_a_range(value: str) -> None:
    """Whatever is accepted is finite and of a size with which a run can do something."""
    for where, spec in SPECS.items():
        if not is_numeric(spec) or spec.info.answer:
            continue
        found = numbers_in(read(spec, value))
        most = SEEDS[1] if spec.name in UNLIMITED else LARGEST_FLOAT if spec.info.check is rate else 10**9
        assert all(-most <= number <= most for number in found), (where, value, found)
        if value == str(2**53 + 1) and spec.info.check is not rate:
            assert all(number == 2**53 + 1 for number in found), (where, found)  # or refused, but never rounded


def test_values_of_any_kind_are_answered() -> None:
    """Never a traceback, and no text without its characters."""
    for where, spec in SPECS.items():
        for value in TOML_VALUES:
            try:
                found = read(spec, value)
            except Exception as error:
                raise AssertionError((where, str(value)[:40])) from error
            if isinstance(found, str):
                assert "\0" not in found and "\ud800" not in found, where


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_bad_numbers_of_a_command_line_at_once(script: str) -> None:
    method, family = SCRIPTS[script]
    numeric = [s for s in specs(option_groups(method, family)).values() if is_numeric(s) and not s.takes_many]
    words = [word for spec in numeric for word in (spec.flag, "1e30")]
    with pytest.raises(UserError) as told:
        resolve(METHODS[method][1], FAMILIES[family].option_groups, words, prog=script)
    lines = [*told.value.lines()]
    named = {line.split()[0] for line in told.value.problems}
    assert len(named) > 0.9 * len(numeric) and all(len(line) < 400 for line in lines), lines


def test_whole_numbers_stay_whole_from_everywhere(tmp_path: Path) -> None:
    """Above 2^53 a float has gaps: another seed would train other weights."""
    seed = 9007199254740993
    config = tmp_path / "c.toml"
    config.write_text(f"seed = {seed}\noutput_dir = 'o'\ntrain_data_dir = 'd'\npretrained_model_name_or_path = 'm'\n")
    for words in (["--config_file", str(config)], ["--config_file", str(config), "--seed", str(seed)]):
        found = resolve(METHODS["network"][1], FAMILIES["sd"].option_groups, words, prog="t").options
        assert found.train.seed == seed
