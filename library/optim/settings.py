# SPDX-License-Identifier: Apache-2.0
"""Settings of optimizers and schedules in the form name=value, and classes given by name."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from library.errors import UserError, first_names, nearest, raise_problems, unknown
from library.values import MOST, at_least, between, cut, shown

RANGES = {"weight_decay": at_least(0), "eps": at_least(0), "betas": between(0, 1)}
PLAIN = "a number, True, False, None, text in quotes, or a (tuple) of them"


def read_settings(items: Iterable[str], flag: str) -> dict[str, Any]:
    """Parse settings such as `["weight_decay=0.01", "betas=(0.9, 0.99)"]`; values are Python literals.

    Raises UserError with every mistake.
    """
    settings: dict[str, Any] = {}
    problems = []
    for item in items:
        name, equals, text = item.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier() or "=" in text:
            problems.append(f"{flag}: '{item}' is not of the form name=value")
        elif name in settings:
            problems.append(f"{flag}: {name} is given twice")
        else:
            try:
                settings[name] = _plain_value(text)
            except ValueError as error:
                problems.append(f"{flag}: {name}={cut(text)}: {error}")
    raise_problems(problems)
    return settings


def _plain_value(text: str) -> Any:
    """Parse a Python literal. Raises ValueError for anything else, infinities and absurdly large numbers."""
    wrong = ValueError(f"expects {PLAIN}")
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # whatever Python's parser may raise
        raise wrong from None
    for item in value if isinstance(value, (tuple, list)) else [value]:
        if not isinstance(item, (int, float, str, type(None))):
            raise wrong
        if isinstance(item, (int, float)) and not abs(item) <= MOST:
            raise ValueError(f"must be between {-MOST} and {MOST}")
    return value


def _misfit(name: str, value: Any, default: Any) -> str | None:
    """What is wrong with a value, judged by the parameter's default: `expects a number, got 'x'`. None: nothing."""
    if isinstance(default, bool):
        return None if value in (True, False) else f"expects True or False, got {shown(value)}"
    if isinstance(default, (int, float)):
        wrong = None if _is_number(value) else "expects a number"
    elif isinstance(default, tuple) and all(_is_number(item) for item in default):
        fits = isinstance(value, (tuple, list)) and len(value) == len(default) and all(map(_is_number, value))
        wrong = None if fits else f"expects {len(default)} numbers such as {default}"
    elif isinstance(default, str):
        wrong = None if isinstance(value, str) else f"expects a text such as {default!r}"
    else:
        wrong = None
    if wrong is None and name in RANGES:
        numbers = value if isinstance(value, (tuple, list)) else [value]
        wrong = next(filter(None, (RANGES[name](item) for item in numbers if _is_number(item))), None)
    return wrong and f"{wrong}, got {shown(value)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_settings(
    settings: Mapping[str, Any], target: Callable[..., Any], flag: str, taken: Collection[str], *, named: bool = False
) -> None:
    """Check settings against the parameters of `target`; those in `taken` are set elsewhere. Raises UserError.

    named: refuse names that only its **kwargs would take.
    """
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not named:
        allowed = None
    else:
        allowed = {p.name for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - set(taken)
    problems = []
    for name, value in settings.items():
        if name == "lr":
            problems.append(f"{flag}: lr: give it as --learning_rate")
        elif name in taken:
            problems.append(f"{flag}: {name} is set by the name that was chosen and cannot be given")
        elif allowed is not None and name not in allowed:
            problems.append(unknown(flag, name, allowed))
        else:
            wrong = _misfit(name, value, parameters[name].default if name in parameters else None)
            problems += [f"{flag}: {name} {wrong}"] if wrong else []
    raise_problems(problems)


def import_class(path: str, *, default_module: str, base: type, flag: str, package: str = "") -> type:
    """The class named by `module.Class`, or by `Class` in `default_module`; it must derive from `base`.

    package: what to pip install when the module is missing; "": the first part of the module's name.
    Raises UserError with the install command or the nearest name.
    """
    if not all(part.isidentifier() for part in path.split(".")):
        raise UserError(f"{flag}: '{cut(path)}' names no class: expects Name or module.Name")
    module_name, _, class_name = path.rpartition(".")
    module_name = module_name or default_module
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if importlib.util.find_spec(missing.partition(".")[0]) is not None:
            raise UserError(f"{flag} {path}: there is no module {missing}") from None
        wanted = package if package and module_name.startswith(missing) else missing.partition(".")[0]
        raise UserError(f"{flag} {path}: package {wanted} is not installed: pip install {wanted}") from None
    except (Exception, SystemExit) as error:  # importing a module may raise anything
        raise UserError(f"{flag} {path}: {module_name} cannot be imported: {first_line(error)}") from None
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, base) and found is not base):
        names = class_names(module, base)
        hint = nearest(class_name, names)
        ending = f". Did you mean '{hint}'?" if hint else (f". It has {first_names(names, 10)}" if names else "")
        raise UserError(f"{flag}: {module_name} has no {base.__name__} named '{class_name}'{ending}")
    return found


def class_names(module: Any, base: type) -> list[str]:
    """Names of the classes in `module` that derive from `base`, without `base` itself."""
    members = inspect.getmembers(module, inspect.isclass)
    return [name for name, cls in members if issubclass(cls, base) and cls is not base and not name.startswith("_")]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type when the message is empty."""
    return cut((str(error).splitlines() or [""])[0] or type(error).__name__, 300)
