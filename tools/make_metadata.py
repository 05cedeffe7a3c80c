# SPDX-License-Identifier: Apache-2.0
r"""Put captions and tags that lie beside pictures into one metadata file, which fine_tune.py reads with --in_json.

    python tools/make_metadata.py --train_data_dir pictures --out_json meta.json --caption_extension .caption
    python tools/make_metadata.py --train_data_dir pictures --out_json meta.json --tags_extension .txt
    python tools/make_metadata.py --in_json meta.json --out_json clean.json --clean

The three steps can be one. Entries of --in_json (without it, of --out_json where that is there) stay, with all their
keys; captions and tags of pictures that have files take the place of the old ones.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, from any folder
    sys.path.insert(0, str(ROOT))

from library.cli import guarded  # noqa: E402
from library.data.options import parse_extension  # noqa: E402
from library.errors import UserError, first_names  # noqa: E402
from library.log import get_logger, progress, setup_logging  # noqa: E402
from library.options import option, resolve  # noqa: E402

Entries = dict[str, dict[str, Any]]  # the same as in tools/metadata_file.py, which --help should not import

log = get_logger()


@dataclass(frozen=True)
class MetadataFileOptions:
    """What is read and written."""

    train_data_dir: str | None = option(None, help="Folder of the pictures.", path=True)
    out_json: str | None = option(None, help="Metadata file to write (.json or .jsonl).", path=True)
    in_json: str | None = option(
        None, help="Metadata file whose entries are kept. Without it, --out_json, where that file is there.", path=True
    )
    caption_extension: str | None = option(
        None, help="Suffix of caption files (.caption): their text becomes the caption.", parse=parse_extension
    )
    caption_extention: str | None = option(None, help="Old spelling of --caption_extension.", parse=parse_extension)
    tags_extension: str | None = option(
        None, help="Suffix of tag files (.txt): their text becomes the tags.", parse=parse_extension
    )
    full_path: bool = option(False, help="Whole paths as keys, so that pictures may lie in several folders.")
    recursive: bool = option(False, help="Look into all folders below, too; needs --full_path.")
    clean: bool = option(False, help="Clean all captions and tags: see docs/tools.md for the rules.")
    debug: bool = option(False, help="Print what each picture gets, and what cleaning changes.")

    @property
    def suffixes(self) -> dict[str, str]:
        """Key of an entry -> suffix of the files with its values."""
        given = {"caption": self.caption_extension or self.caption_extention, "tags": self.tags_extension}
        return {key: suffix for key, suffix in given.items() if suffix}

    def problems(self) -> Iterator[str]:
        """Missing options and invalid combinations, one line each."""
        if self.out_json is None:
            yield "--out_json is needed: the metadata file to write"
        elif Path(self.out_json).suffix.lower() not in (".json", ".jsonl"):
            yield f"--out_json {self.out_json}: the file must end with .json or .jsonl"
        if self.train_data_dir is None and not (self.clean and (self.in_json or self.out_json)):
            yield "--train_data_dir is needed: the folder of the pictures (or --in_json and --clean)"
        if self.train_data_dir and not self.suffixes:
            yield "nothing to read: give --caption_extension .caption, --tags_extension .txt, or both"
        if self.suffixes and not self.train_data_dir:
            yield "--caption_extension and --tags_extension need --train_data_dir"
        if self.recursive and not self.full_path:
            yield "--recursive needs --full_path: names alone do not say in which folder a picture is"


@dataclass(frozen=True)
class MakeMetadataOptions:
    """All options of this script."""

    metadata: MetadataFileOptions = field(default_factory=MetadataFileOptions)


# ---- pictures and their texts ---------------------------------------------------------------------------------------


def pictures_in(folder: Path, *, recursive: bool) -> list[Path]:
    """The pictures in a folder, sorted, without folders whose name starts with a dot. Raises UserError."""
    from library.data.folder import IMAGE_EXTENSIONS

    if not folder.is_dir():
        raise UserError(f"--train_data_dir: {folder} is no folder")
    found: list[Path] = []
    for path, folders, names in os.walk(folder.absolute()):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        found += [
            Path(path, name)
            for name in names
            if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and not name.startswith(".")
        ]
    if not found:
        raise UserError(f"--train_data_dir: {folder} holds no picture")
    return sorted(found)


def keys_of(pictures: Sequence[Path], entries: Entries, *, full_path: bool) -> dict[Path, str]:
    """The key of each picture: that of its existing entry, which may name it in several ways, or a new one.

    Raises UserError when two pictures would have the same key, or two entries belong to one picture.
    """
    named: dict[str, Path] = {}
    problems: list[str] = []
    paths = {os.path.abspath(key): key for key in entries if os.path.dirname(key)}
    for picture in pictures:
        known = [paths[name] for name in (str(picture), str(picture.with_suffix(""))) if name in paths]
        known += [] if full_path else [name for name in (picture.name, picture.stem) if name in entries]
        key = known[0] if known else str(picture) if full_path else picture.stem
        if len(known) > 1:
            problems.append(f"{picture}: several entries are of this picture, leave one: {', '.join(known)}")
        if key in named:
            problems.append(f"{named[key]} and {picture.name} have one key, '{key}': rename one, or give --full_path")
        named[key] = picture
    if problems:
        raise UserError(problems)
    return {picture: key for key, picture in named.items()}


def read_texts(pictures: Sequence[Path], suffix: str) -> dict[Path, str]:
    """The stripped text of each picture with a text file. Raises UserError with the files that cannot be read."""
    texts: dict[Path, str] = {}
    problems: list[str] = []
    with progress(len(pictures), f"reading {suffix} files") as bar:
        for picture in pictures:
            file = picture.with_suffix(suffix)
            try:
                texts[picture] = "\n".join(file.read_text(encoding="utf-8-sig").splitlines()).strip()
            except FileNotFoundError:
                pass  # counted by the caller
            except UnicodeDecodeError as error:
                problems.append(f"{file} is not UTF-8 text (byte {error.start})")
            except OSError as error:
                problems.append(f"{file}: {error.strerror}")
            bar.advance()
    if problems:
        raise UserError(problems)
    return texts


# ---- the steps ------------------------------------------------------------------------------------------------------


def merge(options: MetadataFileOptions, entries: Entries) -> None:
    """Copy the texts of the pictures' text files into their entries."""
    pictures = pictures_in(Path(options.train_data_dir or ""), recursive=options.recursive)
    keys = keys_of(pictures, entries, full_path=options.full_path)
    names = [name for name in dict.fromkeys(picture.stem for picture in pictures) if name in entries]
    if options.full_path and names:
        log.warning(
            f"{len(names)} entries have names without a folder, perhaps of the same pictures: {first_names(names)}"
        )
    bare = set(pictures)
    for name, suffix in options.suffixes.items():
        texts = read_texts(pictures, suffix)
        replaced = 0
        for picture, text in texts.items():
            entry = entries.setdefault(keys[picture], {})
            replaced += name in entry and entry[name] != text
            entry[name] = text
            if options.debug:
                print(f"{keys[picture]}: {name}: {text}")
        bare -= {picture for picture, text in texts.items() if text}
        log.info(f"{name}: {len(texts)} of {len(pictures)} pictures have a {suffix} file; {replaced} old ones replaced")
        absent = [picture.name for picture in pictures if picture not in texts]
        if absent:
            log.warning(f"{len(absent)} pictures have no {suffix} file: {first_names(absent, 10)}")
    left = [picture.name for picture in pictures if picture in bare and keys[picture] not in entries]
    if left:
        log.warning(f"{len(left)} pictures get no entry and will not be trained on: {first_names(left, 10)}")


