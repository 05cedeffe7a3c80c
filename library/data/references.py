# SPDX-License-Identifier: Apache-2.0
"""The reference pictures of a subset: which files of --reference_data_dir belong to which training picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, takewhile
from typing import NamedTuple

from library.data.folder import Folder
from library.data.headers import ALPHA
from library.data.records import ImageRules, Sample, SubsetConfig
from library.errors import first_names


def no_flip(subsets: Sequence[str]) -> str:
    """The line about subsets with references that are to be mirrored."""
    return f"flip_aug cannot mirror pictures together with their references: leave it out ({first_names(subsets)})"


class References(NamedTuple):
    """What was found, by the name of the training picture."""

    of: dict[str, tuple[Sample, ...]]
    problems: list[str]


NO_REFERENCES = References({}, [])


def reference_problems(subsets: Iterable[SubsetConfig], *, taken: bool) -> Iterator[str]:
    """What cannot work about reference pictures. taken: whether the model takes any."""
    with_references = [subset for subset in subsets if subset.reference_data_dir]
    if with_references and not taken:
        names = first_names([subset.name for subset in with_references])
        yield f"reference_data_dir: this model takes no reference pictures; leave it out ({names})"
        return
    flipped = [subset.name for subset in with_references if subset.images.flip_aug]
    if flipped:
        yield no_flip(flipped)


def find_references(folder: Folder, pictures: Mapping[str, str], config: SubsetConfig) -> References:
    """The references of `pictures` (name -> stem): `stem.png`, then `stem_0.png`, `stem_1.png`, ... without a gap.

    A numbered name that is itself the stem of a training picture belongs to that one alone. Each picture must have one.
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
        {name: tuple(_sample(folder, f, own) for f in files if f in good) for name, files in names.items()}, problems
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


def _sample(folder: Folder, name: str, config: SubsetConfig) -> Sample:
    file_size, mtime_ns, width, height, flags = folder.images[name]
    has_alpha = flags & ALPHA != 0
    return Sample(folder.prefix + name, (width, height), "", config, mtime_ns, file_size, has_alpha)
