# SPDX-License-Identifier: Apache-2.0
"""Weights from strangers: damaged and hostile files end in one line; compressed ones are read right."""

from __future__ import annotations

import json
import math
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from library.errors import UserError
from library.weights.embedding_files import read_rows
from library.weights.loading import part_file, read_json
from library.weights.new_tokens import NewWord
from library.weights.weight_files import open_weights

TENSORS = {f"model.layer.{i}.{kind}": torch.randn(4, 6) for i in range(6) for kind in ("weight", "bias")}


def line(path: Path) -> str:
    """The one line that opening the file gives."""
    with pytest.raises(UserError) as caught:
        open_weights(path)
    (problem,) = caught.value.problems
    assert str(path.parent) in problem and problem.isprintable() and len(problem) < 1000
    return problem


# ---- headers --------------------------------------------------------------------------------------------------------

ONE = '"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
TWO = '"y": {"dtype": "F32", "shape": [2], "data_offsets": [%d, %d]}'


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ('{"a":' + "[" * 200_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"x": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}', "Infinity"),
        ('{"x": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', "NaN"),
        (f"{{{ONE}, {ONE}}}", "several times: x"),
        (f"{{{ONE}, {TWO % (4, 12)}}}", "y lies over x"),
        (f"{{{ONE}, {TWO % (0, 8)}}}", "lies over"),
        ('{"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}', "its header says"),
        ('{"x": {"dtype": "F32", "shape": [true, 2], "data_offsets": [0, 8]}}', "its header says"),
        ('{"x": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}', "its header says"),
        ('{"x": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}', "its header says"),
        ('{"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}', "has -8 bytes"),
        ('{"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}', "its header says"),
        ('{"x": {"dtype": "F32", "shape": [2' + f",{10**17}" * 400 + '], "data_offsets": [0, 8]}}', "bytes"),
        ('{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1' + "0" * 4200 + "]}}", "its header says"),
        ('{"x": {"dtype": "F32", "shape": [1%s], "data_offsets": [0, 8]}}' % ("0" * 5000), "not readable"),
        ('{"x": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}', "its header says"),
        ('{"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}', "x is stored as 'F4'"),
        ('{"x": [1, 2, 3]}', "its header says"),
        ('{"x": 5}', "its header says"),
        ('{"__metadata__": [1]}', "__metadata__"),
        ('{"__metadata__": {"a": 1}}', "__metadata__"),
        ('{"a\\nb": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "is called"),
        ('{"a\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "is called"),
        ('{"x": {"dtype": "F32", "shape": [2], "data_offsets": [1000000000000, 1000000000008]}}', "cut short"),
    ],
    ids=range(25),
)
def test_headers(tmp_path: Path, header: str, words: str) -> None:
    path, text = tmp_path / "m.safetensors", header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    assert words in line(path)


@pytest.mark.parametrize(
    "content",
    [
        [], {}, 5, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 5}},
        {"weight_map": {"a": None}}, {"weight_map": {"a": ["m"]}}, {"weight_map": {"a": "../m.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}}, {"weight_map": {"a": "x/../m.safetensors"}}, {"weight_map": {"a": ""}},
        {"weight_map": {"a": "m.safetensors\n"}}, {"weight_map": {"a": "."}}, {"weight_map": {"a": "m\0.safetensors"}},
        {"weight_map": {"b": "m.safetensors"}}, {"weight_map": {"a": "model.safetensors.index.json"}},
    ],
    ids=range(18),
)  # fmt: skip
def test_indexes(tmp_path: Path, content: Any) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert str(tmp_path) in line(path)
    path.write_bytes(b"[" * 200_000)
    assert "index" in line(path)


def test_parts_of_two_models(tmp_path: Path) -> None:
    """A name in two parts is an error; what an index leaves out is in the model all the same."""
    for index in (1, 2):
        save_file({"a": torch.ones(2)}, tmp_path / f"m-0000{index}-of-00002.safetensors")
    assert "a is in both" in line(tmp_path / "m-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2), "c": torch.ones(3)}, tmp_path / "m-00002-of-00002.safetensors")
    places = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    assert sorted(part_file(tmp_path).shapes) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "text", [b"[" * 200_000, b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff\xfe", b"[]", b'{"a": 1' + b"0" * 5000 + b"}"]
)
def test_configurations(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=str(path)) as caught:
        read_json(path)
    assert len(caught.value.problems) == 1 and len(str(caught.value)) < 1000


# ---- pickles --------------------------------------------------------------------------------------------------------


def itself() -> dict[str, Any]:
    table: dict[str, Any] = {"a": torch.ones(2)}
    table["state_dict"] = table
    return table


