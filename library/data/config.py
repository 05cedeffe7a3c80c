# SPDX-License-Identifier: Apache-2.0
"""From --dataset_config (TOML or JSON), --train_data_dir or --in_json to checked `DatasetConfig` records.

A value is looked up in the subset's table, then its dataset's, then [general], then the command-line option of that
name. All mistakes are reported at once, each with its place: `data.toml: datasets[0].subsets[1]: ...`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from library.data.config_problems import (
    COLUMNS,
    REFERENCE_KEYS,
    SOURCES,
    Role,
    bucket_problems,
    dataset_problems,
    missing_paths,
    shard_problems,
    why_missing,
)
from library.data.options import MOST_REPEATS, NO_DATA, CacheOptions, DataOptions
from library.data.records import BucketRules, CaptionRules, DatasetConfig, ImageRules, SubsetConfig
from library.data.references import reference_problems
from library.errors import UserError, first_names, how_many_shown, nearest, raise_problems, unknown
from library.log import get_logger
from library.options import Spec, at_least, option, specs
from library.text_files import read_json, read_toml
from library.values import shown

_Table = dict[str, Any]


def _attributes(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expects a table such as {{ diff_output_preservation = true }}, got {shown(value)}")
    preserve = value.get("diff_output_preservation", False)
    if not isinstance(preserve, bool):
        raise ValueError(f"expects diff_output_preservation = true or false, got {shown(preserve)}")
    for key in value:  # any name is allowed, but not a mistyped one
        if key != "diff_output_preservation" and nearest(key, ["diff_output_preservation"]):
            raise ValueError(f"has an unknown key '{key}'. Did you mean 'diff_output_preservation'?")
    return value


@dataclass(frozen=True)
class FileKeys:
    """The keys that exist only in a dataset file; the others are options of `DataOptions` (two under another name)."""

    image_dir: str | None = option(None, help="Folder of the pictures.", path=True)
    metadata_file: str | None = option(
        None, help="JSON or JSON Lines file with captions and tags per picture.", path=True
    )
    conditioning_data_dir: str | None = option(
        None, help="Folder of masks (or control images) with the pictures' names.", path=True
    )
    conditioning_data_dirs: tuple[str, ...] | None = option(
        None,
        help="Folders of reference pictures with the pictures' names: each picture has one in each folder.",
        path=True,
    )
    reference_data_dir: str | None = option(
        None,
        help="Folder of reference pictures: name.png, or name_0.png, name_1.png, ... for name.png. With --task edit "
        "conditioning_data_dir is another name of it.",
        path=True,
    )
    shards: str | None = option(
        None,
        help="Tar files in the layout of WebDataset: a name, * or {000..019} in it, or a URL of fsspec.",
        path=True,
    )
    parquet: str | None = option(None, help="Parquet files with pictures and captions, named as shards.", path=True)
    image_column: str | None = option(
        None,
        help="Column of parquet files with the bytes of pictures (default: image, jpg, png, webp, img or image_bytes).",
    )
    caption_column: str | None = option(
        None,
        help="Column of parquet files, or key of .json files in shards, with the caption (default: caption, text, "
        "prompt or txt).",
    )
    mask_column: str | None = option(None, help="Column of parquet files with the bytes of masks.")
    reference_column: str | None = option(
        None, help="Column of parquet files with the bytes of a reference picture, or a list of several."
    )
    is_reg: bool = option(False, help="Regularisation pictures: weighted by --prior_loss_weight.")
    class_tokens: str | None = option(None, help="Caption of pictures that have none.")
    custom_attributes: Mapping[str, Any] | None = option(
        None, help="Table that goes into the batch; known: diff_output_preservation.", parse=_attributes
    )
    num_repeats: int = option(
        1, help="Times that each picture is used in an epoch; 0 leaves the subset out.", check=at_least(0, MOST_REPEATS)
    )
    network_multiplier: float = option(1.0, help="Strength of the network for this dataset.")


_RENAMED = {"batch_size": "train_batch_size"}  # key of the file -> option of the command line

_SUBSET_ONLY = frozenset({*SOURCES, *COLUMNS, *REFERENCE_KEYS, "conditioning_data_dir", "is_reg"})
_DATASET_KEYS = frozenset(
    {f.name for f in fields(BucketRules)} | {"batch_size", "network_multiplier", "validation_seed", "validation_split"}
)
_INHERITED = frozenset(
    {f.name for f in fields(CaptionRules)}
    | {f.name for f in fields(ImageRules)}
    | {"num_repeats", "class_tokens", "caption_extension", "cache_info", "custom_attributes"}
)
_KEYS = {  # level -> the keys that may stand there
    "general": _DATASET_KEYS | _INHERITED,
    "datasets": _DATASET_KEYS | _INHERITED,
    "subsets": _INHERITED | _SUBSET_ONLY,
}
_PLACES = {"general": "[general]", "datasets": "[[datasets]]", "subsets": "[[datasets.subsets]]"}


def key_specs() -> dict[str, Spec]:
    """Key of the dataset file -> type, range and help text."""
    options = specs({"data": DataOptions})
    names = {key: _RENAMED.get(key, key) for key in _DATASET_KEYS | _INHERITED}
    inherited = {key: options[name] for key, name in names.items() if name in options}
    return inherited | specs({"file": FileKeys})


# ---- reading tables -----------------------------------------------------------------------------------------------


def read_document(path: Path) -> dict[str, Any]:
    """The dataset file as a dict: JSON if its suffix is .json, else TOML. Raises UserError with file and line."""
    if path.suffix.lower() != ".json":
        return read_toml(path, "--dataset_config")
    document = read_json(path, "--dataset_config", "a TOML or JSON file")
    if not isinstance(document, dict):
        raise UserError(f"--dataset_config: {path} expects an object with 'datasets', got a {type(document).__name__}")
    return document


@dataclass
class _Reader:
    """Checks tables and collects their problems."""

    file: str
    problems: list[str] = field(default_factory=list)
    role: Role = None  # what conditioning_data_dir holds
    bad_resolution: set[str] = field(default_factory=set)  # places where a wrong one was reported
    known: dict[str, Spec] = field(default_factory=key_specs)

    def where(self, place: str) -> str:
        return f"{self.file}: {place}" if self.file else place

    def report(self, place: str, text: str) -> None:
        self.problems.append(f"{self.where(place)}: {text}")

    def table(self, raw: Any, place: str, level: str, also: Iterable[str] = ()) -> _Table:
        """The valid values of one table. `also`: keys that hold tables and are read elsewhere."""
        values: _Table = {}
        if not isinstance(raw, dict):
            self.report(place, f"expects a table, got {shown(raw)}")
            return values
        strange = [key for key, value in raw.items() if not (key in also or value is None or key in _KEYS[level])]
        told = set(strange[: how_many_shown(len(strange))])
        for key, value in raw.items():
            if key in also or value is None:
                continue
            if key not in _KEYS[level]:
                if key in told:
                    self._misplaced(key, place, level)
                continue
            spec = self.known[key]
            if isinstance(value, bool) and spec.hint is int:
                value = int(value)  # sd-scripts' files may say so
            try:
                values[key] = spec.read(value)
            except ValueError as error:
                self.report(place, f"{key} {error}")
                self.bad_resolution |= {place} if key == "resolution" else set()
        if len(strange) > len(told):
            self.report(place, f"and {len(strange) - len(told)} more unknown keys")
        return values

    def _misplaced(self, key: str, place: str, level: str) -> None:
        homes = [_PLACES[other] for other, keys in _KEYS.items() if key in keys]
        option_names = {f.name for f in fields(DataOptions)} - set(self.known)
        renamed = {"train_batch_size": "batch_size", "dataset_repeats": "num_repeats"}.get(key)
        if homes:
            self.report(place, f"{key} cannot stand here; it belongs in {' or '.join(homes)}")
        elif renamed:
            self.report(place, f"unknown key '{key}'. Did you mean '{renamed}'?")
        elif key in option_names - {"caption_extention"}:
            self.report(place, f"{key} is an option of the script: give --{key}")
        else:
            self.problems.append(unknown(self.where(place), key, _KEYS[level]))

    def array(self, raw: Any, place: str) -> list[Any]:
        """A list of tables; one table alone is taken as a list of one."""
        if isinstance(raw, dict):
            return [raw]
        if not isinstance(raw, list):
            self.report(place, f"expects a list of tables ([[{place}]]), got {shown(raw)}")
            return []
        return raw


# ---- the file -----------------------------------------------------------------------------------------------------


def _fallback(options: DataOptions, role: Role) -> _Table:
    """The command line's values under the file's names."""
    extension = options.caption_extention or options.caption_extension or ".caption"
    conditioning = options.conditioning_data_dir if role is not None else None
    return {
        **vars(options),
        "batch_size": options.train_batch_size,
        "num_repeats": options.dataset_repeats,
        "caption_extension": extension,
        "conditioning_data_dir": conditioning,
    }


class _Levels:
    """Looks a key up, from the narrowest table to the command line."""

    def __init__(self, *tables: Mapping[str, Any]) -> None:
        self.tables = tables

    def pick(self, key: str, default: Any = None) -> Any:
        return next((t[key] for t in self.tables if t.get(key) is not None), default)

    def build(self, record: type, **given: Any) -> Any:
        """A record whose fields are looked up by name, except those that are given."""
        values = {f.name: self.pick(f.name) for f in fields(record) if f.name not in given}
        return record(**{k: v for k, v in values.items() if v is not None}, **given)


def _subset(levels: _Levels, role: Role) -> SubsetConfig:
    captions = levels.build(CaptionRules)
    images = levels.build(ImageRules)
    conditioning = levels.pick("conditioning_data_dir")
    if levels.pick("is_reg"):  # those of the command line are those of the training pictures
        conditioning = levels.tables[0].get("conditioning_data_dir")
    references = [levels.pick("reference_data_dir"), *(levels.pick("conditioning_data_dirs") or ())]
    if role == "references":
        references, conditioning = [conditioning, *references], None
    return levels.build(
        SubsetConfig, image_dir=levels.pick("image_dir"), conditioning_data_dir=conditioning, captions=captions,
        images=images, reference_data_dirs=tuple(folder for folder in references if folder),
    )  # fmt: skip


def _dataset(
    reader: _Reader, place: str, levels: _Levels, subsets: Iterable[SubsetConfig], bucket_step: int
) -> DatasetConfig | None:
    if levels.pick("resolution") is None:
        if not reader.bad_resolution & {place, "general"}:
            reader.report(place, "no resolution is given: add resolution = 512 or give --resolution 512")
        return None
    rules = _bucket_rules(levels, bucket_step)
    for text in bucket_problems(rules, bucket_step):
        reader.report(place, text)
    kept = tuple(s for s in subsets if s.num_repeats > 0)
    return levels.build(DatasetConfig, subsets=kept, buckets=rules)


def _bucket_rules(levels: _Levels, bucket_step: int) -> BucketRules:
    """The rules of a dataset. Smaller steps that divide the model's, which some programs write, become the model's."""
    rules: BucketRules = levels.build(BucketRules)
    steps = rules.bucket_reso_steps
    if not rules.enable_bucket or steps >= bucket_step or bucket_step % steps:
        return rules
    get_logger().warning(f"bucket_reso_steps {steps}: sides are multiples of {bucket_step}, which this model needs")
    return replace(rules, bucket_reso_steps=bucket_step)


def _read_file(
    options: DataOptions, path: Path, bucket_step: int, problems: list[str], role: Role
) -> list[DatasetConfig]:
    document = read_document(path)
    reader = _Reader(str(path), problems, role)
    for key in document:
        if key == "subsets":
            reader.problems.append(f"{path}: subsets belong to a dataset: write [[datasets]] and [[datasets.subsets]]")
        elif key not in ("general", "datasets"):
            hint = nearest(key, ("general", "datasets"))
            tail = f"Did you mean '{hint}'?" if hint else "A dataset file has [general] and [[datasets]]"
            reader.problems.append(f"{path}: unknown key '{key}'. {tail}")
    if "cache_info" in _all_keys(document):
        get_logger().info("%s: cache_info: always done now, in the cache folder", path)
    general = reader.table(document.get("general") or {}, "general", "general")
    tables = reader.array(document.get("datasets") or [], "datasets")
    if not tables and not problems:
        problems.append(f"{path}: no [[datasets]] is given: add one with [[datasets.subsets]] and image_dir")
    found = []
    for index, raw in enumerate(tables):
        place = f"datasets[{index}]"
        own = reader.table(raw, place, "datasets", also=("subsets",))
        levels = (own, general, _fallback(options, role))
        raws = reader.array(raw.get("subsets") or [], f"{place}.subsets") if isinstance(raw, dict) else []
        if not raws:
            reader.report(place, "no [[datasets.subsets]] is given: add one with image_dir or metadata_file")
        subsets = [_read_subset(reader, table, f"{place}.subsets[{i}]", own, levels) for i, table in enumerate(raws)]
        found.append(_dataset(reader, place, _Levels(*levels), subsets, bucket_step))
    return [dataset for dataset in found if dataset is not None]


def _all_keys(value: Any) -> Iterator[str]:
    """The keys of a table and of all tables inside it."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield key
        for item in inner if isinstance(inner, list) else [inner]:
            yield from _all_keys(item)


