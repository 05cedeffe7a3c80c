# SPDX-License-Identifier: Apache-2.0
"""Options: one field of a frozen dataclass defines the flag, the TOML key, the row in the docs and the validation.

    @dataclass(frozen=True)
    class SaveOptions:
        output_dir: str = option("output", help="Folder for everything that the run writes.")
        save_every_n_steps: int | None = option(None, help="...", check=positive)

        def problems(self) -> Iterator[str]: ...      # invalid combinations, one line each

A method's options are a dataclass of such groups. `resolve` fills it from the command line, --config_file and the
defaults, in this order of precedence. All mistakes are reported at once. Does not import torch, so `--help` is instant.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple

import tomli_w

from library.errors import UserError, how_many_shown, nearest, unknown_names
from library.foreign_keys import FOREIGN_KEYS, NOT_OURS, PIPELINE, PRESET
from library.text_files import read_toml
from library.values import (
    Refused,
    ValueCheck,
    at_least,
    between,
    convert,
    cut,
    int_or_fraction,
    positive,
    refused,
    shown,
    text_problem,
    usual_range,
)

__all__ = [  # what modules with options need
    "Choice",
    "Idle",
    "ValueCheck",
    "at_least",
    "between",
    "convert",
    "int_or_fraction",
    "option",
    "positive",
    "read_toml",
    "refused",
]  # fmt: skip


@dataclass(frozen=True)
class OptionInfo:
    """What `option` says about an option besides its default."""

    help: str
    choices: Sequence[str] = ()
    check: ValueCheck | None = None
    parse: Callable[[Any], Any] | None = None  # converts text or a TOML value; raises ValueError with what it expects
    answer: str | None = None  # the option is accepted without effect; this line, shown once, says what replaces it
    secret: bool = False  # never printed, logged, dumped or written to metadata
    zero_is_unset: bool = False  # 0, which graphical programs write, means not given
    path: bool = False  # the name of a file or folder, which may not be UTF-8


def option(default: Any = None, **properties: Any) -> Any:
    """Declare an option. properties: those of `OptionInfo`; `help` is required."""
    info = OptionInfo(**properties)
    return field(default=default, repr=not info.secret, metadata={"option": info})


@dataclass(frozen=True)
class Spec:
    """An option together with its name, group, type and default."""

    name: str
    group: str
    hint: Any
    default: Any
    info: OptionInfo

    @property
    def flag(self) -> str:
        return "--" + self.name

    @property
    def is_switch(self) -> bool:
        """Whether the flag alone means true."""
        return bool in (self.hint, *typing.get_args(self.hint))

    @property
    def takes_many(self) -> bool:
        hints = (self.hint, *typing.get_args(self.hint))
        return self.info.parse is None and any(typing.get_origin(h) is tuple for h in hints)

    def read(self, value: Any) -> Any:
        """Convert and validate a value. Raises ValueError with what is wrong."""
        result = self.info.parse(value) if self.info.parse else convert(value, self.hint)
        if self.info.zero_is_unset and result == 0:
            return self.default
        if self.info.choices and result is not None and result not in self.info.choices:
            hint = nearest(str(result), self.info.choices)
            extra = f". Did you mean '{hint}'?" if hint else ""
            raise ValueError(f"{shown(result)} is not one of {', '.join(self.info.choices)}{extra}")
        for item in result if isinstance(result, tuple) else (result,):
            self._check(item)
        return result

    def _check(self, item: Any) -> None:
        """Raises ValueError for a value, or an item of several, that is out of range or not valid text."""
        if item is None:
            return
        wrong = text_problem(item, path=self.info.path) if isinstance(item, str) else None
        if wrong:
            raise ValueError(f"{wrong}, got {shown(item)}")
        wrong = (self.info.check or usual_range)(item)
        if wrong:
            raise ValueError(f"{wrong}, got {cut(str(item))}")


class Idle(str):
    """A problem about options without effect. The line starts with them: `--a needs --b`.

    On the command line that is a mistake. In a config file, where graphical programs leave such options behind, they
    are ignored and the line is logged.
    """

    def names(self) -> list[str]:
        """Names of the options without effect."""
        found = re.match(r"--(\w+)(?: and --(\w+))?", self)
        assert found is not None, self
        return [name for name in found.groups() if name]


class Choice(NamedTuple):
    """A value for an option that was not given, and a line about it. A method's options yield these as `choices`."""

    name: str
    value: Any
    line: str


