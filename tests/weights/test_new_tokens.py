# SPDX-License-Identifier: Apache-2.0
"""New words for CLIP: captions with them, the rows behind the table, and files of rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from library.errors import UserError
from library.families.sd.model import StableDiffusion
from library.families.sd.options import SDOptions
from library.weights.embedding_files import published_rows, read_rows
from library.weights.new_tokens import NewRows, NewWord, WordTokenizer, add_word, first_rows, word_pattern
from library.weights.text import ClipTokenizer, read_tokenizer
from tests.tiny import make_tiny_sd, vocabulary, write_tokenizer

ROWS = len(vocabulary()[0])
FIRST, SECOND = ROWS, ROWS + 1


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ClipTokenizer:
    return read_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion:
    folder = make_tiny_sd(tmp_path_factory.mktemp("model"))
    family = StableDiffusion(SDOptions(pretrained_model_name_or_path=str(folder), weighted_captions=True))
    family.check()
    return family


def with_word(plain: ClipTokenizer, word: str) -> WordTokenizer:
    return WordTokenizer(plain.folder, plain.tokenizer, plain.start, plain.end, plain.padding, word, (FIRST, SECOND))


# ---- captions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "caption", "parts"),
    [
        ("zap", "red zap, cat", ["red ", 1, ", cat"]),
        ("zap", "ZAP cat", [1, " cat"]),  # CLIP knows no case
        ("zap", "cat", ["cat"]),
        ("zap", "zap zap", [1, 1]),
        ("zap", "zap's zap-cat", [1, "'s ", 1, "-cat"]),
        ("zap", "zapped xzap zap1 zap_", ["zapped xzap zap1 ", 1, "_"]),
        ("<zap>", "a<zap>b", ["a", 1, "b"]),
        ("my zap", "a my zap", ["a ", 1]),
        ("zap.", "a zap. zapx", ["a ", 1, " zapx"]),
    ],
)
def test_word_stands_for_its_tokens(word: str, caption: str, parts: list[str | int], plain: ClipTokenizer) -> None:
    tokenizer = with_word(plain, word)
    ids = lambda text: plain.tokenizer(text, add_special_tokens=False).input_ids
    expected = [i for part in parts for i in ([FIRST, SECOND] if part == 1 else ids(part))]
    found = tokenizer([caption], max_tokens=75, weighted=False, name="clip").ids["clip"][0, 0]
    assert found[1 : 1 + len(expected)].tolist() == expected and found[1 + len(expected)] == plain.end
    assert tokenizer.count([caption], weighted=False) == [len(expected)]
    assert bool(word_pattern(word).search(caption)) == (1 in parts)


def test_weights_and_chunks(plain: ClipTokenizer) -> None:
    tokenizer = with_word(plain, "zap")
    tokens = tokenizer(["cat (zap:1.5) [zap]"], max_tokens=75, weighted=True, name="clip")
    assert tokens.weights is not None
    assert tokens.ids["clip"][0, 0, 2:6].tolist() == [FIRST, SECOND] * 2
    assert tokens.weights["clip"][0, 0, 1:7].tolist() == pytest.approx([1, 1.5, 1.5, 1 / 1.1, 1 / 1.1, 1])
    long = tokenizer(["cat " * 74 + "zap"], max_tokens=150, weighted=False, name="clip")
    assert (long.ids["clip"][0, 0, 75], long.ids["clip"][0, 1, 1]) == (FIRST, SECOND)
    assert not long.truncated


def test_fingerprint_knows_the_word(plain: ClipTokenizer) -> None:
    prints = {plain.fingerprint(), with_word(plain, "zap").fingerprint(), with_word(plain, "zip").fingerprint()}
    assert len(prints) == 3


def test_family_learns_a_word(family: StableDiffusion) -> None:
    before = family.tokenizers["clip"]
    (word,) = family.add_word("zap", 2, "cat dog").values()
    cat, dog = before.tokenizer("cat dog", add_special_tokens=False).input_ids
    assert word == NewWord((FIRST, SECOND), 32, (cat, dog))
    assert family.tokenize(["zap"]).ids["clip"][0, 0, 1:3].tolist() == [FIRST, SECOND]
    assert family.count_tokens(["zap cat"]) == [3]
    assert FIRST not in before(["zap"], max_tokens=75, weighted=False, name="clip").ids["clip"]


@pytest.mark.parametrize(("word", "other"), [("cat", "mycat"), ("SKS", "mySKS")])
def test_known_words_are_refused(word: str, other: str, family: StableDiffusion) -> None:
    with pytest.raises(UserError, match=f"--token_string {word}: .* already; take one that it lacks, such as {other}"):
        family.add_word(word, 1, None)


def test_start_without_a_word_is_refused(family: StableDiffusion) -> None:
    with pytest.raises(UserError, match="--init_word ' ': the tokenizer finds no word in it"):
        add_word(family.tokenizers["clip"], family.part("clip"), "zip", 1, " ")


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_behind_the_table(dtype: torch.dtype) -> None:
    """Against a table with the rows in it: states, and the gradient that the rows get."""
    table = nn.Embedding(5, 4, dtype=dtype).requires_grad_(False)
    before = table.weight.clone()
    rows = NewRows(table, torch.randn(2, 4))
    whole = torch.cat([before.float(), rows.weight.detach()]).requires_grad_()
    ids = torch.tensor([[0, 5, 4], [6, 6, 5]])
    weights = torch.randn(2, 3, 4)
    states = table(ids)
    expected = nn.functional.embedding(ids, whole)
    assert states.dtype == dtype
    torch.testing.assert_close(states, expected.to(dtype), rtol=0, atol=0)
    (states.float() * weights.to(dtype)).sum().backward()
    (expected * weights.to(dtype)).sum().backward()
    assert rows.weight.grad is not None and whole.grad is not None and table.weight.grad is None
    torch.testing.assert_close(rows.weight.grad, whole.grad[5:])
    assert torch.equal(table.weight, before) and list(table.state_dict()) == ["weight"]


def test_first_rows() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(500, 4, dtype=torch.float16)
    with torch.no_grad():
        table.weight *= 0.1
        table.weight[:, 2] += 5
    assert torch.equal(first_rows(table, NewWord((500, 501, 502), 4, (7, 3))), table.weight[[7, 3, 7]].float())
    drawn = first_rows(table, NewWord(tuple(range(500, 700)), 4))
    assert drawn.dtype == torch.float32 and drawn.shape == (200, 4)
    assert drawn.mean(0).tolist() == pytest.approx([0, 0, 5, 0], abs=0.05)
    assert drawn.std(0).tolist() == pytest.approx([0.1] * 4, rel=0.2)


# ---- files ----------------------------------------------------------------------------------------------------------

ONE = {"clip": NewWord((9, 10), 3)}
TWO = {"clip_l": NewWord((9, 10), 3), "clip_g": NewWord((9, 10), 5)}
VALUES = torch.arange(6.0).reshape(2, 3)


def a1111(path: Path) -> None:
    table = {"string_to_token": {"*": 265}, "string_to_param": {"*": VALUES}, "name": "zap", "step": 3}
    torch.save({**table, "sd_checkpoint": None, "sd_checkpoint_name": None}, path)


def with_parameters(path: Path) -> None:
    parameters = nn.ParameterDict({"*": nn.Parameter(VALUES)})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}, path)


FILES = {
    "a1111.pt": a1111,
    "first.pt": with_parameters,
    "alone.pt": lambda path: torch.save(VALUES, path),
    "learned_embeds.bin": lambda path: torch.save({"<zap>": VALUES.half()}, path),
    "ours.ckpt": lambda path: torch.save({"emb_params": VALUES}, path),
    "ours.safetensors": lambda path: save_file({"emb_params": VALUES.bfloat16()}, path),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_programs(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path / name)
    (found,) = read_rows(tmp_path / name, ONE).values()
    assert torch.equal(found, VALUES) and found.dtype == torch.float32 and not found.requires_grad


def test_one_vector_may_lie_flat(tmp_path: Path) -> None:
    torch.save({"<zap>": VALUES[0]}, tmp_path / "x.bin")
    assert torch.equal(read_rows(tmp_path / "x.bin", {"clip": NewWord((9,), 3)})["clip"], VALUES[:1])


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_two_encoders(ending: str, tmp_path: Path) -> None:
    rows = {"clip_l": VALUES, "clip_g": torch.arange(10.0).reshape(2, 5)}
    path = tmp_path / f"x.{ending}"
    (save_file if ending == "safetensors" else torch.save)(published_rows(rows), path)
    found = read_rows(path, TWO)
    assert found.keys() == rows.keys() and all(torch.equal(found[name], rows[name]) for name in rows)
    assert published_rows({"clip": VALUES}).keys() == {"emb_params"}


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code of the file was run",)


def test_no_code_of_a_file_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"string_to_param": {"*": VALUES}, "name": Code()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="is refused: it wants to run code"):
        read_rows(tmp_path / "x.pt", ONE)
    assert capsys.readouterr().out == ""


def test_tensors_that_are_no_rows(tmp_path: Path) -> None:
    save_file({"emb_params": torch.zeros(2, 3, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="emb_params is no list of vectors; this is no textual inversion file"):
        read_rows(tmp_path / "x.safetensors", ONE)
