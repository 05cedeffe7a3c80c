# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of T5, Gemma 2 and CLIP: ids, masks, what is cut, and where they are found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.weights import tokenizers
from library.weights.tokenizers import (
    CLIP_G_ID,
    CLIP_G_PADDING,
    ChatTokenizer,
    TextTokenizer,
    clip_tokenizer,
    gemma2_tokenizer,
    mistral_tokenizer,
    qwen_tokenizer,
    t5_tokenizer,
    tokenizer_folders,
)
from tests.tiny import vocabulary, write_tokenizer
from tests.tiny_text import (
    gemma2_tokens,
    mistral_tokens,
    qwen_tokens,
    t5_pieces,
    write_gemma2_tokenizer,
    write_mistral_tokenizer,
    write_qwen_tokenizer,
    write_t5_tokenizer,
)

T5_IDS = {piece: i for i, (piece, _) in enumerate(t5_pieces())}
GEMMA_IDS = gemma2_tokens()
KINDS: dict[str, tuple[Any, Any]] = {
    "t5": (write_t5_tokenizer, t5_tokenizer),
    "gemma2": (write_gemma2_tokenizer, gemma2_tokenizer),
}
CACHED = {"t5": "google_t5-v1_1-xxl", "gemma2": "google_gemma-2-2b"}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def made(kind: str, folder: Path) -> TextTokenizer:
    write, read = KINDS[kind]
    return read([write(folder)], cache=None)


# ---- ids ------------------------------------------------------------------------------------------------------------


def expected_ids(kind: str, words: list[str]) -> list[int]:
    """T5 ends with </s>; Gemma begins with <bos>, and a space is a token of its own in the tiny vocabulary."""
    if kind == "t5":
        return [*(T5_IDS[f"▁{word}"] for word in words), T5_IDS["</s>"]]
    inner = [token for word in words for token in ("▁", word)][1:]
    return [GEMMA_IDS["<bos>"], *(GEMMA_IDS[token] for token in inner)]


@pytest.mark.parametrize("words", [[], ["cat"], ["cat", "dog", "red"]])
def test_ids_and_masks(kind: str, words: list[str], tmp_path: Path) -> None:
    tokenizer = made(kind, tmp_path)
    tokens = tokenizer([" ".join(words), "blue"], length=12, name="x")
    ids = expected_ids(kind, words)
    assert (tokens.ids["x"].shape, tokens.ids["x"].dtype) == ((2, 12), torch.int64)
    assert tokens.ids["x"][0].tolist() == ids + [0] * (12 - len(ids))
    assert tokens.lengths["x"][0] == len(ids)
    assert tokens.mask("x", 12, "cpu")[0].tolist() == [True] * len(ids) + [False] * (12 - len(ids))
    assert tokens.mask("x", 12, "cpu", more=1)[0].sum() == len(ids) + 1
    assert tokens.truncated == () and tokens.weights is None
    assert tokenizer.count([" ".join(words)]) == [len(ids) - 1]


@pytest.mark.parametrize("over", [0, 1, 30])
def test_captions_that_are_cut(kind: str, over: int, tmp_path: Path) -> None:
    """`limit` tokens fit; start and end stay when more are cut."""
    tokenizer = made(kind, tmp_path)
    words = tokenizer.limit(9) + over if kind == "t5" else (tokenizer.limit(9) + 1 + 2 * over) // 2
    assert tokenizer.limit(9) == 8
    caption = " ".join(["dog"] * words) + ("" if kind == "t5" else " ")
    (count,) = tokenizer.count([caption])
    assert (count > 8) == (over > 0)
    tokens = tokenizer(["cat", caption], length=9, name="x")
    assert tokens.truncated == ((1,) if over else ())
    assert tokens.ids["x"].shape == (2, 9) and tokens.lengths["x"][1] == 9
    first, last = tokens.ids["x"][1, 0].item(), tokens.ids["x"][1, -1].item()
    assert last == T5_IDS["</s>"] if kind == "t5" else first == GEMMA_IDS["<bos>"]


def test_padding_is_on_the_right_whatever_the_files_say(kind: str, tmp_path: Path) -> None:
    KINDS[kind][0](tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "padding_side": "left"}))
    tokens = KINDS[kind][1]([tmp_path], cache=None)(["cat"], length=5, name="x")
    assert tokens.lengths["x"] == (2,)


def test_fingerprint_tells_the_vocabulary_and_not_the_last_call(kind: str, tmp_path: Path) -> None:
    tokenizer = made(kind, tmp_path)
    before = tokenizer.fingerprint()
    tokenizer(["cat " * 30], length=7, name="x")
    assert tokenizer.fingerprint() == before == made(kind, tmp_path / "again").fingerprint()
    path = tmp_path / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"z"', '"Z"'), encoding="utf-8")
    assert KINDS[kind][1]([tmp_path], cache=None).fingerprint() != before


