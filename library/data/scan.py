# SPDX-License-Identifier: Apache-2.0
"""Scan of the datasets: finds pictures, captions, masks and sizes before any model is loaded.

Each folder is listed once. A picture's size is read from its header, its caption from the file with the same stem or
from the metadata file. The results are stored in a manifest (`manifest.py`): a restart only compares file sizes and
times. Problems are collected here and judged in `lint.py`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from library.data.captions import caption_of
from library.data.folder import Folder
from library.data.headers import ALPHA, TURNED
from library.data.inventory import Captions, Inventory, LeftOut, left_out
from library.data.joined import Joined
from library.data.manifest import ImageRow
from library.data.metadata import read_metadata
from library.data.records import NO_MEMBERS, DatasetConfig, Sample, SubsetConfig
from library.data.references import (
    NO_REFERENCES,
    References,
    config_of_references,
    find_references,
    moved_alone,
    reference_sample,
)
from library.data.shards.indexing import open_shards, shards_of
from library.data.shards.samples import MOST_STRETCH, ShardSamples
from library.errors import UserError, first_names

MANY_OBJECTS = 100_000  # made by a scan; from here on the first garbage collection is worth avoiding


@dataclass(frozen=True)
class SubsetScan:
    """Contents of one subset. Names are file names without the folder."""

    config: SubsetConfig
    samples: Sequence[Sample]  # sorted by path, or in the order of the shards; without those that have a problem
    problems: tuple[str, ...] = ()  # whole lines: `<path>: <what is wrong>`
    without_caption: tuple[str, ...] = ()  # neither caption file nor class_tokens
    empty_caption: tuple[str, ...] = ()  # a caption file or entry without text, and no class_tokens
    shared_stems: tuple[tuple[str, ...], ...] = ()  # pictures that differ only in their suffix
    unused_masks: tuple[str, ...] = ()
    contents: str = ""  # what the folder contains, if no picture was found
    inventory: Inventory | None = None  # None if the subset could not be read


@dataclass(frozen=True)
class DatasetScan:
    """One dataset and its subsets, in the order of the configuration."""

    config: DatasetConfig
    subsets: tuple[SubsetScan, ...]

    @property
    def samples(self) -> Sequence[Sample]:
        return Joined([subset.samples for subset in self.subsets])


@dataclass(frozen=True)
class Scan:
    """Result of a scan: one entry per dataset of the configuration."""

    datasets: tuple[DatasetScan, ...]

    @property
    def subsets(self) -> tuple[SubsetScan, ...]:
        return tuple(subset for dataset in self.datasets for subset in dataset.subsets)


def scan(
    configs: Sequence[DatasetConfig],
    *,
    cache_dir: str | None = None,
    npz_suffix: str | None = None,
    plain_npz: bool = False,
    control: bool = False,
) -> Scan:
    """Scan the folders of the datasets.

    cache_dir: folder of the manifests; None: `.trainyard` in each picture folder. npz_suffix: also look for the latent
    files of sd-scripts beside the pictures, such as "_sd.npz"; plain_npz: `<stem>.npz` counts as one too (SD, SDXL).
    control: the pictures of conditioning_data_dir are control images, not masks.
    """
    with _paused_gc():
        scanner = _Scanner(cache_dir, npz_suffix, plain_npz, control)
        datasets = [DatasetScan(c, tuple(scanner.subset(s) for s in c.subsets)) for c in configs]
        for folder in scanner.folders.values():
            folder.remember()
        return Scan(tuple(datasets))


@contextlib.contextmanager
def _paused_gc() -> Iterator[None]:
    """Pause garbage collection: a scan makes many small objects and no cycles."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if gc.get_count()[0] > MANY_OBJECTS and gc.get_freeze_count() == 0:
                # Moves all objects to the oldest generation; else the first collection would walk through every one
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def join_tags(caption: str, tags: str, *, separator: str, enable_wildcard: bool) -> str:
    """The caption of a metadata entry: caption and tags joined; with wildcards tags go to the end of every line."""
    if not enable_wildcard:
        return caption + separator + tags if caption and tags else caption or tags
    tags = separator.join(line for line in tags.split("\n") if line)
    lines = [line for line in caption.split("\n") if line.strip()]
    if not lines:
        return tags
    return "\n".join(line + separator + tags if tags else line for line in lines)