def nested(depth: int) -> dict[str, Any]:
    table: dict[str, Any] = {"a": torch.ones(2)}
    for _ in range(depth):
        table = {"state_dict": table}
    return table


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": torch.ones(3, 3).to_sparse()}, "a is a tensor of another kind (sparse_coo)"),
        ({"state_dict": {"a": torch.ones(3, 3).to_sparse_csr()}}, "sparse_csr"),
        ({"a": torch.ones(3, 3, device="meta")}, "meta device"),
        ({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, "qint8"),
        ({"a": torch.ones(1).expand(1000, 1000, 1000)}, "a says that it is larger"),
        ({"a\nb": torch.ones(1)}, "a tensor is called"),
        (nested(500), "no named weights"),
    ],
    ids=["coo", "csr", "meta", "quantised", "expanded", "name", "deep"],
)
def test_tensors_that_are_no_weights(tmp_path: Path, content: Any, words: str, new_format: bool) -> None:
    path = tmp_path / "m.ckpt"
    try:
        torch.save(content, path, _use_new_zipfile_serialization=new_format)
    except (RuntimeError, NotImplementedError):
        return  # torch writes no such tensor in that format
    assert words in line(path)


def test_a_table_that_contains_itself(tmp_path: Path) -> None:
    """Endless otherwise: below its last level it is what it is."""
    torch.save(itself(), tmp_path / "m.ckpt")
    assert [*open_weights(tmp_path / "m.ckpt").shapes] == ["a"]
    torch.save(nested(3), tmp_path / "n.ckpt")
    assert [*open_weights(tmp_path / "n.ckpt").shapes] == ["a"]


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_of_another_program(tmp_path: Path, kind: int) -> None:
    """Unpacked and packed again. Only records that are stored as they are can be mapped; the values are the same."""
    torch.save({"state_dict": TENSORS | {"half": torch.ones(3).half()}}, tmp_path / "m.ckpt")
    with zipfile.ZipFile(tmp_path / "m.ckpt") as old, zipfile.ZipFile(tmp_path / "n.ckpt", "w", kind) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    file = open_weights(tmp_path / "n.ckpt")
    assert all(torch.equal(file.tensor(name), tensor) for name, tensor in TENSORS.items())
    assert torch.equal(file.tensor("half", torch.float32), torch.ones(3))


def test_one_record_that_is_compressed(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "m.ckpt")
    with zipfile.ZipFile(tmp_path / "m.ckpt") as old, zipfile.ZipFile(tmp_path / "n.ckpt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED if name.endswith("data/3") else zipfile.ZIP_STORED)
    file = open_weights(tmp_path / "n.ckpt")
    assert all(torch.equal(file.tensor(name), tensor) for name, tensor in TENSORS.items())


# ---- damaged at random ----------------------------------------------------------------------------------------------

CASES = 200


def damaged(raw: bytes, draw: random.Random) -> bytes:
    """Bits, bytes and stretches changed, put in, left out, or the end cut off; half of it where the tables are."""
    content = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 5, 30))):
        place = draw.randrange(min(len(content), draw.choice((1200, len(content) + 1))) + 1) if content else 0
        match draw.randrange(5):
            case 0 if place < len(content):
                content[place] ^= 1 << draw.randrange(8)
            case 1 if place < len(content):
                content[place] = draw.randrange(256)
            case 2:
                content[place:place] = draw.randbytes(draw.randrange(1, 9))
            case 3:
                del content[place : place + draw.randrange(1, 30)]
            case 4 if draw.random() < 0.1:
                del content[place:]
    return bytes(content)


@pytest.mark.parametrize("kind", [".safetensors", ".ckpt", ".pt"])
def test_damaged_files_end_in_one_line(tmp_path: Path, kind: str) -> None:
    whole, path, draw = tmp_path / f"whole{kind}", tmp_path / f"m{kind}", random.Random(11)
    if kind == ".safetensors":
        save_file(TENSORS, whole, {"format": "pt"})
    else:
        torch.save({"state_dict": TENSORS, "epoch": 3}, whole, _use_new_zipfile_serialization=kind == ".ckpt")
    raw, refused = whole.read_bytes(), 0
    for _ in range(CASES):
        path.write_bytes(damaged(raw, draw))
        try:
            file = open_weights(path)
            for name, shape in file.shapes.items():
                assert math.prod(shape) < 1e6 and file.tensor(name, torch.float16).shape == shape
        except UserError as error:
            (problem,) = error.problems
            assert str(path) in problem and problem.isprintable() and len(problem) < 1000
            refused += 1
    assert CASES // 2 < refused < CASES


def test_damaged_files_of_words_end_in_one_line(tmp_path: Path) -> None:
    """Files of textual inversion have their own tables: A1111's, and the first ones of all."""
    whole, path, draw = tmp_path / "whole.pt", tmp_path / "word.pt", random.Random(12)
    table = nn.ParameterDict({"*": nn.Parameter(torch.randn(2, 8))})
    torch.save({"string_to_param": table, "name": "word"}, whole)
    word = {"clip": NewWord((500, 501), 8)}
    assert torch.equal(read_rows(whole, word)["clip"], table["*"])
    raw, refused = whole.read_bytes(), 0
    for _ in range(CASES):
        path.write_bytes(damaged(raw, draw))
        try:
            assert read_rows(path, word)["clip"].shape == (2, 8)
        except UserError as error:
            assert str(path) in error.problems[0] and all(p.isprintable() for p in error.problems)
            refused += 1
    assert CASES // 2 < refused < CASES
    for content in ({"string_to_param": 5}, {"string_to_param": [1]}, {"a": torch.ones(2, 8).to_sparse()}, 5):
        torch.save(content, path)
        with pytest.raises(UserError, match=str(path)):
            read_rows(path, word)
