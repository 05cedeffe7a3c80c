# SPDX-License-Identifier: Apache-2.0
r"""Convert the configuration of another trainer: two TOML files, and the command that trains with them.

    python tools/convert_config.py their_job.yaml --output my_run
    python tools/convert_config.py their_command.sh --from diffusers --output my_run --overwrite

Writes my_run.toml (options), my_run_dataset.toml and, where there are previews, my_run_prompts.txt. Each key that
cannot be carried over is named in one line, and so is each value whose meaning changes. See docs/coming_from.md.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, from any folder
    sys.path.insert(0, str(ROOT))

from library.cli import METHODS, option_groups, run_tool  # noqa: E402
from library.data.config import key_specs  # noqa: E402
from library.errors import UserError, raise_problems  # noqa: E402
from library.families.registry import FAMILIES  # noqa: E402
from library.io.atomic import atomic_write  # noqa: E402
from library.log import get_logger  # noqa: E402
from library.options import option, read_toml, resolve, specs  # noqa: E402
from library.text_files import read_json, read_text  # noqa: E402
from tools.other_trainers import READERS, Draft, diffusers_examples, musubi_tuner  # noqa: E402
from tools.other_trainers.commands import read_command  # noqa: E402

COMMANDS = (".sh", ".txt", ".bat", ".ps1", ".cmd")
log = get_logger()


@dataclass(frozen=True)
class ConvertConfigOptions:
    """What is read and written."""

    input: str | None = option(None, help="File of the other trainer; --input may be left out.", path=True)
    dataset: str | None = option(None, help="Its dataset's file, where the first does not name it.", path=True)
    trainer: str | None = option(
        None, help="Whose file it is (--from is the same); without it that is found out.", choices=tuple(READERS)
    )
    output: str | None = option(None, help="Begin of the names of the files to write.", path=True)
    overwrite: bool = option(False, help="Replace files that exist.")

    def problems(self) -> Iterator[str]:
        """Missing options, one line each."""
        if self.input is None:
            yield "--input is needed: the file to convert"
        if self.output is None:
            yield "--output is needed: the begin of the names of the files to write, such as my_run"


@dataclass(frozen=True)
class AllOptions:
    """All options of this script."""

    convert: ConvertConfigOptions = field(default_factory=ConvertConfigOptions)


# ---- reading --------------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> Any:
    """A YAML file, with nothing but plain values. Raises UserError."""
    import yaml  # comes with accelerate and transformers

    text = read_text(path, "--input", "a YAML file")
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1} " if mark else ""
        raise UserError(f"{path}: {where}is not valid YAML") from None


def draft_of(path: Path, trainer: str | None, dataset: Path | None) -> Draft:
    """The converted run of a file. Raises UserError for a file that is not understood."""
    ending = path.suffix.lower()
    if ending in COMMANDS:
        script, values = read_command(read_text(path, "--input", "a command"), path)
        if trainer == "musubi" or (trainer is None and not diffusers_examples.is_mine(script)):
            return musubi_tuner.read(values, path, dataset, script)
        return diffusers_examples.read(values, path, dataset, script)
    if ending not in (".toml", ".json", ".yaml", ".yml"):
        raise UserError(f"--input {path}: ends with none of .toml, .json, .yaml, {', '.join(COMMANDS)}")
    document = (
        read_toml(path, "--input") if ending == ".toml" else
        read_json(path, "--input", "a JSON file") if ending == ".json" else read_yaml(path)
    )  # fmt: skip
    candidates = {name: reader for name, reader in READERS.items() if reader is not diffusers_examples}
    found = trainer or next((name for name, reader in candidates.items() if reader.is_mine(document)), None)
    if found is None:
        raise UserError(f"{path}: is of no trainer that is known; give --from {'|'.join(READERS)}")
    if found not in candidates or not candidates[found].is_mine(document):
        raise UserError(f"{path}: is not a file of {found}")
    return candidates[found].read(document, path, dataset)


# ---- checking and writing -------------------------------------------------------------------------------------------


def checked(draft: Draft) -> Draft:
    """The draft, its values checked against the options of the script. Raises UserError with every mistake.

    What the script does not have is named as not carried over.
    """
    known = specs(option_groups(draft.method, draft.family))
    problems = []
    script = script_of(draft)
    for name, value in [*draft.options.items()]:
        key = draft.origin.get(name, name)
        if name not in known:
            if value not in (None, False, 0):
                draft.lose(key, f"--{name} is not an option of {script}")
            del draft.options[name]
            continue
        try:
            known[name].read(value)
        except ValueError as error:
            problems.append(f"{draft.path}: {key}: {error} (for --{name})")
    problems += [f"{draft.path}: {line}" for line in dataset_problems(draft.datasets)]
    raise_problems(problems)
    return draft


def dataset_problems(tables: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Values that our dataset file does not take."""
    known = key_specs()
    for table in tables:
        for level in (table, *table.get("subsets", ())):
            for name, value in level.items():
                if name == "subsets":
                    continue
                try:
                    known[name].read(value)
                except ValueError as error:
                    yield f"{name} of the dataset: {error}"


