# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of CLIP-L, CLIP-G, T5, Gemma 2, Qwen and Mistral: finding them, and captions -> ids."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from library.errors import UserError, retold
from library.types import Tokens
from library.weights.text import (
    CLIP_ID,
    CLIP_KIND,
    ClipTokenizer,
    TokenizerKind,
    find_folder,
    load_tokenizer,
    read_tokenizer,
)
from library.weights.weight_files import open_weights

CLIP_G_ID = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
CLIP_G_PADDING = "!"  # token 0
T5_HUB = (("google/t5-v1_1-xxl", ""), ("black-forest-labs/FLUX.1-schnell", "tokenizer_2"))
GEMMA2_HUB = (
    ("google/gemma-2-2b", ""),
    ("Alpha-VLLM/Lumina-Image-2.0", "tokenizer"),
    ("Efficient-Large-Model/gemma-2-2b-it", ""),
)
QWEN_HUB = (("Qwen/Qwen3-4B", ""), ("Qwen/Qwen3-8B", ""), ("Qwen/Qwen3-0.6B", ""))  # one vocabulary
MISTRAL_HUB = (("black-forest-labs/FLUX.2-dev", "tokenizer"), ("mistralai/Mistral-Small-3.1-24B-Instruct-2503", ""))
CHAT_MARK = re.compile(r"<[|/]?\w+\|?>|\[/?[A-Z_]+\]")  # tokens of chat templates: <|im_end|>, </think>, [INST]
T5_MODEL, GEMMA2_MODEL = "spiece.model", "tokenizer.model"  # SentencePiece models
JSON_FILES = "tokenizer.json and tokenizer_config.json"
EMBEDDED = "spiece_model"  # tensor with the bytes of a SentencePiece model in ComfyUI's Gemma files


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer that pads captions on the right to one length: T5's and Gemma's."""

    folder: Path  # where it came from
    tokenizer: Any  # of transformers

    def __call__(self, captions: Sequence[str], *, length: int, name: str) -> Tokens:
        """Ids (B, length) of the encoder `name`, padded.

        Start and end tokens belong to a caption. Longer captions are cut; their indices are in `truncated`.
        """
        encoded = self.tokenizer(list(captions), padding="max_length", truncation=True, max_length=length)
        ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        lengths = tuple(map(sum, encoded["attention_mask"]))
        most = self.limit(length)
        truncated = tuple(i for i, count in enumerate(self.count(captions)) if count > most)
        return Tokens({name: ids}, {name: lengths}, truncated=truncated)

    def limit(self, length: int) -> int:
        """Maximum number of tokens of a caption if `length` tokens are read. Start and end do not count."""
        return length - self.tokenizer.num_special_tokens_to_add()

    def count(self, captions: Sequence[str]) -> list[int]:
        """Number of tokens of each whole caption, without start and end."""
        encoded = self.tokenizer(list(captions), add_special_tokens=False, truncation=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def fingerprint(self) -> str:
        """Hash of everything that ids depend on: vocabulary, normalization, special tokens, padding."""
        settings = json.loads(self.tokenizer.backend_tokenizer.to_str())
        kept = {
            key: value for key, value in settings.items() if key not in ("truncation", "padding")
        }  # of the last call
        text = json.dumps([kept, self.tokenizer.pad_token_id], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class ChatTokenizer(TextTokenizer):
    """A language model's tokenizer. Each caption is put into a chat, given as the text before and after it.

    A caption that is too long is cut at its end; the text after it is kept.
    """

    before: str = ""
    after: str = ""

    def __call__(self, captions: Sequence[str], *, length: int, name: str) -> Tokens:
        """Ids (B, length) of the encoder `name`, padded on the side that the tokenizer uses."""
        rows = self._rows(captions)
        after = len(self._ids([self.after])[0])
        cut = [row if len(row) <= length else row[: length - after] + row[len(row) - after :] for row in rows]
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id, dtype=torch.int64)
        for i, row in enumerate(cut):
            place = slice(length - len(row), length) if self.pads_left else slice(len(row))
            ids[i, place] = torch.tensor(row, dtype=torch.int64)
        truncated = tuple(i for i, row in enumerate(rows) if len(row) > length)
        return Tokens({name: ids}, {name: tuple(map(len, cut))}, truncated=truncated)

    @property
    def pads_left(self) -> bool:
        """Whether padding comes before the text."""
        return bool(self.tokenizer.padding_side == "left")

    def limit(self, length: int) -> int:
        """Maximum number of tokens of a caption. Those of the chat do not count."""
        return length - self._frame

    def count(self, captions: Sequence[str]) -> list[int]:
        return [len(row) - self._frame for row in self._rows(captions)]

    def fingerprint(self) -> str:
        text = repr([super().fingerprint(), self.before, self.after, self.pads_left])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @cached_property
    def _frame(self) -> int:
        return len(self._rows([""])[0])

    def _rows(self, captions: Sequence[str]) -> list[list[int]]:
        return self._ids([f"{self.before}{caption}{self.after}" for caption in captions])

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)
        return list(encoded["input_ids"])


# ---- where they come from -------------------------------------------------------------------------------------------


def tokenizer_folders(*sources: Path | None, names: Sequence[str]) -> list[Path]:
    """Folders with one of `names` that may hold a tokenizer: inside each source, or beside it if it is a file.

    A source that is a transformers folder may also hold the tokenizer directly, or have it in a folder beside it.
    """
    found = []
    for source in sources:
        if source is not None and source.is_dir():
            found += [source / name for name in names] + [source] + [source.parent / name for name in names]
        elif source is not None:
            found += [source.parent / name for name in names]
    return found


def clip_tokenizer(
    folders: Sequence[Path],
    *,
    cache: str | None,
    hub_id: str = CLIP_ID,
    subfolder: str = "",
    padding: str | None = None,
) -> ClipTokenizer:
    """CLIP's tokenizer, from `folders`, --tokenizer_cache_dir or the hub. padding: a padding token other than its own.

    The vocabularies of CLIP-L and CLIP-G are equal; CLIP-G is padded with token 0 (CLIP_G_PADDING).
    Raises UserError that says which files to put where.
    """
    return read_tokenizer(find_folder(CLIP_KIND, folders, cache=cache, hub=((hub_id, subfolder),)), padding=padding)


def t5_tokenizer(folders: Sequence[Path], *, cache: str | None) -> TextTokenizer:
    """T5's tokenizer, which ends every caption with </s>. Raises UserError that says which files to put where."""
    kind = _sentencepiece_kind("a T5", "T5TokenizerFast", T5_MODEL)
    advice = _advice([folder / T5_MODEL for folder in folders])
    return _text_tokenizer(find_folder(kind, folders, cache=cache, hub=T5_HUB, advice=advice), kind)


