# SPDX-License-Identifier: Apache-2.0
"""Captions for CLIP text encoders: weights in brackets, chunks of 75 tokens, and where the tokenizer comes from."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.byte_paths import plain_path
from library.errors import UserError
from library.io.atomic import atomic_write
from library.types import Tokens

CHUNK = 75  # tokens between the start and the end token of one pass of the encoder
BRACKET = 1.1  # weight of one pair of round brackets; a square pair divides by it
WEIGHT_SYNTAX = re.compile(r"\\[\\()\[\]]|\\|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|:")

# Hub repository of the tokenizer per version. The vocabularies are equal, only the padding differs.
CLIP_ID = "openai/clip-vit-large-patch14"
TOKENIZER_IDS = {1: (CLIP_ID,), 2: ("stabilityai/stable-diffusion-2", CLIP_ID)}
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
SD2_PADDING = "!"  # token 0


# ---- weights in captions --------------------------------------------------------------------------------------------


def parse_weights(caption: str) -> list[tuple[str, float]]:
    """`a (red:1.3) ((cat)) [sat]` -> [("a ", 1), ("red", 1.3), (" ", 1), ("cat", 1.21), (" ", 1), ("sat", 1 / 1.1)].

    A backslash before a bracket makes it a letter. A bracket that is never closed counts to the end.
    """
    pieces: list[tuple[str, float]] = []
    open_round: list[int] = []
    open_square: list[int] = []

    def scale(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for match in WEIGHT_SYNTAX.finditer(caption):
        token, number = match.group(0), match.group(1)
        if token == "(":
            open_round.append(len(pieces))
        elif token == "[":
            open_square.append(len(pieces))
        elif number is not None and open_round:
            scale(open_round.pop(), float(number))
        elif token == ")" and open_round:
            scale(open_round.pop(), BRACKET)
        elif token == "]" and open_square:
            scale(open_square.pop(), 1 / BRACKET)
        else:
            pieces.append((token[1:] if len(token) == 2 and token[0] == "\\" else token, 1.0))
    for start in open_round:
        scale(start, BRACKET)
    for start in open_square:
        scale(start, 1 / BRACKET)
    return _join_equal(pieces)


def _join_equal(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbours of one weight as one text, so that words are not cut where the syntax was."""
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined


# ---- captions -> tokens ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipTokenizer:
    """A tokenizer with its start, end and padding ids."""

    folder: Path  # where it came from
    tokenizer: Any  # transformers.CLIPTokenizer
    start: int
    end: int
    padding: int

    def __call__(self, captions: Sequence[str], *, max_tokens: int, weighted: bool, name: str) -> Tokens:
        """Ids (B, chunks, 77) of the encoder `name`, with weights of the same shape where `weighted`.

        Each chunk is start, up to 75 tokens, end, padding. Longer captions are cut; their indices are in `truncated`.
        """
        words = [self._words(caption, weighted=weighted) for caption in captions]
        chunks = math.ceil(max_tokens / CHUNK)
        rows = [self._chunks(row[:max_tokens], chunks) for row in words]
        ids = torch.tensor([[[i for i, _ in chunk] for chunk in row] for row in rows], dtype=torch.int64)
        weights = torch.tensor([[[w for _, w in chunk] for chunk in row] for row in rows], dtype=torch.float32)
        truncated = tuple(i for i, row in enumerate(words) if len(row) > max_tokens)
        lengths = tuple(min(len(row), max_tokens) + 2 for row in words)  # over all chunks, as `join_chunks` has them
        return Tokens({name: ids}, {name: lengths}, {name: weights} if weighted else None, truncated)

    def count(self, captions: Sequence[str], *, weighted: bool) -> list[int]:
        """Number of tokens of each caption, before anything is cut."""
        return [len(self._words(caption, weighted=weighted)) for caption in captions]

    def fingerprint(self) -> str:
        """Hash of the vocabulary and the padding."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.blake2b(f"{vocabulary} {self.padding}".encode(), digest_size=16).hexdigest()

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _words(self, caption: str, *, weighted: bool) -> list[tuple[int, float]]:
        """Ids with their weights."""
        pieces = parse_weights(caption) if weighted else [(caption, 1.0)]
        return [(i, weight) for text, weight in pieces for i in self._ids(text)]

    def _chunks(self, words: list[tuple[int, float]], count: int) -> list[list[tuple[int, float]]]:
        rows = []
        for begin in range(0, count * CHUNK, CHUNK):
            part = words[begin : begin + CHUNK]
            rows.append([(self.start, 1.0), *part, (self.end, 1.0), *[(self.padding, 1.0)] * (CHUNK - len(part))])
        return rows


def join_chunks(states: Tensor) -> Tensor:
    """(B, chunks, 77, ...) -> (B, 75 chunks + 2, ...): first start token, the inside of each chunk, last end token."""
    inside = states[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states[:, 0, :1], inside, states[:, -1, -1:]], dim=1)


# ---- where the tokenizer comes from ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizerKind:
    """Which files a tokenizer consists of, and which transformers class reads them."""

    name: str  # for messages: "a T5"
    reader: str  # class in transformers
    files: tuple[str, ...]  # any of these makes a folder one of this kind; the best first
    advice: str  # what to put where there is none


CLIP_KIND = TokenizerKind("a CLIP", "CLIPTokenizer", ("tokenizer.json", "vocab.json"), "vocab.json and merges.txt")


def find_tokenizer(model: Path, *, version: int, cache: str | None) -> ClipTokenizer:
    """SD's: in the model folder or in `tokenizer` beside a single file, in --tokenizer_cache_dir, or from the hub.

    Raises UserError saying which files to put where.
    """
    own = (model if model.is_dir() else model.parent) / "tokenizer"
    others = [Path(cache) / repository.replace("/", "_") for repository in TOKENIZER_IDS[version]] if cache else []
    found = find_folder(CLIP_KIND, [own, *others], cache=cache, hub=((CLIP_ID, ""),))
    padding = SD2_PADDING if version == 2 and not (model.is_dir() and found == own) else None
    return read_tokenizer(found, padding=padding)


def find_folder(
    kind: TokenizerKind,
    folders: Sequence[Path],
    *,
    cache: str | None,
    hub: Sequence[tuple[str, str]],
    advice: str = "",
) -> Path:
    """The first folder with such a tokenizer: of `folders`, then in --tokenizer_cache_dir, then from the hub.

    hub: repositories and their subfolders, the usual one first; what comes from there is kept in the cache folder.
    advice: a further way out. Raises UserError saying which files to put where.
    """
    kept = Path(cache) / hub[0][0].replace("/", "_") if cache else None
    for folder in (*folders, *([kept, kept / hub[0][1]] if kept else [])):
        if _has_tokenizer(folder, kind):
            return folder
    for repository, subfolder in hub:
        found = _from_hub(repository, subfolder, kind)
        if found is not None:
            if kept is not None:
                _keep(found, kept)
            return found
    repository, subfolder = hub[0]
    files = f"{kind.advice} of {repository}" + (f"/{subfolder}" if subfolder else "")
    where = kept or (folders[0] if folders else None)
    place = where or f"<folder>/{repository.replace('/', '_')} and give --tokenizer_cache_dir <folder>"
    raise UserError(f"no tokenizer: the hub cannot be reached; put {files} into {place}{advice}")


def _has_tokenizer(folder: Path, kind: TokenizerKind) -> bool:
    return any((folder / name).is_file() for name in kind.files)


def _keep(folder: Path, place: Path) -> None:
    """Copy a tokenizer into --tokenizer_cache_dir, for machines without network."""
    place.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            atomic_write(place / name, partial(shutil.copyfile, folder / name))


def _from_hub(repository: str, subfolder: str, kind: TokenizerKind) -> Path | None:
    """Folder of a tokenizer in the hub's local cache, else downloaded into it. None where neither gives one."""
    from huggingface_hub import snapshot_download

    start = f"{subfolder}/" if subfolder else ""
    patterns = [start + name for name in TOKENIZER_FILES]
    for local_only in (True, False):
        try:
            folder = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=local_only))
        except Exception:  # no network, offline mode, not in the cache: the errors differ from version to version
            continue
        if _has_tokenizer(folder / subfolder, kind):
            return folder / subfolder
    return None


def load_tokenizer(folder: Path, kind: TokenizerKind) -> Any:
    """The transformers tokenizer in a folder. Raises UserError when its files are damaged."""
    import transformers

    try:
        with plain_path(folder) as path:
            return getattr(transformers, kind.reader).from_pretrained(path, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions on damaged files
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} is not readable as {kind.name} tokenizer: {problem}") from None


def read_tokenizer(folder: Path, *, padding: str | None = None) -> ClipTokenizer:
    """The CLIP tokenizer in a folder; `padding` is another padding token than its own."""
    tokenizer = load_tokenizer(folder, CLIP_KIND)
    pad = tokenizer.convert_tokens_to_ids(padding) if padding is not None else tokenizer.pad_token_id
    return ClipTokenizer(folder, tokenizer, tokenizer.bos_token_id, tokenizer.eos_token_id, pad)