# ---- where they are found -------------------------------------------------------------------------------------------


def test_folders_come_before_the_cache(kind: str, tmp_path: Path) -> None:
    write, read = KINDS[kind]
    cached = write(tmp_path / "cache" / CACHED[kind])
    missing, own = tmp_path / "missing", tmp_path / "own"
    assert read([missing, own], cache=str(tmp_path / "cache")).folder == cached
    write(own)
    assert read([missing, own], cache=str(tmp_path / "cache")).folder == own


def test_without_one_a_line_says_which_files_go_where(kind: str, tmp_path: Path) -> None:
    read = KINDS[kind][1]
    repository = CACHED[kind].replace("_", "/", 1)
    for folders, cache, place in (
        ([tmp_path / "a", tmp_path / "b"], None, tmp_path / "a"),
        ([tmp_path / "a"], "c", Path("c") / CACHED[kind]),
        ([], None, f"<folder>/{CACHED[kind]} and give --tokenizer_cache_dir <folder>"),
    ):
        with pytest.raises(UserError) as caught:
            read(folders, cache=cache)
        (problem,) = caught.value.problems
        assert f"put tokenizer.json and tokenizer_config.json of {repository} into {place}" in problem


def test_one_of_the_hub_is_kept_in_the_cache_folder(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second repository has it in a subfolder."""
    from huggingface_hub import constants

    name, subfolder = {"t5": tokenizers.T5_HUB, "gemma2": tokenizers.GEMMA2_HUB}[kind][1]
    repository, revision = tmp_path / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
    KINDS[kind][0](repository / "snapshots" / revision / subfolder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    first = KINDS[kind][1]([], cache=str(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "hub")
    second = KINDS[kind][1]([], cache=str(tmp_path / "cache"))
    assert second.folder == tmp_path / "cache" / CACHED[kind]
    assert second.fingerprint() == first.fingerprint()


def test_damaged_files(kind: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=f"{tmp_path} is not readable as a "):
        KINDS[kind][1]([tmp_path], cache=None)


def test_a_sentencepiece_model_needs_its_library(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with nothing else counts for nothing where it cannot be read."""
    monkeypatch.setattr(tokenizers, "_has_sentencepiece", lambda: False)
    (tmp_path / {"t5": "spiece.model", "gemma2": "tokenizer.model"}[kind]).write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        KINDS[kind][1]([tmp_path], cache=None)
    (problem,) = caught.value.problems
    assert "tokenizer.json" in problem and "or install sentencepiece" in problem


def test_a_tokenizer_inside_a_gemma_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library that reads it, a folder is used, and without a folder one line says both ways out."""
    monkeypatch.setattr(tokenizers, "_has_sentencepiece", lambda: False)
    file = tmp_path / "gemma.safetensors"
    save_file({"text_encoders.gemma2_2b.spiece_model": torch.zeros(5, dtype=torch.uint8)}, file)
    with pytest.raises(UserError) as caught:
        gemma2_tokenizer([tmp_path / "tokenizer"], cache=None, file=file)
    (problem,) = caught.value.problems
    assert f"into {tmp_path / 'tokenizer'}, or install sentencepiece" in problem and str(file) in problem
    write_gemma2_tokenizer(tmp_path / "tokenizer")
    assert gemma2_tokenizer([tmp_path / "tokenizer"], cache=None, file=file).folder == tmp_path / "tokenizer"


def test_gemma_begins_with_bos_whatever_the_files_say(tmp_path: Path) -> None:
    write_gemma2_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "post_processor": None}))
    tokenizer = gemma2_tokenizer([tmp_path], cache=None)
    tokens = tokenizer(["cat", "dog " * 9], length=6, name="x")
    assert tokens.ids["x"][0].tolist() == [*expected_ids("gemma2", ["cat"]), 0, 0, 0, 0]
    assert tokens.ids["x"][1, 0] == GEMMA_IDS["<bos>"] and tokens.truncated == (1,) and tokenizer.limit(6) == 5


def test_clip_of_both_sizes(tmp_path: Path) -> None:
    end = len(vocabulary()[0]) - 1
    write_tokenizer(tmp_path / "own", padding="!")
    write_tokenizer(tmp_path / "cache" / CLIP_G_ID.replace("/", "_"))
    assert clip_tokenizer([tmp_path / "own"], cache=None).padding == 0
    cached = clip_tokenizer([], cache=str(tmp_path / "cache"), hub_id=CLIP_G_ID)
    assert cached.padding == end
    padded = clip_tokenizer([], cache=str(tmp_path / "cache"), hub_id=CLIP_G_ID, padding=CLIP_G_PADDING)
    assert padded.padding == 0 and padded(["cat"], max_tokens=75, weighted=False, name="x").ids["x"][0, 0, -1] == 0


def test_folder_names(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "t5.safetensors").touch()
    names = ("tokenizer_2", "tokenizer_t5")
    assert tokenizer_folders(tmp_path / "model", None, tmp_path / "t5.safetensors", names=names) == [
        tmp_path / "model" / "tokenizer_2",
        tmp_path / "model" / "tokenizer_t5",
        tmp_path / "model",
        tmp_path / "tokenizer_2",
        tmp_path / "tokenizer_t5",
        tmp_path / "tokenizer_2",
        tmp_path / "tokenizer_t5",
    ]


# ---- chats ----------------------------------------------------------------------------------------------------------

CHATS: dict[str, tuple[Any, Any, dict[str, int], tuple[str, str], str]] = {
    "qwen": (write_qwen_tokenizer, qwen_tokenizer, qwen_tokens(),
             ("<|im_start|>user\n", "<|im_end|>\n<think>\n\n</think>\n\n"), "<|endoftext|>"),
    "mistral": (write_mistral_tokenizer, mistral_tokenizer, mistral_tokens(),
                ("<s>[SYSTEM_PROMPT]red dog[/SYSTEM_PROMPT][INST]", "[/INST]"), "<pad>"),
}  # fmt: skip


@pytest.fixture(params=CHATS)
def chat(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ChatTokenizer, dict[str, int], str]:
    write, read, ids, (before, after), padding = CHATS[request.param]
    return read([write(tmp_path)], cache=None, before=before, after=after), ids, padding


def test_a_caption_in_a_chat(chat: tuple[ChatTokenizer, dict[str, int], str]) -> None:
    """Each mark is one token, nothing is added, and padding is on the side of the kind."""
    tokenizer, ids, padding = chat
    tokens = tokenizer(["cat", ""], length=40, name="x")
    for i, caption in enumerate(("cat", "")):
        text = tokenizer.tokenizer.decode(tokens.ids["x"][i])
        whole, pads = f"{tokenizer.before}{caption}{tokenizer.after}", padding * (40 - tokens.lengths["x"][i])
        assert text == (pads + whole if tokenizer.pads_left else whole + pads)
    assert tokens.truncated == () and tokens.ids["x"].dtype == torch.int64
    assert all((tokens.ids["x"][0] == ids[mark]).sum() == 1 for mark in tokenizers.CHAT_MARK.findall(tokenizer.before))
    assert tokens.lengths["x"][0] - tokens.lengths["x"][1] == 1 and tokenizer.count(["cat", "cat dog", ""])[::2] == [
        1,
        0,
    ]


def test_a_caption_that_is_cut_keeps_the_end_of_its_chat(chat: tuple[ChatTokenizer, dict[str, int], str]) -> None:
    tokenizer = chat[0]
    most = tokenizer.limit(60)
    caption = "cat" * most
    assert tokenizer.count([caption]) == [most]
    tokens = tokenizer([caption, caption + "dog"], length=60, name="x")
    assert tokens.truncated == (1,) and tokens.lengths["x"] == (60, 60)
    assert torch.equal(*tokens.ids["x"])
    assert tokenizer.tokenizer.decode(tokens.ids["x"][1]).endswith(f"cat{tokenizer.after}")


def test_fingerprints_of_chats(chat: tuple[ChatTokenizer, dict[str, int], str], tmp_path: Path) -> None:
    from dataclasses import replace

    tokenizer = chat[0]
    assert replace(tokenizer).fingerprint() == tokenizer.fingerprint()
    assert replace(tokenizer, before="").fingerprint() != tokenizer.fingerprint()


def test_a_tokenizer_that_does_not_know_a_chat(tmp_path: Path) -> None:
    write_qwen_tokenizer(tmp_path)
    with pytest.raises(UserError) as caught:
        qwen_tokenizer([tmp_path], cache=None, before="<|im_start|>", after="</tool_response><|box_end|>")
    assert caught.value.problems == [
        f"{tmp_path} is not usable as a Qwen tokenizer: it has no token </tool_response>, <|box_end|>"
    ]
    with pytest.raises(UserError, match=r"put tokenizer\.json and tokenizer_config\.json of Qwen/Qwen3-4B into"):
        qwen_tokenizer([tmp_path / "nothing"], cache=None)
