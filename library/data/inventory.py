# SPDX-License-Identifier: Apache-2.0
"""What a folder holds and what becomes of it, in one line of the plan: pictures, where captions come from, the rest.

Nothing is left out without a word: other formats, subfolders, caption files that are not read, equal pictures.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from library.data.folder import Folder
from library.data.records import Sample, SubsetConfig
from library.data.shards.samples import ShardSamples
from library.errors import first_names

TEXT_ENDINGS = frozenset({"txt", "caption", "cap", "tags"})  # caption files of one program or another
SIDE_ENDINGS = frozenset({"npz", "json", "jsonl", "toml", "yaml", "yml", "ini", "db", "safetensors"})
UNREAD_PICTURES = frozenset(
    {
        "heic", "heif", "hif", "gif", "tif", "tiff", "psd", "jfif", "jp2", "svg", "ico", "tga", "ppm", "exr", "hdr",
        "cr2", "cr3", "nef", "arw", "dng", "raf", "orf", "rw2",
    }
)  # fmt: skip
MOST_KINDS = 8  # named in the line
MOST_COMPARED = 5_000  # files of equal sizes that are read at a start to find equal pictures
FIRST_BYTES = 1 << 16


@dataclass(frozen=True)
class Captions:
    """Where the captions of a subset come from. source: `.txt`, or the name of the metadata file."""

    source: str
    own: int
    fallback: int  # from class_tokens
    without: int


@dataclass(frozen=True)
class LeftOut:
    """Files beside the pictures. kinds: such as (".MOV", 2), the most frequent first."""

    kinds: tuple[tuple[str, int], ...] = ()
    unread_pictures: tuple[str, ...] = ()
    unread_captions: tuple[str, ...] = ()  # text files of a picture that has no caption file


@dataclass(frozen=True)
class Inventory:
    """The pictures of one subset, their captions, and what else lies in the folder."""

    pictures: int
    captions: Captions
    left_out: LeftOut = LeftOut()

    def line(self, config: SubsetConfig, duplicates: Sequence[tuple[str, str]] | None) -> str:
        """`24 pictures; captions: 7 from .txt, 17 from the folder's name "my dog"; left out: 1 .MOV; 2 duplicates`

        duplicates: what `find_duplicates` gives.
        """
        parts = [counted(self.pictures, "picture"), f"captions: {', '.join(self._sources(config))}"]
        if self.left_out.kinds:
            shown = [f"{count} {kind}" for kind, count in self.left_out.kinds[:MOST_KINDS]]
            rest = sum(count for _, count in self.left_out.kinds[MOST_KINDS:])
            parts.append(f"left out: {', '.join([*shown, f'{rest} others'] if rest else shown)}")
        if duplicates is None:
            parts.append("duplicates not looked for, too many files have the same size")
        elif duplicates:
            pairs = first_names([f"{name} = {first}" for name, first in duplicates])
            parts.append(f"{counted(len(duplicates), 'duplicate')} ({pairs})")
        return "; ".join(parts)

    def _sources(self, config: SubsetConfig) -> Iterator[str]:
        found = self.captions
        if found.own:
            yield f"{found.own} from {found.source}"
        if found.fallback:
            yield f"{found.fallback} from {fallback_words(config)}"
        if found.without:
            yield f"{found.without} without"
        if not self.pictures:
            yield "none"

    @property
    def unread_endings(self) -> set[str]:
        """Endings of caption files that are not read."""
        return {os.path.splitext(name)[1] for name in self.left_out.unread_captions}

    def warnings(self, config: SubsetConfig) -> Iterator[str]:
        """What is probably not meant; one line each."""
        ending = config.caption_extension
        other: dict[str, list[str]] = {}
        for name in self.left_out.unread_captions:
            other.setdefault(os.path.splitext(name)[1], []).append(name)
        for suffix, names in other.items():
            are = "is" if len(names) == 1 else "are"
            files = f"{config.name}: {counted(len(names), f'{suffix} file')} beside the pictures {are}"
            if suffix.lower() == ending.lower():
                yield f"{files} not read, for captions end in {ending}: rename them ({first_names(names)})"
            else:
                yield (
                    f"{files} not read as captions, which are looked for in {ending}: give --caption_extension "
                    f"{suffix}, or caption_extension in the dataset file ({first_names(names)})"
                )
        if self.left_out.unread_pictures:
            names = list(self.left_out.unread_pictures)
            kind = counted(len(names), "picture")
            yield (
                f"{config.name}: {kind} left out, of formats that are not read: save them as png, jpg or webp to train "
                f"on them ({first_names(names)})"
            )


def counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def fallback_words(config: SubsetConfig) -> str:
    """What a picture without a caption is trained with."""
    words = config.class_tokens or ""
    folder = os.path.basename(os.path.normpath(config.image_dir or ""))
    return f'the folder\'s name "{words}"' if folder.partition("_")[2] == words else f'class_tokens "{words}"'


def left_out(folder: Folder, used: Iterable[str], config: SubsetConfig) -> LeftOut:
    """Files of the folder that are neither pictures nor caption files in use. Hidden files do not count."""
    used, stems = set(used), folder.by_stem
    served = {name.rpartition(".")[0] for name in used}  # stems that have their caption
    own = os.path.abspath(config.conditioning_data_dir or "")
    kinds: Counter[str] = Counter()
    pictures: list[str] = []
    texts: list[str] = []
    for name in folder.names - folder.pictures.keys() - used:
        stem, dot, suffix = name.rpartition(".")
        ending = suffix.lower() if dot and stem else ""
        if name.startswith(".") or ending in SIDE_ENDINGS:
            continue
        if stem in stems and (ending in TEXT_ENDINGS or f".{ending}" == config.caption_extension.lower()):
            if stem not in served:
                texts.append(name)
        elif ending not in UNREAD_PICTURES and ending not in TEXT_ENDINGS and os.path.isdir(folder.prefix + name):
            kinds["subfolder"] += folder.prefix + name != own
        else:
            kinds[f".{suffix}" if ending else "file without ending"] += 1
            if ending in UNREAD_PICTURES:
                pictures.append(name)
    plural = Counter({"subfolders" if kind == "subfolder" and n > 1 else kind: n for kind, n in kinds.items() if n})
    order = sorted(plural.items(), key=lambda item: (item[0].startswith("subfolder"), -item[1], item[0]))
    return LeftOut(tuple(order), tuple(sorted(pictures)), tuple(sorted(texts)))


# ---- equal pictures -------------------------------------------------------------------------------------------------


def find_duplicates(samples: Sequence[Sample]) -> list[tuple[str, str]] | None:
    """(name, earlier name) of pictures whose files are equal; only files of one size are read. None: too many."""
    if isinstance(samples, ShardSamples):
        return samples.duplicates()
    sizes = Counter([sample.file_size for sample in samples])
    if len(sizes) == len(samples):
        return []
    alike: dict[tuple, list[str]] = {}
    for sample in samples:
        if sizes[sample.file_size] > 1:
            alike.setdefault((sample.file_size, sample.size, sample.has_alpha), []).append(sample.path)
    groups = [group for group in alike.values() if len(group) > 1]
    if sum(map(len, groups)) > MOST_COMPARED:
        return None
    found = []
    for group in groups:
        for same_start in _grouped(group, FIRST_BYTES):
            for first, *others in _grouped(same_start, None):
                found += [(os.path.basename(path), os.path.basename(first)) for path in others]
    return sorted(found)


def _grouped(paths: Sequence[str], count: int | None) -> list[list[str]]:
    """The paths whose files begin with the same `count` bytes (None: are the same), where there are several."""
    groups: dict[bytes, list[str]] = {}
    for path in paths:
        digest = hashlib.blake2b(digest_size=16)
        try:
            with open(path, "rb") as file:
                while chunk := file.read(FIRST_BYTES):
                    digest.update(chunk)
                    if count is not None:
                        break
        except OSError:
            continue  # whoever needs the picture says so
        groups.setdefault(digest.digest(), []).append(path)
    return [group for group in groups.values() if len(group) > 1]