def _read_subset(reader: _Reader, raw: Any, place: str, dataset: _Table, levels: tuple[_Table, ...]) -> SubsetConfig:
    own = reader.table(raw, place, "subsets")
    subset = _subset(_Levels(own, *levels), reader.role)
    if not (isinstance(raw, dict) and {*SOURCES} & set(raw)):
        reader.report(place, f"{SOURCES[0]} is missing (or {', '.join(SOURCES[1:-1])} or {SOURCES[-1]})")
    reader.problems += [f"{reader.where(place)}: {text}" for text in shard_problems(subset, own, dataset)]
    if subset.metadata_file:
        for key in ("class_tokens", "caption_extension", "cache_info"):
            if own.get(key, dataset.get(key)):
                reader.report(place, f"{key} has no effect with metadata_file: its captions stand in that file")
    if own.get("conditioning_data_dir") and reader.role is None:
        reader.report(place, "conditioning_data_dir has no effect without --task edit or --masked_loss")
    if subset.num_repeats == 0:
        get_logger().warning("%s: num_repeats is 0: left out", reader.where(place))
    reader.problems += [f"{reader.where(place)}: {text}" for text in missing_paths(subset)]
    return subset


# ---- the command line alone ---------------------------------------------------------------------------------------


def _folder_subsets(
    parent: str, flag: str, is_reg: bool, levels: _Table, problems: list[str], role: Role
) -> list[SubsetConfig]:
    """One subset per subfolder `<repeats>_<class words>`; others, and those with 0 repeats, are left out."""
    root = Path(parent)
    if not root.is_dir():
        problems.append(f"{flag}: {why_missing(parent)}")
        return []
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    subsets, ignored = [], []
    for folder in folders:
        repeats, _, words = folder.name.partition("_")
        if not repeats.strip().isdecimal() or int(repeats) == 0:
            ignored.append(folder.name)
            continue
        if int(repeats) > MOST_REPEATS:
            problems.append(f"{flag}: {folder}: at most {MOST_REPEATS} repeats are possible")
            continue
        own = {"image_dir": str(folder), "num_repeats": int(repeats), "class_tokens": words, "is_reg": is_reg}
        subsets.append(_subset(_Levels(own, levels), role))
    if not subsets:
        seen = f"it has only {first_names(ignored)}" if ignored else "it has no subfolder"
        problems.append(f"{flag}: {parent} needs subfolders named <repeats>_<class words>, such as 10_my dog; {seen}")
    elif ignored:
        get_logger().warning("%s: left out %d folders without repeats: %s", flag, len(ignored), first_names(ignored))
    return subsets


