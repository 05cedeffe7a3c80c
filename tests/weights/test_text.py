# SPDX-License-Identifier: Apache-2.0
"""Weighted captions, chunks of 75 tokens, and where tokenizers are found."""

import pytest
import torch

from library.errors import UserError
from library.weights.text import find_tokenizer, join_chunks, parse_weights, read_tokenizer
from tests.tiny import vocabulary, write_tokenizer

START, END = len(vocabulary()[0]) - 2, len(vocabulary()[0]) - 1
CAT, DOG = vocabulary()[0]["cat</w>"], vocabulary()[0]["dog</w>"]
EXCLAMATION = vocabulary()[0]["!"]


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("", []),
        ("plain", [("plain", 1)]),
        ("(a)", [("a", 1.1)]),
        ("((a))", [("a", 1.21)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("(a:1.5)", [("a", 1.5)]),
        ("(a: .5 )", [("a", 0.5)]),
        ("((a) b:2)", [("a", 2.2), (" b", 2)]),
        ("x (red:1.3), [cat]!", [("x ", 1), ("red", 1.3), (", ", 1), ("cat", 1 / 1.1), ("!", 1)]),
        (r"\(a\) \[b\] \\", [(r"(a) [b] " + "\\", 1)]),
        (r"a \c", [(r"a \c", 1)]),
        ("(a b", [("a b", 1.1)]),
        ("a) b", [("a) b", 1)]),
        ("a:1.2) b", [("a:1.2) b", 1)]),
        ("time 12:30", [("time 12:30", 1)]),
        ("(((a:1.3)", [("a", 1.3 * 1.1 * 1.1)]),
    ],
)
def test_weight_syntax(caption, expected):
    found = parse_weights(caption)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-12)


@pytest.fixture(scope="module", params=[1, 2])
def tokenizer(request, tmp_path_factory):
    """(tokenizer, its padding id): SD 1.x pads with the end token, SD 2.x with "!"."""
    padding = "!" if request.param == 2 else None
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), padding=padding)
    return read_tokenizer(folder), EXCLAMATION if request.param == 2 else END


def chunk(words, padding):
    return [START, *words, END, *[padding] * (75 - len(words))]


@pytest.mark.parametrize(
    "count, limit, chunks, truncated",
    [
        (0, 75, [0], ()),
        (3, 75, [3], ()),
        (75, 75, [75], ()),
        (76, 75, [75], (0,)),
        (0, 150, [0, 0], ()),
        (75, 150, [75, 0], ()),
        (76, 150, [75, 1], ()),
        (150, 150, [75, 75], ()),
        (151, 150, [75, 75], (0,)),
        (160, 225, [75, 75, 10], ()),
        (300, 225, [75, 75, 75], (0,)),
    ],
)
def test_chunks(tokenizer, count, limit, chunks, truncated):
    clip, padding = tokenizer
    tokens = clip([" ".join(["cat"] * count)], max_tokens=limit, weighted=False, name="clip")
    assert tokens.ids["clip"][0].tolist() == [chunk([CAT] * n, padding) for n in chunks]
    assert tokens.truncated == truncated and tokens.weights is None


def test_batch_and_order(tokenizer):
    clip, padding = tokenizer
    tokens = clip(["cat dog", "dog " * 80, "Cat"], max_tokens=75, weighted=False, name="clip")
    assert tokens.ids["clip"].shape == (3, 1, 77) and tokens.ids["clip"].dtype == torch.int64
    assert tokens.ids["clip"][0, 0].tolist() == chunk([CAT, DOG], padding)
    assert tokens.ids["clip"][2, 0].tolist() == chunk([CAT], padding)
    assert tokens.truncated == (1,)


def test_counts_are_of_the_uncut_caption(tokenizer):
    clip, _ = tokenizer
    captions = ["cat " * 90, "", "(cat:1.5)"]
    assert clip.count(captions, weighted=True) == [90, 0, 1]
    assert clip.count(captions, weighted=False)[:2] == [90, 0]


def test_weights_follow_their_tokens(tokenizer):
    clip, padding = tokenizer
    caption = "cat " * 74 + "(cat dog:1.5) [dog]"
    tokens = clip([caption, "cat"], max_tokens=150, weighted=True, name="clip")
    expected = [chunk([CAT] * 75, padding), chunk([DOG, DOG], padding)]
    assert tokens.ids["clip"][0].tolist() == expected
    weights = tokens.weights["clip"]
    assert weights.shape == (2, 2, 77) and torch.equal(weights[1], torch.ones(2, 77))
    assert weights[0, 0].tolist() == [1.0] * 75 + [1.5, 1.0]
    assert weights[0, 1, :4].tolist() == pytest.approx([1, 1.5, 1 / 1.1, 1], rel=1e-6)
    assert bool((weights[0, 1, 3:] == 1).all())


def test_joined_positions():
    """77, 152 and 227 positions: one start token, the inside of every chunk, one end token."""
    states = torch.arange(2 * 3 * 77).reshape(2, 3, 77, 1)
    joined = join_chunks(states)[..., 0]
    assert joined.shape == (2, 227)
    expected = [0, *range(1, 76), *range(77 + 1, 77 + 76), *range(154 + 1, 154 + 76), 154 + 76]
    assert joined[0].tolist() == expected
    assert joined[1].tolist() == [3 * 77 + i for i in expected]
    assert torch.equal(join_chunks(states[:, :1])[..., 0], states[:, 0, :, 0])


def test_tokenizer_of_a_single_file(tmp_path):
    model = tmp_path / "model.safetensors"
    model.touch()
    cache = tmp_path / "cache"
    write_tokenizer(cache / "openai_clip-vit-large-patch14")
    assert find_tokenizer(model, version=1, cache=str(cache)).padding == END
    # the vocabularies are equal: SD 2.x uses this one too, with its own padding
    assert find_tokenizer(model, version=2, cache=str(cache)).padding == EXCLAMATION
    write_tokenizer(tmp_path / "tokenizer")
    assert find_tokenizer(model, version=1, cache=None).folder == tmp_path / "tokenizer"


def test_without_a_tokenizer_one_line_says_what_goes_where(tmp_path):
    model = tmp_path / "model.safetensors"
    for cache, place in (("cache", "cache/openai_clip-vit-large-patch14"), (None, "tokenizer")):
        with pytest.raises(UserError) as caught:
            find_tokenizer(model, version=1, cache=str(tmp_path / cache) if cache else None)
        (problem,) = caught.value.problems
        assert "vocab.json and merges.txt of openai/clip-vit-large-patch14" in problem
        assert problem.endswith(f"into {tmp_path / place}")


def test_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not readable as a CLIP tokenizer"):
        read_tokenizer(tmp_path)


def test_fingerprint_tells_vocabulary_and_padding(tmp_path):
    own = read_tokenizer(write_tokenizer(tmp_path))
    assert own.fingerprint() == read_tokenizer(tmp_path).fingerprint()
    assert own.fingerprint() != read_tokenizer(tmp_path, padding="!").fingerprint()
