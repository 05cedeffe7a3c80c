# SPDX-License-Identifier: Apache-2.0
"""name=value settings of optimizers and schedules, and classes named by text."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any

from library.errors import UserError, nearest, unknown


def read_settings(items: Iterable[str], flag: str) -> dict[str, Any]:
    """`["weight_decay=0.01", "betas=(0.9, 0.99)"]` as a dict; values are Python literals. Raises UserError."""
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
                settings[name] = ast.literal_eval(text.strip())
            except (ValueError, SyntaxError):
                problems.append(
                    f"{flag}: {name}={text}: '{text}' is no number, True, False, None, (tuple) or text in quotes"
                )
    if problems:
        raise UserError(problems)
    return settings


def check_settings(settings: Iterable[str], target: Callable[..., Any], flag: str, taken: Collection[str]) -> None:
    """Compare setting names with the parameters of `target`; those in `taken` are set elsewhere. Raises UserError."""
    parameters = inspect.signature(target).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        allowed = None
    else:
        allowed = {p.name for p in parameters if p.kind is not p.VAR_POSITIONAL} - set(taken)
    problems = []
    for name in settings:
        if name == "lr":
            problems.append(f"{flag}: lr: give it as --learning_rate")
        elif name in taken:
            problems.append(f"{flag}: {name} is set by the name that was chosen and cannot be given")
        elif allowed is not None and name not in allowed:
            problems.append(unknown(flag, name, allowed))
    if problems:
        raise UserError(problems)


def import_class(path: str, *, default_module: str, base: type, flag: str, package: str = "") -> type:
    """The class named by `module.Class`, or by `Class` in `default_module`; it must derive from `base`.

    package: what to install when the module is missing (the first part of the module's name when empty).
    Raises UserError with the install command or the nearest name.
    """
    module_name, _, class_name = path.rpartition(".")
    module_name = module_name or default_module
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        wanted = package if package and module_name.startswith(missing) else missing.partition(".")[0]
        raise UserError(f"{flag} {path}: package {wanted} is not installed: pip install {wanted}") from None
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"{flag} {path}: {module_name} cannot be imported: {first_line(error)}") from None
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        names = class_names(module, base)
        hint = nearest(class_name, names)
        ending = f". Did you mean '{hint}'?" if hint else (f". It has {', '.join(names)}" if names else "")
        raise UserError(f"{flag}: {module_name} has no {base.__name__} named '{class_name}'{ending}")
    return found


def class_names(module: Any, base: type) -> list[str]:
    """Names of the classes in `module` that derive from `base`, without `base` itself."""
    members = inspect.getmembers(module, inspect.isclass)
    return [name for name, cls in members if issubclass(cls, base) and cls is not base and not name.startswith("_")]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type when it has none."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