class _Scanner:
    """One scan: its folders, each listed once even if several subsets use it."""

    def __init__(self, cache_dir: str | None, npz_suffix: str | None, plain_npz: bool, control: bool) -> None:
        self.cache_dir, self.npz_suffix, self.plain_npz, self.control = cache_dir, npz_suffix, plain_npz, control
        self.folders: dict[str, Folder] = {}

    def folder(self, path: str) -> Folder:
        """The folder, listed once. Raises OSError if it cannot be listed."""
        path = os.path.abspath(path)
        if path not in self.folders:
            self.folders[path] = Folder(path, self.cache_dir)
        return self.folders[path]

    def subset(self, config: SubsetConfig) -> SubsetScan:
        try:
            if config.shard_pattern is not None:
                return self._shard_subset(config)
            if config.metadata_file:
                return self._metadata_subset(config, config.metadata_file)
            return self._folder_subset(config)
        except OSError as error:
            return SubsetScan(config, (), (f"{error.filename or config.name}: cannot be read ({error.strerror})",))

    # ---- pictures with caption files ------------------------------------------------------------------------------

    def _folder_subset(self, config: SubsetConfig) -> SubsetScan:
        folder = self.folder(config.image_dir or "")
        pictures = folder.pictures
        files = _caption_files(folder, config.caption_extension)
        folder.look_at_images(pictures)
        folder.look_at_texts(dict.fromkeys(file for file in files if file))
        captions: list[str] = []
        missing: list[str] = []
        empty: list[str] = []
        wildcard = config.captions.enable_wildcard
        fallback = config.class_tokens or ""
        texts = folder.texts
        for name, file in zip(pictures, files):
            row = texts.get(file)
            caption = (caption_of(row[2], enable_wildcard=wildcard) if row else "") or fallback
            captions.append(caption)
            if not caption:
                (empty if file else missing).append(name)
        bad = folder.problems.keys() & {*pictures, *files} if folder.problems else set()
        wrong = [f"{folder.prefix}{name}: {folder.problems[name]}" for name in sorted(bad)]
        masks, mask_problems, unused = self._masks(config, pictures, folder.images)
        references = self._references(config, pictures)
        return SubsetScan(
            config=config,
            samples=tuple(self._samples(folder, config, zip(pictures, captions), masks, references.of)),
            problems=(*wrong, *mask_problems, *references.problems),
            without_caption=tuple(missing),
            empty_caption=tuple(empty),
            shared_stems=_shared_stems(pictures),
            unused_masks=tuple(unused),
            contents="" if pictures else folder.contents(),
            inventory=self._inventory(folder, config, files, len(empty) + len(missing)),
        )

    def _inventory(self, folder: Folder, config: SubsetConfig, files: list[str], without: int) -> Inventory:
        """Inventory of a subset. files: caption file of each picture, or ""."""
        texts, wildcard = folder.texts, config.captions.enable_wildcard
        rows = (texts.get(file) for file in files)
        own = sum(1 for row in rows if row and caption_of(row[2], enable_wildcard=wildcard))
        captions = Captions(config.caption_extension, own, len(files) - own - without, without)
        found = left_out(folder, (file for file in files if file), config)
        return Inventory(len(files), captions, found)

    def _references(self, config: SubsetConfig, pictures: Mapping[str, str]) -> References:
        """The reference pictures of a subset. pictures: name -> stem."""
        if not config.reference_data_dirs:
            return NO_REFERENCES
        return find_references([self.folder(path) for path in config.reference_data_dirs], pictures, config)

    def _samples(
        self, folder: Folder, config: SubsetConfig, captions: Iterable[tuple[str, str]], masks: dict[str, str],
        references: Mapping[str, tuple[Sample, ...]],
    ) -> list[Sample]:  # fmt: skip
        """A sample for each readable picture of `captions` (name, caption). masks: or control images."""
        found = []
        legacy = self.npz_suffix is not None and folder.has_npz
        prefix, images, new = folder.prefix, folder.images, object.__new__
        masks, controls = ({}, masks) if self.control else (masks, {})
        for name, caption in captions:
            row = images.get(name)
            if row is None:
                continue
            file_size, mtime_ns, width, height, flags = row
            # A frozen dataclass sets each field through object.__setattr__, which takes three times as long as this
            sample = new(Sample)
            values = sample.__dict__
            values["path"] = prefix + name
            values["size"] = (width, height)
            values["caption"] = caption
            values["subset"] = config
            values["mtime_ns"] = mtime_ns
            values["file_size"] = file_size
            values["has_alpha"] = flags & ALPHA != 0
            values["mask_path"] = masks.get(name) if masks else None
            values["control_path"] = controls.get(name) if controls else None
            values["legacy_latents"] = self._legacy(folder, name, row) if legacy else None
            values["references"] = references.get(name, ())
            values["members"] = NO_MEMBERS
            found.append(sample)
        return found

    def _legacy(self, folder: Folder, name: str, row: ImageRow) -> str | None:
        """The sd-scripts latent file of this stem and size; None for a rotated picture or if older than the picture."""
        _, mtime_ns, width, height, flags = row
        if flags & TURNED:
            return None
        stem = name.rpartition(".")[0]
        sized = f"{stem}_{width:04d}x{height:04d}{self.npz_suffix}"
        for file in (f"{stem}.npz", sized) if self.plain_npz else (sized,):
            if file in folder.names and _written_since(folder.prefix + file, mtime_ns):
                return folder.prefix + file
        return None

    def _masks(
        self, config: SubsetConfig, pictures: dict[str, str], rows: Mapping[str, ImageRow]
    ) -> tuple[dict[str, str], list[str], list[str]]:
        """(picture name -> path of its mask or control image, problems, names without a picture), by stem."""
        if not config.conditioning_data_dir:
            return {}, [], []
        folder = self.folder(config.conditioning_data_dir)
        pairs = {name: folder.by_stem[stem] for name, stem in pictures.items() if stem in folder.by_stem}
        folder.look_at_images(dict.fromkeys(pairs.values()))
        used = set(pairs.values())
        problems = [f"{folder.prefix}{mask}: {folder.problems[mask]}" for mask in sorted(used & folder.problems.keys())]
        missing = [name for name in pictures if name not in pairs]
        if missing:
            names = first_names(missing, 10)
            kind = "control image" if self.control else "mask"
            problems.append(f"{folder.path}: no {kind} of the same name for {len(missing)} pictures: {names}")
        if self.control:
            problems += _other_shapes(folder, pairs, rows)
        unused = [name for name in folder.pictures if name not in used]
        return {name: folder.prefix + mask for name, mask in pairs.items()}, problems, unused

    # ---- pictures in shards ---------------------------------------------------------------------------------------

    def _shard_subset(self, config: SubsetConfig) -> SubsetScan:
        try:
            indexes, problems = open_shards(shards_of(config, self.cache_dir))
        except UserError as error:
            return SubsetScan(config, (), tuple(error.problems))
        samples = ShardSamples(indexes, config, control=self.control)
        missing, empty = samples.without_caption, samples.empty_caption
        if self.control:
            problems += _told(config.name, samples.without_control, "pictures have no control image in their shard")
            stretched = "control images have another shape than their pictures"
            problems += _told(config.name, samples.stretched_controls, stretched)
        problems += _told(config.name, samples.without_reference, "pictures have no reference picture, but others have")
        if samples.has_references:
            problems += moved_alone([config])
        fallback = len(missing) + len(empty) if config.class_tokens else 0
        captions = Captions(
            "the shards", len(samples) - len(missing) - len(empty), fallback, len(missing) + len(empty) - fallback
        )
        return SubsetScan(
            config=config,
            samples=samples,
            problems=tuple(problems),
            without_caption=() if config.class_tokens else missing,
            empty_caption=() if config.class_tokens else empty,
            contents="no sample",
            inventory=Inventory(len(samples), captions, LeftOut(tuple(samples.left_out.most_common()))),
        )

    # ---- pictures of a metadata file ------------------------------------------------------------------------------

    def _metadata_subset(self, config: SubsetConfig, path: str) -> SubsetScan:
        entries, problems = read_metadata(path)
        found: dict[Folder, dict[str, str]] = {}  # folder -> picture name -> caption
        shown: dict[Folder, dict[str, list[str]]] = {}  # folder -> picture name -> its references, as they are named
        missing: list[str] = []
        empty: list[str] = []
        rules = config.captions
        for key, caption, tags, pictures in entries:
            place = self._find(key, config.image_dir)
            if place is None:
                missing.append(key)
                continue
            text = join_tags(
                caption, tags, separator=rules.caption_separator, enable_wildcard=rules.enable_wildcard
            ).strip()
            found.setdefault(place[0], {})[place[1]] = text
            if pictures:
                shown.setdefault(place[0], {})[place[1]] = pictures
            if not text:
                empty.append(key)
        if missing:
            names = first_names(missing, 10)
            problems.append(f"{path}: {len(missing)} pictures are not there: {names} (image_dir: {config.image_dir})")
        samples: list[Sample] = []
        for folder, captions in found.items():
            folder.look_at_images(captions)
            problems += [
                f"{folder.prefix}{name}: {folder.problems[name]}" for name in captions if name in folder.problems
            ]
            stems = {name: name.rpartition(".")[0] for name in captions}
            masks, mask_problems, _ = self._masks(config, stems, folder.images)
            references = self._references(config, stems)
            named = self._named_references(config, path, shown.get(folder, {}))
            problems += [*mask_problems, *references.problems, *named.problems]
            both = {name: (*references.of.get(name, ()), *named.of.get(name, ())) for name in captions}
            samples += self._samples(folder, config, captions.items(), masks, both)
        if shown:
            problems += moved_alone([config])
        samples.sort(key=lambda sample: sample.path)
        return SubsetScan(
            config=config,
            samples=tuple(samples),
            problems=tuple(problems),
            empty_caption=tuple(empty),
            contents="" if entries else "no entry",
            inventory=self._named(config, path, found, len(empty)),
        )

    def _named_references(self, config: SubsetConfig, path: str, named: Mapping[str, list[str]]) -> References:
        """The references that entries of a metadata file name, from its folder on. named: picture name -> paths."""
        of: dict[str, tuple[Sample, ...]] = {}
        problems: list[str] = []
        own, missing = config_of_references(config), []
        for name, paths in named.items():
            samples: list[Sample] = []
            for key in paths:
                place = self._find(key, os.path.dirname(path))
                if place is None:
                    missing.append(key)
                    continue
                folder, file = place
                folder.look_at_images([file])
                if file in folder.problems:
                    problems.append(f"{folder.prefix}{file}: {folder.problems[file]}")
                else:
                    samples.append(reference_sample(folder, file, own))
            of[name] = tuple(samples)
        if missing:
            line = f"{len(missing)} reference pictures are not there: {first_names(missing, 10)}"
            problems.append(f"{path}: {line}")
        return References(of, problems)

    def _named(self, config: SubsetConfig, path: str, found: dict[Folder, dict[str, str]], without: int) -> Inventory:
        """Inventory of a metadata file, including the pictures of image_dir that it does not name."""
        count = sum(map(len, found.values()))
        unnamed = 0
        with contextlib.suppress(OSError):
            folder = self.folder(config.image_dir) if config.image_dir else None
            unnamed = len(folder.pictures.keys() - found.get(folder, {}).keys()) if folder else 0
        kinds = ((f"not in {os.path.basename(path)}", unnamed),) if unnamed else ()
        captions = Captions(os.path.basename(path), count - without, 0, without)
        return Inventory(count, captions, LeftOut(kinds))

    def _find(self, key: str, image_dir: str | None) -> tuple[Folder, str] | None:
        """Folder and name of the picture of a metadata key: a path, or a name in image_dir, with or without suffix."""
        parent, name = os.path.split(os.path.join(image_dir or "", key))
        try:
            folder = self.folder(parent or ".")
        except OSError:
            return None
        name = name if name in folder.names else folder.by_stem.get(name, "")
        return (folder, name) if name else None


