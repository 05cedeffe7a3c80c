# SPDX-License-Identifier: Apache-2.0
"""The input of ByT5: the quoted text of a caption, byte by byte, so that the model can write it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from library.types import Tokens
from library.weights.tokenizers import TextTokenizer

LENGTH = 128  # bytes, with the end token
# As in Tencent's code, ComfyUI and sd-scripts; diffusers also reads text between two apostrophes
QUOTES = (r'"(.*?)"', r"‘(.*?)’", r"“(.*?)”")


def quoted(caption: str) -> str:
    """`a sign "Open" and "24 h"` -> `Text "Open". Text "24 h". `; empty if nothing is quoted."""
    return "".join(f'Text "{text}". ' for pattern in QUOTES for text in re.findall(pattern, caption))


class GlyphTokenizer(TextTokenizer):
    """ByT5's tokenizer, which has no files. A caption without quotes has no tokens, not even an end token."""

    def __call__(self, captions: Sequence[str], *, length: int, name: str) -> Tokens:
        rows = [self._ids(quoted(caption), length) for caption in captions]
        ids = torch.tensor([row + [self.tokenizer.pad_token_id] * (length - len(row)) for row in rows])
        return Tokens({name: ids}, {name: tuple(map(len, rows))})

    def fingerprint(self) -> str:
        return f"bytes of {QUOTES}"

    def _ids(self, text: str, length: int) -> list[int]:
        return list(self.tokenizer(text, truncation=True, max_length=length).input_ids) if text else []


def glyph_tokenizer() -> GlyphTokenizer:
    from transformers import ByT5Tokenizer

    return GlyphTokenizer(Path(), ByT5Tokenizer())
