# SPDX-License-Identifier: Apache-2.0
"""The reference pictures of a subset: which files of its folders of references belong to which training picture."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, takewhile
from typing import NamedTuple

from library.data.folder import Folder
from library.data.headers import ALPHA
from library.data.records import ImageRules, Sample, SubsetConfig
from library.errors import first_names


class References(NamedTuple):
    """What was found, by the name of the training picture."""

    of: dict[str, tuple[Sample, ...]]
    problems: list[str]


NO_REFERENCES = References({}, [])


def reference_problems(subsets: Iterable[SubsetConfig], *, taken: bool) -> Iterator[str]:
    """What cannot work about reference pictures. taken: whether the model takes any."""
    with_references = [subset for subset in subsets if subset.reference_data_dirs]
    if with_references and not taken:
        names = first_names([subset.name for subset in with_references])
        told = "this model takes no reference pictures here: leave it out, or give --task edit to a model that can"
        yield f"reference_data_dir: {told} ({names})"
        return
    yield from moved_alone(with_references)


def moved_alone(subsets: Sequence[SubsetConfig]) -> Iterator[str]:
    """Augmentations that would change the pictures of subsets with references, and not the references."""
    for key in ("color_aug", "random_crop", "face_crop_aug_range"):
        names = [subset.name for subset in subsets if vars(subset.images)[key]]
        if names:
            yield f"{key} would change pictures and not their references: leave it out ({first_names(names)})"


def find_references(folders: Sequence[Folder], pictures: Mapping[str, str], config: SubsetConfig) -> References:
    """The references of `pictures` (name -> stem), folder by folder. Each picture must have some in each folder."""
    found: dict[str, tuple[Sample, ...]] = dict.fromkeys(pictures, ())
    problems: list[str] = []
    for folder in folders:
        own = _in_folder(folder, pictures, config)
        problems += own.problems
        found = {name: (*samples, *own.of[name]) for name, samples in found.items()}
    return References(found, problems)


def _in_folder(folder: Folder, pictures: Mapping[str, str], config: SubsetConfig) -> References:
    """The references in one folder: `stem.png`, then `stem_0.png`, `stem_1.png`, ... without a gap.

    A numbered name that is itself the stem of a training picture belongs to that one alone.
    """
    stems = set(pictures.values())
    names = {name: [*_names_of(stem, folder.by_stem, stems)] for name, stem in pictures.items()}
    wanted = dict.fromkeys(file for files in names.values() for file in files)
    folder.look_at_images(wanted)
    problems = [f"{folder.prefix}{file}: {folder.problems[file]}" for file in sorted(wanted.keys() & folder.problems)]
    missing = [name for name, files in names.items() if not files]
    if missing:
        line = f"no reference picture of the same name for {len(missing)} pictures: {first_names(missing, 10)}"
        problems.append(f"{folder.path}: {line}")
    own = config_of_references(config)
    good = folder.images
    return References(
        {name: tuple(reference_sample(folder, f, own) for f in files if f in good) for name, files in names.items()},
        problems,
    )


def config_of_references(config: SubsetConfig) -> SubsetConfig:
    """The subset of the references of a subset: never a mask, nor anything that is drawn."""
    return replace(config, images=ImageRules(resize_interpolation=config.images.resize_interpolation))


def _names_of(stem: str, by_stem: Mapping[str, str], pictures: set[str]) -> Iterator[str]:
    """File names of the references of one training picture. pictures: the stems of all."""
    if stem in by_stem:
        yield by_stem[stem]
    numbered = (f"{stem}_{number}" for number in count())
    for name in takewhile(lambda name: name in by_stem and name not in pictures, numbered):
        yield by_stem[name]


def reference_sample(folder: Folder, name: str, config: SubsetConfig) -> Sample:
    """A reference picture whose header was looked at. config: of `config_of_references`."""
    file_size, mtime_ns, width, height, flags = folder.images[name]
    has_alpha = flags & ALPHA != 0
    return Sample(folder.prefix + name, (width, height), "", config, mtime_ns, file_size, has_alpha)


# ---- pairs that teach nothing ----------------------------------------------------------------------------------------


def equal_pairs(samples: Sequence[Sample]) -> list[str]:
    """The pictures that are the same file as one of their references; only files of one size are read."""
    return [sample.path for sample in samples if any(_same_file(sample, one) for one in sample.references)]


def _same_file(one: Sample, other: Sample) -> bool:
    if (one.file_size, one.size) != (other.file_size, other.size):
        return False
    try:
        return filecmp.cmp(one.path, other.path, shallow=False)
    except OSError:  # whoever needs the picture says so
        return False