def _told(where: str, names: Sequence[str], what: str) -> list[str]:
    """One line about the samples with a problem, if there are any."""
    return [f"{where}: {len(names)} {what}: {first_names(names)}"] if names else []


def _written_since(path: str, mtime_ns: int) -> bool:
    """Whether the path is a regular file at least as new as `mtime_ns`."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_mtime_ns >= mtime_ns


def _other_shapes(folder: Folder, pairs: Mapping[str, str], rows: Mapping[str, ImageRow]) -> list[str]:
    """One line about control images with another aspect ratio than their pictures, which stretching would distort."""
    wrong = []
    for name, control in pairs.items():
        if name not in rows or control not in folder.images:
            continue
        (_, _, width, height, _), (_, _, own_width, own_height, _) = rows[name], folder.images[control]
        ratio = width * own_height / (height * own_width)
        if max(ratio, 1 / ratio) > MOST_STRETCH:
            wrong.append(f"{control} ({own_width}x{own_height}, the picture {width}x{height})")
    if not wrong:
        return []
    return [f"{folder.path}: {len(wrong)} control images have another shape than their pictures: {first_names(wrong)}"]


def _caption_files(folder: Folder, extension: str) -> list[str]:
    """Caption file of each picture, "" if none: same stem, or the stem without the four fields of a face position."""
    found = []
    names = folder.names
    for stem in folder.pictures.values():
        file = stem + extension
        if file not in names:
            face = stem.rsplit("_", 4)
            file = face[0] + extension
            if len(face) < 5 or file not in names:
                file = ""
        found.append(file)
    return found


def _shared_stems(pictures: dict[str, str]) -> tuple[tuple[str, ...], ...]:
    if len(set(pictures.values())) == len(pictures):
        return ()
    groups: dict[str, list[str]] = {}
    for name, stem in pictures.items():
        groups.setdefault(stem, []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


# ---- metadata files -----------------------------------------------------------------------------------------------