@dataclass(frozen=True)
class ConfigFileOptions:
    """Where options come from, besides the command line."""

    config_file: str | None = option(None, help="TOML file of options; the command line wins over it.", path=True)
    output_config: bool = option(
        False, help="Write the options that differ from the defaults to --config_file and exit."
    )


# ---- a method's options ------------------------------------------------------------------------------------------


def group_types(method: type, overrides: Mapping[str, type]) -> dict[str, type]:
    """Group name -> dataclass of a method's options. A family's groups replace the general groups that they extend."""
    hints = typing.get_type_hints(method)
    names = [f.name for f in dataclasses.fields(method)]
    return {n: hints[n] if issubclass(hints[n], overrides.get(n, hints[n])) else overrides[n] for n in names}


def specs(groups: Mapping[str, type]) -> dict[str, Spec]:
    """Option name -> Spec, over all groups. An option may be in one group only."""
    found: dict[str, Spec] = {}
    for group, cls in groups.items():
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            assert f.name not in found, f"option {f.name} is in both {found[f.name].group} and {group}"
            found[f.name] = Spec(f.name, group, hints[f.name], f.default, f.metadata["option"])
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message[0].upper() + message[1:])


def build_parser(all_specs: Mapping[str, Spec], prog: str, description: str) -> argparse.ArgumentParser:
    """The argparse parser: names, groups and help only; `Spec.read` converts the values."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    sections: dict[str, Any] = {}
    for spec in all_specs.values():
        section = sections.setdefault(spec.group, None) or parser.add_argument_group(spec.group.replace("_", " "))
        sections[spec.group] = section
        kwargs: dict[str, Any] = {
            "dest": spec.name,
            "default": argparse.SUPPRESS,
            "help": describe(spec).replace("%", "%%"),
        }
        if spec.is_switch:
            values = "true|false" if spec.hint is bool else "true|false|VALUE"
            kwargs |= {"nargs": "?", "const": True, "metavar": values}
        elif spec.takes_many:
            kwargs |= {"nargs": "*", "metavar": "VALUE"}
        else:
            kwargs |= {"metavar": "{" + ",".join(spec.info.choices) + "}" if spec.info.choices else "VALUE"}
        section.add_argument(spec.flag, **kwargs)
    return parser


def describe(spec: Spec) -> str:
    """Help text with the default, or with the answer of an option without effect."""
    text = spec.info.help
    if spec.info.answer:
        return f"{text} ({spec.info.answer})"
    return text if spec.default in (None, False, ()) else f"{text} Default: {spec.default}."


@dataclass(frozen=True)
class Resolved:
    """The method's options, lines to log about unused options and keys, and the source of each given option."""

    options: Any
    answers: tuple[str, ...]
    given: Mapping[str, str]  # option name -> "command line" or the config file


def resolve(
    method: type, overrides: Mapping[str, type], argv: Sequence[str], *, prog: str, description: str = "",
    missing: Callable[[Any], Iterable[str]] = lambda options: (),
) -> Resolved:  # fmt: skip
    """Read the method's options from the command line and --config_file. Raises UserError with every mistake.

    missing: gives lines about required options that are checked later; they are added when there are other mistakes.
    """
    groups = group_types(method, overrides)
    all_specs = specs(groups)
    problems: list[str] = []
    command_line = _read_command_line(all_specs, argv, prog, description, problems)
    path = _config_path(command_line)
    table, foreign = (
        _read_config_file(path, all_specs, problems) if path and not command_line.get("output_config") else ({}, [])
    )
    given = _Given({**dict.fromkeys(table, str(path)), **dict.fromkeys(command_line, "command line")})
    given.read(all_specs, {**table, **command_line}, problems)
    if problems:  # combinations are checked only when all values are valid
        raise UserError(problems)
    options = given.settle(method, groups, all_specs, missing)
    answers = [
        f"{s.flag}: {s.info.answer}"
        for n, s in all_specs.items()
        if s.info.answer and given.values.get(n) not in (None, False)
    ]
    idle = [*foreign, *given.meaningless]
    unused = [f"not used by this script (keys of the GUI or of other scripts): {', '.join(idle)}"] if idle else []
    unused += [f"left out: {'; '.join(given.left_out)}"] if given.left_out else []
    answers += [f"{path}: {'; '.join(unused)}"] if unused else []
    return Resolved(options, (*answers, *given.chosen), {n: given.sources[n] for n in given.values})


