# SPDX-License-Identifier: Apache-2.0
"""The samples of shards, made on demand: only the indexes are kept, and all processes share them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import overload

import numpy as np

from library.data.captions import caption_of
from library.data.headers import ALPHA
from library.data.joined import place_in
from library.data.records import Sample, SubsetConfig
from library.data.references import config_of_references
from library.data.shards.index import ShardIndex
from library.data.shards.shard import Member
from library.types import Size

MOST_STRETCH = 1.25  # of a control image relative to its picture; rounding to multiples of 64 stretches less


class ShardSamples(Sequence[Sample]):
    """The samples of a subset, shard by shard. control: conditioning pictures are control images, not masks."""

    def __init__(self, indexes: Sequence[ShardIndex], config: SubsetConfig, *, control: bool = False) -> None:
        self.indexes, self.config, self.control = list(indexes), config, control
        self.of_references = config_of_references(config)
        self.ends = list(accumulate(map(len, self.indexes)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, which: int) -> Sample: ...
    @overload
    def __getitem__(self, which: slice) -> Sequence[Sample]: ...
    def __getitem__(self, which: int | slice) -> Sample | Sequence[Sample]:
        places = range(len(self))[which]
        if isinstance(places, range):
            return [self[place] for place in places]
        shard, number = place_in(self.ends, places)
        return self._made(self.indexes[shard], number)

    def __iter__(self) -> Iterator[Sample]:
        for index in self.indexes:
            for number in range(len(index)):
                yield self._made(index, number)

    def _made(self, index: ShardIndex, number: int) -> Sample:
        row = index.sample(number)
        members: dict[str, Member] = {}
        picture = self._placed(index, row.picture, members)
        conditioning = row.control if self.control else row.mask
        other = self._placed(index, conditioning, members).path if conditioning >= 0 else None
        caption = caption_of(row.caption or "", enable_wildcard=self.config.captions.enable_wildcard)
        return Sample(
            picture.path,
            picture.size,
            caption or self.config.class_tokens or "",
            self.config,
            index.shard.mtime_ns,
            picture.file_size,
            picture.has_alpha,
            mask_path=None if self.control else other,
            control_path=other if self.control else None,
            references=tuple(self._placed(index, reference, {}) for reference in row.references),
            members=members,
        )

    def _placed(self, index: ShardIndex, number: int, members: dict[str, Member]) -> Sample:
        """One picture without a caption. Its location is added to `members`, which the sample keeps."""
        name, start, length, width, height, flags, digest = index.picture(number)
        path, shard = f"{index.shard.path}/{name}", index.shard
        members[path] = Member(shard, start, length, digest)
        return Sample(
            path, (width, height), "", self.of_references, shard.mtime_ns, length, flags & ALPHA != 0, members=members
        )

    def sizes(self) -> np.ndarray:
        """Width and height of each picture, N 2 int64."""
        pictures = [index.pictures[index.samples["picture"]] for index in self.indexes]
        none = np.zeros((0, 2), dtype=np.int64)  # where all shards are damaged
        return np.concatenate([none, *(np.stack([p["width"], p["height"]], axis=1, dtype=np.int64) for p in pictures)])

    def reference_sizes(self) -> Iterator[tuple[int, tuple[Size, ...]]]:
        """(number, sizes of the reference pictures) of each sample that has any."""
        for index, end in zip(self.indexes, self.ends):
            for number in np.flatnonzero(index.samples["references"]).tolist():
                rows = index.pictures[index.sample(number).references]
                found = zip(rows["width"].tolist(), rows["height"].tolist())
                yield end - len(index) + number, tuple(found)

    def digests(self) -> tuple[str, str]:
        """(digest of all pictures, masks and references included; digest of names and captions)."""
        pictures, texts = (hashlib.blake2b(digest_size=4) for _ in range(2))
        for index in self.indexes:
            pictures.update(index.pictures["digest"].tobytes())
            texts.update(index.texts)
        texts.update((self.config.class_tokens or "").encode())
        return pictures.hexdigest(), texts.hexdigest()

    # ---- facts about them, without making any ----------------------------------------------------------------------

    def names(self, chosen: Sequence[np.ndarray]) -> tuple[str, ...]:
        """`<shard>/<name>` of the chosen samples. chosen: a mask over the samples of each index."""
        return tuple(
            f"{index.shard.path}/{index.name_of(number)}"
            for index, rows in zip(self.indexes, chosen)
            for number in np.flatnonzero(rows).tolist()
        )

    @property
    def without_caption(self) -> tuple[str, ...]:
        return self.names([index.samples["caption_length"] < 0 for index in self.indexes])

    @property
    def empty_caption(self) -> tuple[str, ...]:
        return self.names([index.samples["caption_length"] == 0 for index in self.indexes])

    @property
    def without_control(self) -> tuple[str, ...]:
        return self.names([index.samples["control"] < 0 for index in self.indexes])

    @property
    def has_references(self) -> bool:
        """Whether any sample has a reference picture."""
        return any(index.samples["references"].any() for index in self.indexes)

    @property
    def without_reference(self) -> tuple[str, ...]:
        """Samples without a reference picture, where others have one."""
        return self.names([index.samples["references"] == 0 for index in self.indexes]) if self.has_references else ()

    @property
    def stretched_controls(self) -> tuple[str, ...]:
        """Samples whose control image has another aspect ratio than the picture."""
        return self.names([_stretched(index) for index in self.indexes])

    @property
    def left_out(self) -> Counter[str]:
        """Ending -> number of files that are not read."""
        return sum((Counter(index.left_out) for index in self.indexes), Counter())

    def duplicates(self) -> list[tuple[str, str]]:
        """(name, earlier name) of pictures with equal bytes."""
        if not len(self):
            return []
        digests = [index.pictures["digest"][index.samples["picture"]].view("S20") for index in self.indexes]
        _, first, place = np.unique(np.concatenate(digests), return_index=True, return_inverse=True)
        same = first[place]
        repeated = np.flatnonzero(same != np.arange(len(self))).tolist()
        return [(self._name(number), self._name(int(same[number]))) for number in repeated]

    def _name(self, number: int) -> str:
        shard, place = place_in(self.ends, number)
        return self.indexes[shard].name_of(place)


def _stretched(index: ShardIndex) -> np.ndarray:
    """Whether each sample of an index has a control image of another aspect ratio."""
    rows = index.samples
    own, other = (index.pictures[rows[kind]] for kind in ("picture", "control"))  # of -1: any, masked
    sides = [side.astype(np.float64) for side in (own["width"], other["height"], own["height"], other["width"])]
    ratio = sides[0] * sides[1] / (sides[2] * sides[3])
    return (rows["control"] >= 0) & (np.maximum(ratio, 1 / ratio) > MOST_STRETCH)