def _holds_pictures(root: Path) -> bool:
    """Whether a folder has no subfolder `<repeats>_<class words>`; with control images it is then the subset itself."""
    return root.is_dir() and not any(
        entry.is_dir() and entry.name.partition("_")[0].strip().isdecimal() for entry in root.iterdir()
    )


def _read_command_line(options: DataOptions, bucket_step: int, problems: list[str], role: Role) -> list[DatasetConfig]:
    levels = _fallback(options, role)
    if options.in_json:
        own = {"image_dir": options.train_data_dir or None, "metadata_file": options.in_json}
        subsets = [_subset(_Levels(own, levels), role)]
        problems.extend(f"--in_json: {text}" for text in missing_paths(subsets[0]))
    elif role in ("control", "references") and _holds_pictures(Path(options.train_data_dir or "")):
        subsets = [_subset(_Levels({"image_dir": options.train_data_dir, "num_repeats": 1}, levels), role)]
        problems.extend(f"--train_data_dir: {text}" for text in missing_paths(subsets[0]))
    else:
        subsets = _folder_subsets(options.train_data_dir or "", "--train_data_dir", False, levels, problems, role)
        if options.reg_data_dir:
            subsets += _folder_subsets(options.reg_data_dir, "--reg_data_dir", True, levels, problems, role)
    if options.resolution is None:
        problems.append("--resolution is missing: give the training size, such as --resolution 512")
        return []
    rules = _bucket_rules(_Levels(levels), bucket_step)
    problems.extend(f"--{text}" for text in bucket_problems(rules, bucket_step))
    return [_Levels(levels).build(DatasetConfig, subsets=tuple(subsets), buckets=rules)]