def gemma2_tokenizer(folders: Sequence[Path], *, cache: str | None, file: Path | None = None) -> TextTokenizer:
    """Gemma's tokenizer, which begins every caption with <bos>. file: weights that may contain it, as ComfyUI's do.

    Raises UserError that says which files to put where.
    """
    kind = _sentencepiece_kind("a Gemma", "GemmaTokenizerFast", GEMMA2_MODEL)
    inside = _embedded(file) if file is not None else None
    if file is not None and inside is not None and _has_sentencepiece():
        return _begin_with_bos(_unpack(file, inside, kind))
    advice = _advice([folder / GEMMA2_MODEL for folder in folders] + ([file] if file is not None and inside else []))
    found = find_folder(kind, folders, cache=cache, hub=GEMMA2_HUB, advice=advice)
    return _begin_with_bos(_text_tokenizer(found, kind))


def qwen_tokenizer(
    folders: Sequence[Path],
    *,
    cache: str | None,
    before: str = "",
    after: str = "",
    hub: Sequence[tuple[str, str]] = QWEN_HUB,
) -> ChatTokenizer:
    """The tokenizer of Qwen2.5 and Qwen3, which pads on the right. before, after: the chat around a caption.

    Raises UserError that says which files to put where, and for a tokenizer without the special tokens of the chat.
    """
    kind = TokenizerKind("a Qwen", "Qwen2TokenizerFast", ("tokenizer.json", "vocab.json"), JSON_FILES)
    return _chat_tokenizer(find_folder(kind, folders, cache=cache, hub=hub), kind, before, after, "right")


