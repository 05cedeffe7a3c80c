# SPDX-License-Identifier: Apache-2.0
"""What the plan of an epoch needs of the samples of a dataset, in columns: a million pictures are a few arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, overload

import numpy as np

from library.data.joined import Joined
from library.data.records import Sample, SubsetConfig
from library.data.shards.samples import ShardSamples
from library.types import Size


class Kinds(NamedTuple):
    """The different sizes of pictures (width, height), and the number of the size of each picture."""

    sizes: list[Size]
    of: np.ndarray


@dataclass(frozen=True)
class Columns:
    """The samples of a dataset. subsets are told apart by identity: the same folder may be used twice."""

    samples: Sequence[Sample]
    sizes: np.ndarray  # N 2: width, height
    subsets: tuple[SubsetConfig, ...]  # in the order in which they come
    subset_of: np.ndarray  # N: numbers of subsets
    references: Mapping[int, tuple[Size, ...]]  # sizes of the reference pictures of the samples that have some

    @cached_property
    def kinds(self) -> Kinds:
        codes, of = np.unique(self.sizes[:, 0] << 32 | self.sizes[:, 1], return_inverse=True)
        return Kinds([(code >> 32, code & 0xFFFFFFFF) for code in codes.tolist()], of.reshape(-1))

    def repeats(self, indices: np.ndarray) -> np.ndarray:
        """num_repeats of some samples."""
        return np.array([s.num_repeats for s in self.subsets], dtype=np.int64)[self.subset_of[indices]]

    def told(self, texts: Mapping[int, str], among: np.ndarray | None = None) -> Told:
        """`<path> (<text>)` of the samples of some sizes. texts: by number of the size. among: a mask over samples."""
        chosen = np.isin(self.kinds.of, list(texts))
        indices = np.flatnonzero(chosen if among is None else chosen & among)
        return Told(self.samples, indices, self.kinds.of[indices], texts)


@dataclass(frozen=True)
class Told(Sequence[str]):
    """Names of samples with a remark each, made when they are asked for."""

    samples: Sequence[Sample]
    indices: np.ndarray
    kinds: np.ndarray
    texts: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, which: int) -> str: ...
    @overload
    def __getitem__(self, which: slice) -> list[str]: ...
    def __getitem__(self, which: int | slice) -> str | list[str]:
        places = range(len(self))[which]
        if isinstance(places, range):
            return [self[place] for place in places]
        return f"{self.samples[int(self.indices[places])].path} ({self.texts[int(self.kinds[places])]})"


def columns_of(samples: Sequence[Sample]) -> Columns:
    """The columns of the samples of a dataset."""
    sizes: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    references: dict[int, tuple[Size, ...]] = {}
    subsets: dict[int, tuple[int, SubsetConfig]] = {}
    first = 0
    for part in samples.parts if isinstance(samples, Joined) else [samples]:
        if isinstance(part, ShardSamples):
            number, _ = subsets.setdefault(id(part.config), (len(subsets), part.config))
            sizes.append(part.sizes())
            numbers.append(np.full(len(part), number, dtype=np.int32))
            references |= {first + place: found for place, found in part.reference_sizes()}
        else:
            rows = np.array([sample.size for sample in part], dtype=np.int64).reshape(-1, 2)
            own = (subsets.setdefault(id(s.subset), (len(subsets), s.subset))[0] for s in part)
            sizes.append(rows)
            numbers.append(np.fromiter(own, dtype=np.int32, count=len(part)))
            references |= {
                first + place: tuple(r.size for r in sample.references)
                for place, sample in enumerate(part)
                if sample.references
            }
        first += len(part)
    return Columns(
        samples,
        np.concatenate([np.zeros((0, 2), dtype=np.int64), *sizes]),
        tuple(subset for _, subset in subsets.values()),
        np.concatenate([np.zeros(0, dtype=np.int32), *numbers]),
        references,
    )