# ---- all of it ----------------------------------------------------------------------------------------------------


def load_dataset_config(
    options: DataOptions, *, bucket_step: int, cache: CacheOptions | None = None, control: bool = False,
    references: bool = False, edits: bool = False,
) -> tuple[DatasetConfig, ...]:  # fmt: skip
    """The datasets that the options describe. Raises UserError listing every mistake.

    bucket_step: sides must be multiples of this many pixels. cache: options checked along with the datasets, if given.
    control: each subset must have a conditioning_data_dir with control images instead of masks. references: whether the
    model takes reference pictures. edits: conditioning_data_dir is their folder (--task edit).
    """
    role: Role = "references" if edits else "control" if control else "masks" if options.masked_loss else None
    problems: list[str] = []
    if options.dataset_config:
        datasets = _read_file(options, Path(options.dataset_config), bucket_step, problems, role)
    elif options.train_data_dir or options.in_json:
        datasets = _read_command_line(options, bucket_step, problems, role)
    else:
        raise UserError(NO_DATA)
    kept = tuple(dataset for dataset in datasets if dataset.subsets)
    if not problems:
        problems.extend(dataset_problems(kept, options, cache, role))
        problems.extend(reference_problems((s for dataset in kept for s in dataset.subsets), taken=references))
    if not problems and not kept:
        problems.append(f"{options.dataset_config}: every subset has num_repeats = 0, so there is nothing to train on")
    raise_problems(problems)
    return kept
