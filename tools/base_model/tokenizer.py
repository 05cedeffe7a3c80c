# SPDX-License-Identifier: Apache-2.0
"""A small CLIP tokenizer: every byte is a symbol, the words below are single tokens.

Layout as in CLIP (Radford et al. 2021, https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py):
256 byte symbols, the same with the end-of-word mark, merged symbols, start and end token. Words that
are not listed fall apart into shorter pieces or bytes, so that any caption can be used.
"""

import json
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from .draw import COLOURS, CONCEPT, CONCEPT_WORD, THINGS

CONTEXT_LENGTH = 77  # tokens, as CLIP
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
WORDS_BEFORE_COLOURS = """
    a an the of on in and with at by for to from is my this one two
    picture photo drawing painting image style background top bottom left right center
    small big large little old new bright dark plain round
"""
OTHER_COLOURS = "pink cyan gray grey brown gold silver"
OTHER_THINGS = """
    diamond ring flower fish boat mushroom robot toy dog cat bird car ball cup book chair face person
    man woman girl boy sun moon cloud sky hat shoe bag plane train ship
"""
WORDS = tuple(
    dict.fromkeys(  # in order of token number: a shipped model depends on it
        [
            *WORDS_BEFORE_COLOURS.split(),
            *COLOURS,
            *OTHER_COLOURS.split(),
            *THINGS,
            *OTHER_THINGS.split(),
            CONCEPT_WORD,
            CONCEPT,
        ]
    )
)


def byte_symbols() -> list[str]:
    """A printable character for each byte 0..255, the table of GPT-2 and CLIP, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def _apply_merges(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: join the neighbours of lowest rank until no listed pair is left."""
    while True:
        pairs = [(ranks[pair], index) for index, pair in enumerate(pairwise(symbols)) if pair in ranks]
        if not pairs:
            return symbols
        _, index = min(pairs)
        symbols = [*symbols[:index], symbols[index] + symbols[index + 1], *symbols[index + 2 :]]


def build_merges(words: tuple[str, ...] = WORDS) -> list[tuple[str, str]]:
    """Merges, in order of rank, by which each word becomes one token."""
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        symbols = [*word[:-1], word[-1] + WORD_END]
        while len(symbols := _apply_merges(symbols, ranks)) > 1:
            ranks[symbols[0], symbols[1]] = len(ranks)
    return list(ranks)


def build_vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    symbols = byte_symbols()
    ends = [symbol + WORD_END for symbol in symbols]
    tokens = [*symbols, *ends, *("".join(pair) for pair in merges), START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def build_tokenizer() -> CLIPTokenizer:
    merges = build_merges()
    return CLIPTokenizer(
        vocab=build_vocabulary(merges),
        merges=merges,
        model_max_length=CONTEXT_LENGTH,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
    )


def save_tokenizer(folder: Path) -> None:
    """tokenizer.json, and vocab.json + merges.txt, which transformers 5 no longer writes itself."""
    build_tokenizer().save_pretrained(folder)
    merges = build_merges()
    vocabulary = json.dumps(build_vocabulary(merges), ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