def script_of(draft: Draft) -> str:
    """The script that trains it. Raises UserError where there is none."""
    scripts = FAMILIES[draft.family].scripts
    if draft.method not in scripts:
        raise UserError(f"{draft.path}: {FAMILIES[draft.family].title} has no script for this training")
    return scripts[draft.method]


def file_texts(draft: Draft, output: Path) -> dict[Path, str]:
    """The files to write and what is in them."""
    stem = output.with_suffix("") if output.suffix == ".toml" else output
    main, dataset, prompts = (stem.with_name(stem.name + end) for end in (".toml", "_dataset.toml", "_prompts.txt"))
    options = {name: value for name, value in draft.options.items() if value is not None}
    options.setdefault("output_name", stem.name)
    texts = {}
    if draft.datasets:
        options["dataset_config"] = str(dataset)
        texts[dataset] = tomli_w.dumps({"datasets": draft.datasets})
    if draft.prompts:
        options["sample_prompts"] = str(prompts)
        texts[prompts] = "".join(f"{line}\n" for line in draft.prompts)
    return {main: tomli_w.dumps(options), **texts}


def accepted(draft: Draft, text: str) -> tuple[str, ...]:
    """Let the script's own reader take the options. Returns what it has to say. Raises UserError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "converted.toml")
        path.write_text(text, encoding="utf-8")
        try:
            found = resolve(METHODS[draft.method][1], FAMILIES[draft.family].option_groups,
                            ["--config_file", str(path)], prog="convert_config")  # fmt: skip
        except UserError as error:
            raise UserError(line.replace(str(path), str(draft.path)) for line in error.lines()) from None
        return tuple(line.replace(f"{path}: ", "") for line in found.answers)


def convert(options: AllOptions) -> None:
    """Do what the options ask for."""
    given = options.convert
    assert given.input is not None and given.output is not None  # `problems` has asked for them
    try:
        draft = draft_of(Path(given.input), given.trainer, Path(given.dataset) if given.dataset else None)
        texts = file_texts(checked(draft), Path(given.output))
    except (TypeError, ValueError, LookupError, AttributeError) as error:  # documents of others may hold anything
        raise UserError(f"{given.input}: a value is of a kind that was not expected: {error}") from None
    (main, text), *_ = texts.items()
    answers = accepted(draft, text)
    there = [str(path) for path in texts if path.exists()]
    if there and not given.overwrite:
        raise UserError(f"--output: {', '.join(there)} exists: give another name, or --overwrite")
    for path, content in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda temp, content=content: temp.write_text(content, encoding="utf-8"))  # type: ignore[misc]
        log.info("wrote %s", path)
    for line in draft.not_carried:
        log.warning("not carried over: %s", line)
    for line in draft.changes:
        log.warning("changed: %s", line)
    for line in answers:
        log.info(line)
    print(f"accelerate launch {script_of(draft)} --config_file {main}")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""
    words = [*(sys.argv[1:] if argv is None else argv)]
    if words and not words[0].startswith("-"):
        words.insert(0, "--input")
    words = ["--trainer" if word == "--from" else word for word in words]
    if argv is None:
        from library.log import setup_logging

        setup_logging(level="INFO", file=None, simple=True)
    return run_tool(AllOptions, convert, words, "convert_config.py", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