@dataclass
class _Given:
    """The given values, and which of them are not used."""

    sources: dict[str, str]  # option name -> "command line" or the config file
    values: dict[str, Any] = field(default_factory=dict)
    meaningless: list[str] = field(default_factory=list)  # names in the file that are for other architectures
    left_out: list[str] = field(default_factory=list)  # why options in the file were ignored, one line each
    chosen: list[str] = field(default_factory=list)

    def by_hand(self, name: str) -> bool:
        return self.sources[name] == "command line"

    def read(self, all_specs: Mapping[str, Spec], raws: Mapping[str, Any], problems: list[str]) -> None:
        """Convert texts and TOML values to `values`, and add mistakes to `problems`."""
        for name, raw in raws.items():
            if raw == "":  # graphical programs write that for fields that are not filled in
                continue
            spec = all_specs[name]
            is_text = str in (spec.hint, *typing.get_args(spec.hint))  # the name of a model is always intended
            foreign = isinstance(spec.info.check, Refused) and not self.by_hand(name) and not is_text
            try:
                value = replace(spec, info=replace(spec.info, check=None)).read(raw) if foreign else spec.read(raw)
            except ValueError as error:
                problems.append(f"{spec.flag if self.by_hand(name) else f'{self.sources[name]}: {name}'} {error}")
                continue
            if foreign and value:
                self.meaningless.append(name)
            else:
                self.values[name] = value

    def build(self, method: type, groups: Mapping[str, type], all_specs: Mapping[str, Spec]) -> Any:
        """The method's options with the given values."""
        own = {group: {s.name: self.values[s.name] for s in all_specs.values() if s.group == group
                       and s.name in self.values} for group in groups}  # fmt: skip
        return method(**{group: cls(**own[group]) for group, cls in groups.items()})

    def settle(
        self, method: type, groups: Mapping[str, type], all_specs: Mapping[str, Spec],
        missing: Callable[[Any], Iterable[str]],
    ) -> Any:  # fmt: skip
        """Like `build`, but without options in the file that have no effect, and with the options' `choices` applied.

        Raises UserError with every invalid combination.
        """
        while True:
            options = self.build(method, groups, all_specs)
            lines = [*_problems(options)]
            idle = [line for line in lines if isinstance(line, Idle) and self._is_of_file(line)]
            if len(idle) < len(lines):
                raise UserError([*(line for line in lines if line not in idle), *missing(options)])
            if not idle:
                break
            for line in idle:
                gone = [self.values.pop(name) for name in line.names() if name in self.values]
                self.left_out += [line] if gone else []
        for choice in getattr(options, "choices", lambda: ())():
            self.values[choice.name], self.sources[choice.name] = choice.value, "chosen"
            self.chosen.append(choice.line)
        return self.build(method, groups, all_specs) if self.chosen else options

    def _is_of_file(self, line: Idle) -> bool:
        """Whether all given options that `line` is about are from the file."""
        given = [name for name in line.names() if name in self.values]
        return bool(given) and not any(self.by_hand(name) for name in given)


def _problems(options: Any) -> Iterator[str]:
    """Invalid combinations of options, first within each group, then over all groups."""
    parts = [getattr(options, f.name) for f in dataclasses.fields(options)]
    for part in (*parts, options):
        yield from getattr(part, "problems", lambda: ())()


def _read_command_line(
    all_specs: Mapping[str, Spec], argv: Sequence[str], prog: str, description: str, problems: list[str]
) -> dict[str, Any]:
    namespace, extra = build_parser(all_specs, prog, description).parse_known_args(list(argv))
    flags = [word for word in extra if word.startswith("--")]
    few = how_many_shown(len(flags))
    problems.extend(_unknown_option(flag[2:].split("=")[0], all_specs) for flag in flags[:few])
    if len(flags) > few:
        problems.append(f"and {len(flags) - few} more unknown options")
    theirs, last = set(), ""
    for word in argv:
        last = word if word.startswith("--") else last
        theirs |= {word} if last in flags else set()
    for word in extra:
        if word not in theirs:
            problems.append(f"'{word}' belongs to no option: values with spaces need quotes, and options start with --")
    return vars(namespace)


