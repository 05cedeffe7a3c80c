# SPDX-License-Identifier: Apache-2.0
"""The text cache: one record per text, unpadded, encoded again only when the text or the encoder is another."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from library.data.caches import text_cache
from library.data.caches.text_cache import TextCache, text_store
from library.data.encoding import Text
from library.errors import UserError
from library.rng import torch_generator
from library.types import Cond

CAPTIONS = [*map(Text, ["a cat", "", "出力 Straße 😀", "a very long caption " * 30, "a dog", "a cat"])]


class Encoder:
    """Stands for a text encoder: as many tokens as words, values from the text. Keeps the batches that it saw."""

    def __init__(self) -> None:
        self.batches: list[list[Text]] = []

    def __call__(self, texts: list[Text]) -> list[Cond]:
        self.batches.append(texts)
        return [self.one(text) for text in texts]

    @staticmethod
    def one(text: Text) -> Cond:
        length = len(text.caption.split()) + 2
        hidden = torch.randn(length, 8, generator=torch_generator("text", text.caption))
        return {"hidden": hidden, "pooled": hidden.mean(0), "mask": torch.ones(length, dtype=torch.int64)}


def make_cache(folder: Path | None, **values: object) -> TextCache:
    settings = {"fingerprint": "clip", "settings": "skip 2, 75 tokens", "dtype": torch.float32} | values
    return TextCache(text_store(folder and str(folder / "texts")), **settings)  # type: ignore[arg-type]


def assert_cached(cache: TextCache, caption: Text) -> None:
    found, wanted = cache.get(caption), Encoder.one(caption)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        value = value.to(cache.dtype) if value.is_floating_point() else value
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("disk", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fill_and_get(tmp_path: Path, disk: bool, dtype: torch.dtype) -> None:
    cache, encoder = make_cache(tmp_path if disk else None, dtype=dtype), Encoder()
    assert set(cache.missing(CAPTIONS)) == set(CAPTIONS) and len(cache.missing(CAPTIONS)) == 5
    assert cache.fill(CAPTIONS, encoder, batch_size=2) == 5
    assert [len(batch) for batch in encoder.batches] == [2, 2, 1]
    middle, first, last = encoder.batches  # that in the middle tells what all will take
    lengths = [len(text.caption) for batch in (first, middle, last) for text in batch]
    assert lengths == sorted(lengths)  # like lengths together: little padding
    for caption in CAPTIONS:
        assert_cached(cache, caption)
    assert cache.missing(CAPTIONS) == [] and cache.fill(CAPTIONS, encoder, batch_size=2) == 0
    with pytest.raises(UserError, match="caption 'a bird': its cached outputs are missing"):
        cache.get(Text("a bird"))
    if disk:
        again = make_cache(tmp_path, dtype=dtype)
        assert again.missing(CAPTIONS) == []
        assert_cached(again, Text("a cat"))


def test_an_edited_caption_is_encoded_alone(tmp_path: Path) -> None:
    make_cache(tmp_path).fill(CAPTIONS, Encoder(), batch_size=2)
    edited = [Text("a black cat"), *CAPTIONS[1:5]]
    encoder = Encoder()
    assert make_cache(tmp_path).fill(edited, encoder, batch_size=2) == 1
    assert encoder.batches == [[Text("a black cat")]]


def test_another_encoder_setting_or_dtype_is_another_text(tmp_path: Path) -> None:
    make_cache(tmp_path).fill(CAPTIONS, Encoder(), batch_size=2)
    for change in ({"fingerprint": "clip2"}, {"settings": "skip 1, 75 tokens"}, {"dtype": torch.float16}):
        assert len(make_cache(tmp_path, **change).missing(CAPTIONS)) == 5


def test_outputs_are_kept_without_padding_and_once(tmp_path: Path) -> None:
    captions = [Text(f"a picture of {number}") for number in range(100)]
    cache = make_cache(tmp_path, dtype=torch.bfloat16)
    cache.fill(captions * 50, Encoder(), batch_size=10)
    cache.close()
    (shard,) = (tmp_path / "texts").glob("*.bin")
    record = 128 + 64 + 64  # (6, 8) bf16 = 96, 8 bf16 = 16 and 6 int64 = 48 bytes, each padded to 64
    assert shard.stat().st_size == 100 * record


def test_damaged_texts_are_said_once_and_encoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_cache(tmp_path).fill(CAPTIONS, Encoder(), batch_size=2)
    (shard,) = (tmp_path / "texts").glob("*.bin")
    os.truncate(shard, 10)
    cache = make_cache(tmp_path)
    assert len(cache.missing(CAPTIONS)) == 5
    assert cache.fill(CAPTIONS, Encoder(), batch_size=2) == 5
    assert len(caplog.records) == 1 and "5 cached captions are damaged" in caplog.text
    assert_cached(make_cache(tmp_path), CAPTIONS[2])


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def encode(texts: list[Text]) -> list[Cond]:
        return [{"hidden": torch.full((2, 2), float("inf") if "cat" in text.caption else 1.0)} for text in texts]

    cache = make_cache(tmp_path)
    with pytest.raises(UserError, match=r"caption 'a cat': .*not finite \(hidden\)"):
        cache.fill(CAPTIONS, encode, batch_size=1)
    assert Text("") not in cache.missing(CAPTIONS) and Text("a cat") in cache.missing(CAPTIONS)


def test_millions_of_texts_go_through_memory_window_by_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run says before how much it will write; a text that comes again in a later window is there by then."""
    monkeypatch.setattr(text_cache, "WINDOW", 3)
    encoder = Encoder()
    caplog.set_level("INFO")
    assert make_cache(tmp_path).fill([*CAPTIONS, *CAPTIONS], encoder, batch_size=2) == 5
    assert sum(map(len, encoder.batches)) == 5
    (line,) = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(r"skip 2, 75 tokens: about \d+ texts are encoded and take [\d.]+ MB", line)
    assert make_cache(tmp_path).lacking(CAPTIONS) == (0, 6)
