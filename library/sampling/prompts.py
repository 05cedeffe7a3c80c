# SPDX-License-Identifier: Apache-2.0
"""Preview prompts from a .txt, .toml or .json file, checked as a whole before anything is trained.

    # a comment
    a red rocket --n blurry --w 512 --h 768 --d 42 --s 30 --l 7.5 --ss euler_a

TOML: [prompt] holds what all share, each [[prompt.subset]] one prompt. JSON: a list of tables, or of lines as above.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from library.errors import UserError, nearest, raise_problems, unknown
from library.options import convert
from library.sampling.options import SAMPLER_NAMES
from library.text_files import read_json, read_text, read_toml
from library.values import cut, shown, text_problem


def _inline(name: str, low: float = 0, high: float = 1000) -> Any:
    """A field of `Prompt` with the name of its inline option; numbers are from `low` to `high`."""
    return field(default=None, metadata={"inline": name, "limits": (low, high)})


@dataclass(frozen=True)
class Prompt:
    """One preview picture. None: the previewer's own value. Sizes in pixels."""

    prompt: str
    width: int | None = _inline("w", 8, 16384)
    height: int | None = _inline("h", 8, 16384)
    seed: int | None = _inline("d", 0, 2**64 - 1)
    sample_steps: int | None = _inline("s", 1)
    scale: float | None = _inline("l")  # of classifier-free guidance
    guidance_scale: float | None = _inline("g")  # of distilled models
    negative_prompt: str = field(default="", metadata={"inline": "n"})
    sample_sampler: str | None = _inline("ss")
    controlnet_image: str | None = _inline("cn")
    cfg_trunc_ratio: float | None = _inline("ctr", 0, 1)
    renorm_cfg: float | None = _inline("rcfg")
    flow_shift: float | None = _inline("fs")
    references: tuple[str, ...] | None = _inline("ref")  # files of reference pictures
    image_scale: float | None = _inline("il")  # of guidance by the reference picture, apart from the text


FIELDS = {f.name: f for f in fields(Prompt)}
TYPES = get_type_hints(Prompt)
INLINE = {f.metadata["inline"]: name for name, f in FIELDS.items() if f.metadata}  # inline option -> field
LISTS = ("references",)  # fields whose inline option may be given several times


def load_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """All prompts of a file, in order. Raises UserError with every mistake, each with file and line or entry."""
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"--sample_prompts: {path} is none of {', '.join(READERS)}")
    if not path.is_file():
        raise UserError(_missing(path))
    prompts: list[Prompt] = []
    problems: list[str] = []
    for where, table in reader(path, problems):
        found = _read_table(table, where, problems)
        if found is not None:
            prompts.append(found)
    if not prompts and not problems:
        problems.append(f"--sample_prompts: {path} holds no prompt")
    raise_problems(problems)
    return tuple(prompts)


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"--sample_prompts: {path} is a folder; give a .txt, .toml or .json file"
    there = [p.name for p in path.parent.iterdir() if p.suffix.lower() in READERS] if path.parent.is_dir() else []
    hint = nearest(path.name, there)
    return f"--sample_prompts: {path} does not exist" + (f". Did you mean {path.parent / hint}?" if hint else "")


# ---- the three file types: (where, table) per prompt --------------------------------------------------------------

Entries = Iterator[tuple[str, Mapping[str, Any]]]


def read_txt(path: Path, problems: list[str]) -> Entries:
    """One prompt per line; empty lines and lines that start with # do not count."""
    for number, line in enumerate(read_text(path, "--sample_prompts", "a text file").splitlines(), start=1):
        line = line.strip()
        if line and not line.startswith("#"):
            where = f"{path}, line {number}"
            yield where, _split_line(line, where, problems)