def clean(entries: Entries, *, debug: bool) -> None:
    """Clean every caption and all tags."""
    from tools.metadata_rules import clean_caption, clean_tags

    changed = 0
    with progress(len(entries), "cleaning") as bar:
        for key, entry in entries.items():
            for name, rule in (("caption", clean_caption), ("tags", clean_tags)):
                before = entry.get(name)
                after = rule(before) if before else before
                if after != before:
                    entry[name] = after
                    changed += 1
                    if debug:
                        print(f"{key}: {name}: {before} -> {after}")
            bar.advance()
    log.info(f"cleaning changed {changed} captions and tag lists")


def make_metadata(options: MetadataFileOptions) -> None:
    """Run the requested steps. Nothing is written when one of them finds a mistake."""
    from tools.metadata_file import read_entries, write_entries

    assert options.out_json is not None
    target = Path(options.out_json)
    if target.is_dir():
        raise UserError(f"--out_json {target} is a folder; give a file")
    source = Path(options.in_json) if options.in_json else target
    entries: Entries = {}
    if options.in_json or source.is_file():
        entries = read_entries(source)
        log.info(f"{source}: {len(entries)} entries")
    elif options.train_data_dir is None:
        raise UserError(f"--out_json {target} does not exist: there is nothing to clean; give --in_json")
    if options.train_data_dir:
        merge(options, entries)
    if options.clean:
        clean(entries, debug=options.debug)
    write_entries(target, entries)
    log.info(f"wrote {target}: {len(entries)} entries")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""

    def action() -> int:
        words = sys.argv[1:] if argv is None else argv
        description = inspect.cleandoc(__doc__ or "")
        found = resolve(MakeMetadataOptions, {}, words, prog="make_metadata.py", description=description)
        setup_logging(level=None, file=None, simple=True)
        make_metadata(found.options.metadata)
        return 0

    return guarded(action)


if __name__ == "__main__":
    sys.exit(main())
