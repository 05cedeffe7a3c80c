# SPDX-License-Identifier: Apache-2.0
"""Prompt files in their three forms, and every mistake in them at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.errors import UserError
from library.sampling.options import SampleOptions
from library.sampling.prompts import Prompt, given_fields, load_prompts

FULL_LINE = (
    "a cat, 2girls --n bad, worse --w 640 --h 448 --d 7 --s 12 --l 6.5 --g 3.5 --ss euler_a --ctr 0.25 --rcfg 1 --fs 3"
)
FULL = Prompt("a cat, 2girls", 640, 448, 7, 12, 6.5, 3.5, "bad, worse", "euler_a", None, 0.25, 1.0, 3.0)


KNOWN = "--w --h --d --s --l --g --n --ss --cn --ctr --rcfg --fs --ref --il"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_prompts(path)
    return caught.value.problems


def test_txt(tmp_path: Path) -> None:
    text = f"# comment\n\n{FULL_LINE}\n  # indented comment\nwell--known - a -- b --W 64\n猫 ß\n"
    path = write(tmp_path / "p.txt", "\ufeff" + text)
    assert load_prompts(path) == (FULL, Prompt("well--known - a -- b", width=64), Prompt("猫 ß"))


def test_txt_of_an_unconditional_prompt(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path / "p.txt", "--w 64\n")) == (Prompt("", width=64),)


def test_toml(tmp_path: Path) -> None:
    text = """
        [prompt]
        width = 640
        height = 448
        sample_sampler = "ddim"
        scale = 7
        [[prompt.subset]]
        prompt = "one"
        [[prompt.subset]]
        prompt = "two"
        width = 320
        negative_prompt = "no"
    """
    shared = {"height": 448, "sample_sampler": "ddim", "scale": 7.0}
    assert load_prompts(write(tmp_path / "p.toml", text)) == (
        Prompt("one", width=640, **shared),
        Prompt("two", negative_prompt="no", width=320, **shared),
    )
    assert load_prompts(write(tmp_path / "q.toml", '[prompt]\nprompt = "x"\n')) == (Prompt("x"),)


def test_json(tmp_path: Path) -> None:
    values = {k: v for k, v in vars(FULL).items() if v is not None}
    path = write(tmp_path / "p.json", json.dumps([values, FULL_LINE, "plain"]))
    assert load_prompts(path) == (FULL, FULL, Prompt("plain"))


def test_all_mistakes_of_a_txt_file_come_at_once(tmp_path: Path) -> None:
    lines = [
        "good --w 64", "a --w many", "b --x 1", "c --s 0", "d --s 1001 --ss eulr_a", "e --n", "f --cn gone.png",
        "g --width 64", "h --w 64 --w 65", "i --d -1", "j --h 64.5", "k --w inf --l nan",
    ]  # fmt: skip
    path = write(tmp_path / "p.txt", "\n".join(lines))
    assert problems_of(path) == [
        f"{path}, line 2: width expects a whole number, got 'many'",
        f"{path}, line 3: unknown option --x. Known: {KNOWN}",
        f"{path}, line 4: sample_steps must be between 1 and 1000, got 0",
        f"{path}, line 5: sample_steps must be between 1 and 1000, got 1001",
        f"{path}, line 5: sample_sampler 'eulr_a' is not a sampler. Did you mean 'euler_a'?",
        f"{path}, line 6: --n needs a value",
        f"{path}, line 7: controlnet_image gone.png does not exist",
        f"{path}, line 8: unknown option --width. Did you mean --w?",
        f"{path}, line 9: --w is given twice",
        f"{path}, line 10: seed must be between 0 and {2**64 - 1}, got -1",
        f"{path}, line 11: height expects a whole number, got 64.5",
        f"{path}, line 12: width expects a whole number, got 'inf'",
        f"{path}, line 12: scale expects a number, got 'nan'",
    ]


def test_mistakes_in_tables(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.toml", '[prompt]\nwidht = 3\n[[prompt.subset]]\nprompt = "x"\n[[prompt.subset]]\nseed = "y"\n'
    )
    assert problems_of(path) == [
        f"{path}, prompt 1: unknown key 'widht'. Did you mean 'width'?",
        f"{path}, prompt 2: unknown key 'widht'. Did you mean 'width'?",
        f"{path}, prompt 2: seed expects a whole number, got 'y'",
    ]
    path = write(tmp_path / "p.json", json.dumps([{"width": 64}, 5, {"prompt": ["x"]}, "a --q 1"]))
    assert problems_of(path) == [
        f"{path}, prompt 1: the key prompt is missing",
        f"{path}, prompt 2: expects a text or a table, got 5",
        f"{path}, prompt 3: prompt expects a text, got ['x']",
        f"{path}, prompt 4: unknown option --q. Known: {KNOWN}",
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "# nothing\n\n", "holds no prompt"),
        ("a.json", "[]", "holds no prompt"),
        ("a.json", '[\n"x",\n', "line 3 is not valid JSON"),
        ("a.json", "{}", "expects a list"),
        ("a.toml", "[prompt\n", "line 1 is not valid TOML"),
        ("a.toml", "[promt]\n", "'promt' is not known"),
        ("a.toml", "", "[prompt] is missing"),
        ("a.toml", "[prompt]\nsubset = 3\n", "one [[prompt.subset]] per prompt"),
        ("a.yaml", "x", "is none of .txt, .toml, .json"),
    ],
)
def test_files_that_are_no_prompt_files(tmp_path: Path, name: str, content: str, expected: str) -> None:
    found = problems_of(write(tmp_path / name, content))
    assert len(found) == 1 and expected in found[0]


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "prompts.txt", "x")
    found = problems_of(tmp_path / "promts.txt")
    assert found == [
        f"--sample_prompts: {tmp_path / 'promts.txt'} does not exist. Did you mean {tmp_path / 'prompts.txt'}?"
    ]
    (tmp_path / "folder.txt").mkdir()
    assert "is a folder" in problems_of(tmp_path / "folder.txt")[0]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "is not UTF-8 text (byte 3)" in problems_of(tmp_path / "latin.txt")[0]


def test_given_fields() -> None:
    assert given_fields([Prompt("a"), Prompt("b", flow_shift=3.0)], ["guidance_scale", "flow_shift"]) == ["flow_shift"]


def test_options() -> None:
    assert SampleOptions().sample_sampler == "ddim" and not SampleOptions().wanted
    assert SampleOptions(sample_prompts="p.txt", sample_every_n_steps=5).wanted
    assert not SampleOptions(sample_prompts="p.txt", sample_every_n_steps=0, sample_every_n_epochs=-1).wanted
    assert list(SampleOptions(sample_prompts="p.txt", sample_at_first=True).problems()) == []
    assert list(SampleOptions(sample_every_n_steps=0).problems()) == []
    for name in ("sample_every_n_steps", "sample_at_first", "sample_every_n_epochs"):
        found = list(SampleOptions(**{name: 1}).problems())
        assert len(found) == 1 and found[0].startswith(f"--{name} needs --sample_prompts")


def test_references_may_be_several(tmp_path: Path) -> None:
    files = [tmp_path / "a.png", tmp_path / "b c.png"]
    for file in files:
        file.touch()
    text, table = tmp_path / "p.txt", tmp_path / "p.json"
    text.write_text(f"a cat --ref {files[0]} --w 64 --ref {files[1]}", encoding="utf-8")
    table.write_text(json.dumps([{"prompt": "a cat", "width": 64, "references": [str(f) for f in files]}]))
    expected = (str(files[0]), str(files[1]))
    assert [load_prompts(file)[0].references for file in (text, table)] == [expected, expected]
    text.write_text(f"a cat --ref {tmp_path / 'none.png'}", encoding="utf-8")
    with pytest.raises(UserError, match=r"references .*none\.png does not exist"):
        load_prompts(text)