def _unknown_option(name: str, all_specs: Mapping[str, Spec]) -> str:
    answer = PIPELINE if "pipeline" in name else NOT_OURS.get(name)
    if answer:
        return f"Unknown option --{name}: {answer}"
    hint = nearest(name, all_specs)
    return f"Unknown option --{name}." + (f" Did you mean --{hint}?" if hint else " See --help for all options.")


def _config_path(command_line: Mapping[str, Any]) -> Path | None:
    name = command_line.get("config_file")
    if name is None:
        return None
    if str(name).lower().endswith(".json"):
        raise UserError(f"--config_file: {name} is a preset of a graphical program, not a file of options: {PRESET}")
    return Path(name if str(name).endswith(".toml") else f"{name}.toml")


def _read_config_file(
    path: Path, all_specs: Mapping[str, Spec], problems: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Values of known keys, and the names of other programs' keys. Tables of one level are only headings."""
    flat: dict[str, Any] = {}
    for key, value in read_toml(path, "--config_file").items():
        table = value if isinstance(value, dict) else {key: value}
        problems.extend(f"{path}: {name} stands there twice, under two headings" for name in table if name in flat)
        flat.update(table)
    foreign, strange = [], []
    for key in [key for key in flat if key not in all_specs]:
        value = flat.pop(key)
        if key not in FOREIGN_KEYS:
            strange.append(key)
        elif value not in (None, False, "", 0, []):
            foreign.append(key)
    problems.extend(f"{path}: unknown key '{key}': {PIPELINE}" for key in strange if "pipeline" in key)
    problems.extend(unknown_names(str(path), [key for key in strange if "pipeline" not in key], all_specs))
    return flat, foreign


# ---- output ------------------------------------------------------------------------------------------------------


def changed_values(options: Any, *, all_values: bool = False) -> dict[str, Any]:
    """Option name -> value, for options that differ from their defaults, or for all. Secrets are left out."""
    result: dict[str, Any] = {}
    for f in dataclasses.fields(options):
        part = getattr(options, f.name)
        for item in dataclasses.fields(part):
            value = getattr(part, item.name)
            if not item.metadata["option"].secret and (all_values or value != item.default):
                result[item.name] = list(value) if isinstance(value, tuple) else value
    return result


def dump_toml(options: Any) -> str:
    """The options that differ from the defaults, as the text of a --config_file, in a stable order."""
    values = changed_values(options)
    return "".join(
        _toml_line(name, value)
        for name, value in values.items()
        if value is not None and name not in ("config_file", "output_config")
    )


def _toml_line(name: str, value: Any) -> str:
    """`name = value`; a path that is not UTF-8, which TOML cannot hold, becomes a comment."""
    text = tomli_w.dumps({name: value})
    try:
        text.encode()
    except UnicodeEncodeError:
        escaped = text.encode(errors="backslashreplace").decode()
        return indent(f"give this on the command line, it is not UTF-8 text: {escaped}", "# ")
    return text


def markdown_rows(groups: Mapping[str, type]) -> Iterator[str]:
    """Lines of docs/options.md: for each group its description and a table."""
    current = None
    for spec in specs(groups).values():
        if spec.group != current:
            current = spec.group
            about = (groups[current].__doc__ or "").partition("\n")[0]
            yield f"\n### {current.replace('_', ' ')}\n\n{about}\n\n| option | default | meaning |\n|---|---|---|"
        default = "" if spec.default in (None, False, (), "") else f"`{spec.default}`"
        choices = f" One of {', '.join(f'`{c}`' for c in spec.info.choices)}." if spec.info.choices else ""
        text = f"{spec.info.help}{choices}" + (f" *Has no effect: {spec.info.answer}.*" if spec.info.answer else "")
        text = text.replace("|", "\\|").replace("<", "&lt;")
        yield f"| `{spec.flag}` | {default} | {text} |"
