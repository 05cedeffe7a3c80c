# SPDX-License-Identifier: Apache-2.0
"""New words for CLIP text encoders, for textual inversion: in captions, in the vocabulary and in the token embedding.

Gal et al. 2022, "An Image is Worth One Word", https://arxiv.org/abs/2208.01618. The rows of a new word are a tensor of
their own, which the embedding looks into for ids behind its last row. All other rows stay as they are, bit for bit,
because nothing that learns holds them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from library.weights.loading import Part
from library.weights.text import ClipTokenizer


@dataclass(frozen=True)
class NewWord:
    """What a new word is to one text encoder."""

    ids: tuple[int, ...]  # they follow on the last row of the token embedding
    width: int  # of a row
    like: tuple[int, ...] = ()  # ids of the word that its rows begin as; none: they begin at random


@dataclass(frozen=True)
class WordTokenizer(ClipTokenizer):
    """A tokenizer to which one more word stands for ids of its own, wherever it is a whole word, in any case."""

    word: str
    ids: tuple[int, ...]

    def fingerprint(self) -> str:
        """Hash of vocabulary, padding and the new word."""
        return hashlib.blake2b(f"{super().fingerprint()} {self.word} {self.ids}".encode(), digest_size=16).hexdigest()

    def _ids(self, text: str) -> list[int]:
        first, *others = word_pattern(self.word).split(text)
        found = super()._ids(first)
        for piece in others:
            found += [*self.ids, *super()._ids(piece)]
        return found


def word_pattern(word: str) -> re.Pattern[str]:
    """Finds `word` where no letter or digit touches a letter or digit at its ends: CLIP knows no case."""
    before = "(?<![0-9A-Za-z])" if word[0].isalnum() else ""
    after = "(?![0-9A-Za-z])" if word[-1].isalnum() else ""
    return re.compile(f"{before}{re.escape(word)}{after}", re.IGNORECASE)


def add_word(
    tokenizer: ClipTokenizer, encoder: Part, word: str, count: int, like: str | None
) -> tuple[WordTokenizer, NewWord]:
    """The tokenizer with `word` as `count` new tokens, and what they are to the encoder. `tokenizer` stays as it is.

    like: text whose tokens the new ones begin as: in turn, from the start again where there are too few.
    Raises UserError when the vocabulary has the word already, or `like` has no token.
    """
    if _is_known(tokenizer, word):
        raise UserError(
            f"--token_string {word}: the model's vocabulary has this word already; take one that it lacks, "
            f"such as {_unknown(tokenizer, word)}"
        )
    start = tuple(_tokens(tokenizer, like)) if like is not None else ()
    if like is not None and not start:
        raise UserError(f"--init_word '{like}': the tokenizer finds no word in it")
    rows, width = table_of(encoder.blank()).weight.shape
    ids = tuple(range(rows, rows + count))
    plain = (tokenizer.folder, tokenizer.tokenizer, tokenizer.start, tokenizer.end, tokenizer.padding)
    return WordTokenizer(*plain, word, ids), NewWord(ids, width, start)


def _tokens(tokenizer: ClipTokenizer, text: str) -> list[int]:
    return list(tokenizer.tokenizer(text, add_special_tokens=False).input_ids)


def _is_known(tokenizer: ClipTokenizer, word: str) -> bool:
    return len(_tokens(tokenizer, word)) < 2


def _unknown(tokenizer: ClipTokenizer, word: str) -> str:
    """A word like `word` that is not in the vocabulary."""
    candidates = (f"my{word}", f"{word}1", f"my{word}1", f"{word}-{word}-1")
    return next(name for name in candidates if not _is_known(tokenizer, name))


def table_of(encoder: nn.Module) -> nn.Embedding:
    """The token embedding of a text encoder of transformers."""
    table = encoder.get_input_embeddings()  # type: ignore[operator]
    assert isinstance(table, nn.Embedding)
    return table


class NewRows(nn.Module):
    """The rows of new words, (count, width), in use as soon as they are made: ids behind `embedding`'s last row."""

    def __init__(self, embedding: nn.Embedding, rows: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows)
        self._known, self._plain = len(embedding.weight), embedding.forward
        embedding.forward = self.forward  # type: ignore[method-assign, assignment]

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (...) -> states (..., width) in the embedding's dtype."""
        new = ids >= self._known
        states = self._plain(ids.masked_fill(new, 0))
        rows = F.embedding((ids - self._known).clamp(min=0), self.weight)
        return torch.where(new.unsqueeze(-1), rows.to(states.dtype), states)


def first_rows(embedding: nn.Embedding, word: NewWord) -> Tensor:
    """What the rows of a word begin as, (count, width) float32 on the CPU.

    Without `word.like` they are drawn from the normal distribution that the table's rows have, with torch's global
    generator.
    """
    table = embedding.weight.detach()
    if word.like:
        chosen = [word.like[i % len(word.like)] for i in range(len(word.ids))]
        return table[chosen].float().cpu()
    mean, std = table.float().mean(0).cpu(), table.float().std(0).cpu()
    return mean + std * torch.randn(len(word.ids), word.width)