def mistral_tokenizer(folders: Sequence[Path], *, cache: str | None, before: str, after: str) -> ChatTokenizer:
    """Mistral's tokenizer, which pads on the left. Arguments and errors as in `qwen_tokenizer`."""
    kind = TokenizerKind("a Mistral", "PreTrainedTokenizerFast", ("tokenizer.json",), JSON_FILES)
    return _chat_tokenizer(find_folder(kind, folders, cache=cache, hub=MISTRAL_HUB), kind, before, after, "left")


def _chat_tokenizer(folder: Path, kind: TokenizerKind, before: str, after: str, side: str) -> ChatTokenizer:
    own = _text_tokenizer(folder, kind).tokenizer
    own.padding_side = side
    known = own.get_vocab()
    if lacking := [mark for mark in CHAT_MARK.findall(before + after) if mark not in known]:
        names = ", ".join(dict.fromkeys(lacking))
        raise UserError(f"{folder} is not usable as {kind.name} tokenizer: it has no token {names}")
    return ChatTokenizer(folder, own, before, after)


def _begin_with_bos(tokenizer: TextTokenizer) -> TextTokenizer:
    """Make the tokenizer add <bos>, with which Gemma was trained: a SentencePiece model alone does not say so."""
    from tokenizers.processors import TemplateProcessing

    own: Any = tokenizer.tokenizer
    if own("").input_ids != [own.bos_token_id]:
        bos = (own.bos_token, own.bos_token_id)
        own.backend_tokenizer.post_processor = TemplateProcessing(f"{own.bos_token} $A", special_tokens=[bos])
    return tokenizer


def _sentencepiece_kind(name: str, reader: str, model: str) -> TokenizerKind:
    """A kind that is also published as a SentencePiece model, which only the library sentencepiece reads."""
    files = ("tokenizer.json", model) if _has_sentencepiece() else ("tokenizer.json",)
    return TokenizerKind(name, reader, files, JSON_FILES)


def _advice(models: Sequence[Path]) -> str:
    """Advice on how to make the first of these files that exists readable."""
    found = next((model for model in models if model.is_file()), None)
    return (
        "" if found is None or _has_sentencepiece() else f", or install sentencepiece, which reads the one in {found}"
    )


def _has_sentencepiece() -> bool:
    return importlib.util.find_spec("sentencepiece") is not None


def _text_tokenizer(folder: Path, kind: TokenizerKind) -> TextTokenizer:
    tokenizer = load_tokenizer(folder, kind)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        raise UserError(f"{folder} is not usable as {kind.name} tokenizer: it has no padding token")
    return TextTokenizer(folder, tokenizer)


def _embedded(file: Path) -> str | None:
    """The name of the tensor with a SentencePiece model in a file, or None."""
    if not file.is_file():
        return None
    return next((name for name in open_weights(file).shapes if name.split(".")[-1] == EMBEDDED), None)


def _unpack(file: Path, name: str, kind: TokenizerKind) -> TextTokenizer:
    model = open_weights(file).tensor(name)
    if model.dtype not in (torch.uint8, torch.int8):
        raise UserError(f"{file}: {name} is stored as {str(model.dtype).removeprefix('torch.')}, not as bytes")
    with tempfile.TemporaryDirectory() as folder, retold(lambda line: line.replace(folder, f"{name} in {file}")):
        (Path(folder) / GEMMA2_MODEL).write_bytes(model.numpy().tobytes())
        return TextTokenizer(file, _text_tokenizer(Path(folder), kind).tokenizer)