def read_toml_file(path: Path, problems: list[str]) -> Entries:
    """[prompt] and [[prompt.subset]]; what a subset says wins."""
    document = read_toml(path, "--sample_prompts")
    shared = document.get("prompt")
    extra = [key for key in document if key != "prompt"]
    if not isinstance(shared, dict) or extra:
        named = f"'{extra[0]}' is not known" if extra else "[prompt] is missing"
        problems.append(f"{path}: {named}; expects a table [prompt] and a table [[prompt.subset]] per prompt")
        return
    subsets = shared.pop("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(s, dict) for s in subsets):
        problems.append(f"{path}: subset expects tables, one [[prompt.subset]] per prompt")
        return
    for number, subset in enumerate(subsets, start=1):
        yield f"{path}, prompt {number}", {**shared, **subset}


def read_json_file(path: Path, problems: list[str]) -> Entries:
    """A list of tables or of lines as in a .txt file."""
    document = read_json(path, "--sample_prompts")
    if not isinstance(document, list):
        problems.append(f"{path}: expects a list of prompts")
        return
    for number, item in enumerate(document, start=1):
        where = f"{path}, prompt {number}"
        if isinstance(item, str):
            yield where, _split_line(item.strip(), where, problems)
        elif isinstance(item, dict):
            yield where, item
        else:
            problems.append(f"{where}: expects a text or a table, got {shown(item)}")


READERS: dict[str, Callable[[Path, list[str]], Entries]] = {
    ".txt": read_txt,
    ".toml": read_toml_file,
    ".json": read_json_file,
}


# ---- one prompt ---------------------------------------------------------------------------------------------------


def _split_line(line: str, where: str, problems: list[str]) -> dict[str, Any]:
    """`text --w 512 --n blurry` as a table."""
    text, *parts = re.split(r"(?:^|\s)--(?=\S)", line)
    table: dict[str, Any] = {"prompt": text.strip()}
    for part in parts:
        name, _, value = part.partition(" ")
        key = INLINE.get(name.lower())
        if key is None:
            problems.append(unknown_inline(name, where))
        elif not value.strip():
            problems.append(f"{where}: --{name} needs a value")
        elif key in LISTS:
            table.setdefault(key, []).append(value.strip())
        elif key in table:
            problems.append(f"{where}: --{name} is given twice")
        else:
            table[key] = value.strip()
    return table


def unknown_inline(name: str, where: str) -> str:
    """The line about an inline option that does not exist."""
    by_field = {key: short for short, key in INLINE.items()}
    near = nearest(name.lower(), [*by_field, *INLINE])
    if near is not None:
        return f"{where}: unknown option --{name}. Did you mean --{by_field.get(near, near)}?"
    return f"{where}: unknown option --{name}. Known: {' '.join('--' + n for n in INLINE)}"


def _read_table(table: Mapping[str, Any], where: str, problems: list[str]) -> Prompt | None:
    values: dict[str, Any] = {}
    before = len(problems)
    for key, raw in table.items():
        if key not in FIELDS:
            problems.append(unknown(where, key, FIELDS))
            continue
        try:
            values[key] = _read_value(key, raw)
        except ValueError as error:
            problems.append(f"{where}: {key} {error}")
    if "prompt" not in values and len(problems) == before:
        problems.append(f"{where}: the key prompt is missing")
    return Prompt(**values) if len(problems) == before else None


def _read_value(key: str, raw: Any) -> Any:
    """The value of a field. Raises ValueError with what it expects."""
    if key in LISTS:
        return tuple(_picture(convert(path, str)) for path in (raw if isinstance(raw, list) else [raw]))
    value = convert(raw, next((kind for kind in (int, float) if kind in get_args(TYPES[key])), str))
    if isinstance(value, str):
        wrong = text_problem(value) if key != "controlnet_image" else None
        if wrong:
            raise ValueError(wrong)
    else:
        low, high = FIELDS[key].metadata["limits"]
        if not low <= value <= high:
            raise ValueError(f"must be between {low} and {high}, got {cut(str(value))}")
    if key == "sample_sampler" and value not in SAMPLER_NAMES:
        hint = nearest(value, SAMPLER_NAMES)
        extra = f"Did you mean '{hint}'?" if hint else f"Known: {', '.join(SAMPLER_NAMES)}"
        raise ValueError(f"'{value}' is not a sampler. {extra}")
    return _picture(value) if key == "controlnet_image" else value


def _picture(path: str) -> str:
    """The path of a picture. Raises ValueError where there is none."""
    if wrong := text_problem(path, path=True):
        raise ValueError(wrong)
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist")
    return path


def given_fields(prompts: Iterable[Prompt], names: Iterable[str]) -> list[str]:
    """The names among `names` that at least one prompt sets."""
    prompts = list(prompts)
    return [name for name in names if any(vars(p)[name] is not None for p in prompts)]
