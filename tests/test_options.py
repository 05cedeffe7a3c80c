# SPDX-License-Identifier: Apache-2.0
"""library/options.py and library/cli.py: values, where they come from, all mistakes at once, and how a run ends."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from library import cli
from library.errors import StopTraining, UserError, first_names, unknown
from library.families.registry import FAMILIES
from library.io.atomic import SaveError
from library.log import get_logger, setup_logging
from library.options import (
    ConfigFileOptions,
    Resolved,
    at_least,
    between,
    changed_values,
    convert,
    dump_toml,
    int_or_fraction,
    markdown_rows,
    option,
    positive,
    read_toml,
    resolve,
    specs,
)
from library.trainers.options import NetworkTrainerOptions
from tests.script_runner import ROOT, run_script


@dataclass(frozen=True)
class Rates:
    """How fast and how long.

    More of it.
    """

    learning_rate: float = option(1e-4, help="How fast.", check=positive)
    warmup: int | float = option(0, help="How long.", parse=int_or_fraction, check=at_least(0))
    rates: tuple[float, ...] | None = option(None, help="One per part.", check=between(0, 1))
    dim: int | None = option(None, help="Rank.", check=at_least(1), zero_is_unset=True)

    def problems(self) -> Iterator[str]:
        if self.dim and self.dim > 8:
            yield "--dim is large"


@dataclass(frozen=True)
class Names:
    name: str | None = option(None, help="A <name> | or two.")
    kind: str = option("plain", help="Which kind.", choices=("plain", "fancy"))
    args: tuple[str, ...] = option((), help="More.")
    fast: bool = option(False, help="Hurry.")
    gone: bool = option(False, help="Was needed.", answer="nothing to do now")
    token: str | None = option(None, help="Key.", secret=True)


@dataclass(frozen=True)
class Method:
    config: ConfigFileOptions
    rates: Rates
    names: Names

    def problems(self) -> Iterator[str]:
        if self.names.fast and self.rates.dim:
            yield "--fast and --dim do not go together"


def read(*argv: str) -> Resolved:
    return resolve(Method, {}, argv, prog="test")


def problems(*argv: str) -> list[str]:
    with pytest.raises(UserError) as told:
        read(*argv)
    return told.value.problems


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("3", int, 3),
        (3.0, int, 3),
        ("1e3", int, 1000),
        ("-7", int, -7),
        (str(2**63 + 1), int, 2**63 + 1),
        ("1e-4", float, 1e-4),
        (1, float, 1.0),
        ("None", int | None, None),
        ("none", str | None, None),
        ("5", int | None, 5),
        (5, str, "5"),
        (True, bool, True),
        ("False", bool, False),
        ("1", bool, True),
        (0, bool, False),
        ("YES", bool, True),
        (["1", 2], tuple[int, ...], (1, 2)),
        (0.5, tuple[float, ...] | None, (0.5,)),
        ([], tuple[float, ...] | None, ()),
    ],
)
def test_convert(value: Any, hint: Any, expected: Any) -> None:
    found = convert(value, hint)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "told"),
    [
        ("x", int, "expects a whole number, got 'x'"),
        ("1.5", int, "expects a whole number, got 1.5"),
        (True, int, "expects a whole number, got True"),
        ([1], int, r"expects a whole number, got \[1\]"),
        ("x", float, "expects a number, got 'x'"),
        ("maybe", bool, "expects true or false, got 'maybe'"),
        (2, bool, "expects true or false, got '2'"),
        (True, str, "expects a text, got True"),
        (["a"], str, "expects a text"),
        (["a"], tuple[int, ...], "expects a whole number, got 'a'"),
    ],
)
def test_convert_refuses(value: Any, hint: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        convert(value, hint)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("10", 10), ("0.1", 0.1), ("10%", 0.1), (" 5 % ", 0.05), (0, 0), ("1", 1), (1.0, 1), ("2.5", 2.5), ("100%", 1.0)],
)
def test_int_or_fraction(value: Any, expected: Any) -> None:
    found = int_or_fraction(value)
    assert found == expected and type(found) is type(expected)


def test_int_or_fraction_refuses() -> None:
    with pytest.raises(ValueError, match="expects steps, a fraction below 1 or a percentage, got 'soon'"):
        int_or_fraction("soon")


def test_checks_are_for_every_item() -> None:
    assert read("--rates", "0", "1").options.rates.rates == (0.0, 1.0)
    assert problems("--rates", "0", "2") == ["--rates must be between 0 and 1, got 2.0"]


# ---- where values come from -----------------------------------------------------------------------------------------


def test_default_then_file_then_command_line(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('learning_rate = 1\n[heading]\nname = "file"\nfast = true\nargs = ["a", "b"]\n')
    resolved = read("--config_file", str(config), "--name", "line")
    options = resolved.options
    assert (options.rates.learning_rate, options.names.kind) == (1.0, "plain")
    assert (options.names.name, options.names.fast, options.names.args) == ("line", True, ("a", "b"))
    assert resolved.given == {
        "config_file": "command line", "name": "command line",
        "learning_rate": str(config), "fast": str(config), "args": str(config),
    }  # fmt: skip


def test_a_switch_of_the_file_can_be_switched_off(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("fast = true\nargs = ['a']\nname = 'x'\n")
    off = read("--config_file", str(config), "--fast", "false", "--args", "--name", "").options
    assert (off.names.fast, off.names.args, off.names.name) == (False, (), None)
    assert read("--fast").options.names.fast is True
    assert read("--config_file", str(tmp_path / "c"), "--fast").options.names.args == ("a",)  # .toml may be left out


def test_empty_and_zero_are_not_given() -> None:
    options = read("--name", "", "--dim", "0", "--learning_rate", "").options
    assert (options.names.name, options.rates.dim, options.rates.learning_rate) == (None, None, 1e-4)


def test_values_that_begin_with_a_dash() -> None:
    assert problems("--learning_rate", "-0.5") == ["--learning_rate must be greater than 0, got -0.5"]
    assert read("--name=--odd").options.names.name == "--odd"


def test_no_prefix_guessing() -> None:
    assert problems("--learn", "1") == ["Unknown option --learn. See --help for all options."]
    for name in ("pipeline_parallel_degree", "pipeline-stages"):
        (line,) = problems(f"--{name}", "2")
        assert line.startswith(f"Unknown option --{name}: models are not split into stages") and "many_cards.md" in line
    assert problems("--learning_rat", "1") == ["Unknown option --learning_rat. Did you mean --learning_rate?"]


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("dimm = 1\nwarmup = 'soon'\nepoch = 0\n")
    assert problems("--config_file", str(config), "--kind", "fency", "--dim", "-1", "--fsat", "now", "stray") == [
        "Unknown option --fsat. Did you mean --fast?",
        f"{config}: unknown key 'dimm'. Did you mean 'dim'?",
        f"{config}: warmup expects steps, a fraction below 1 or a percentage, got 'soon'",
        "--kind 'fency' is not one of plain, fancy. Did you mean 'fancy'?",
        "--dim must be at least 1, got -1",
    ]


def test_words_that_belong_to_nothing() -> None:
    assert problems("stray", "--fsat", "now", "--name", "a", "b") == [
        "Unknown option --fsat. Did you mean --fast?",
        "'stray' belongs to no option: values with spaces need quotes, and options start with --",
        "'b' belongs to no option: values with spaces need quotes, and options start with --",
    ]


def test_combinations_are_asked_when_all_values_are_good() -> None:
    assert problems("--dim", "9", "--fast") == ["--dim is large", "--fast and --dim do not go together"]
    assert problems("--dim", "9", "--kind", "x") == ["--kind 'x' is not one of plain, fancy"]


def test_answers(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("gone = true\nepoch = 3\nt5xxl = 'file'\nclip_l = ''\n")
    assert read("--config_file", str(config)).answers == (
        "--gone: nothing to do now",
        f"{config}: not used by this script (keys of the GUI or of other scripts): epoch, t5xxl",
    )
    assert read("--gone", "false").answers == ()


# ---- files of options -----------------------------------------------------------------------------------------------

TEXTS = ["C:\\Users\\xavier\\new", "\\\\server\\x41", 'it\'s "q"', "a\nb\tc", "\x01\x7f\u0080", "héllo 日本 🚀", ""]


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    numbers = (1e-5, 1e16, -0.5, 1e-300, 0.1 + 0.2)
    texts = (*TEXTS, ".".join("a" * 100))
    options = Method(ConfigFileOptions(), Rates(rates=numbers, dim=2**63), Names(args=texts, fast=True))
    path = tmp_path / "c.toml"
    path.write_text(dump_toml(options), encoding="utf-8", newline="\n")
    values = {"args": list(texts), "rates": list(numbers), "dim": 2**63, "fast": True}
    assert read_toml(path, "--config_file") == values


def test_dump_holds_what_differs_but_no_secret(tmp_path: Path) -> None:
    given = [
        "--learning_rate",
        "1e-5",
        "--args",
        "a=1",
        TEXTS[0],
        "--fast",
        "--token",
        "hf_secret",
        "--rates",
        "0",
        "0.5",
    ]
    options = read(*given).options
    path = tmp_path / "c.toml"
    path.write_text(dump_toml(options), encoding="utf-8")
    assert read_toml(path, "x") == {"learning_rate": 1e-5, "rates": [0.0, 0.5], "args": ["a=1", TEXTS[0]], "fast": True}
    again = read("--config_file", str(path)).options
    assert (again.rates, again.names.args, again.names.token) == (options.rates, options.names.args, None)
    assert "token" not in changed_values(options, all_values=True)
    assert changed_values(options, all_values=True)["kind"] == "plain"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a = 1\nb = \n", "line 2 is not valid TOML: Invalid value"),
        ("a = [1, 2\n\n", "line 1 is not valid TOML: "),
        ("a = 1\na = 2\n", "line 2 is not valid TOML: "),
        ("x", "line 1 is not valid TOML: "),
    ],
)
def test_toml_mistakes_name_file_and_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_toml(path, "--config_file")
    assert str(error.value).startswith(f"--config_file: {path}, {told}") and "(at " not in str(error.value)


def test_toml_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xef\xbb\xbfa = 1\r\n")
    assert read_toml(path, "x") == {"a": 1}
    with pytest.raises(UserError, match="is a folder"):
        read_toml(tmp_path, "x")


def test_output_config(tmp_path: Path) -> None:
    path = tmp_path / "new" / "c.toml"
    words = [
        "--pretrained_model_name_or_path",
        "m",
        "--output_dir",
        "o",
        "--network_dim",
        "4",
        "--huggingface_token",
        "hf_x",
    ]
    ended = run_script(*words, "--output_config", "--config_file", str(path.with_suffix("")), fresh=True)
    assert ended.code == 0, ended.text
    assert read_toml(path, "x") == {"pretrained_model_name_or_path": "m", "output_dir": "o", "network_dim": 4}
    before = path.read_bytes()
    ended = run_script(*words, "--seed", "3", "--output_config", "--config_file", str(path))
    assert (ended.code, ended.errors) == (2, [f"--output_config: {path} exists; give --config_file another name"])
    assert path.read_bytes() == before
    assert run_script(*words, "--output_config").errors == [
        "--output_config: give the file to write with --config_file"
    ]


# ---- the options of the script --------------------------------------------------------------------------------------


def test_each_option_has_one_home_and_a_sentence() -> None:
    found = specs(cli.option_groups("network", "sd"))
    for name, spec in found.items():
        assert spec.info.help.endswith((".", ")")) and spec.info.help[0].isupper(), name
        if spec.default is not None and not spec.info.answer:
            assert spec.read(spec.default) == spec.default, name
        if spec.default is None:
            assert type(None) in getattr(spec.hint, "__args__", ()), name


def test_a_name_in_two_groups_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="learning_rate is in both a and b"):
        specs({"a": Rates, "b": Rates})


def test_markdown() -> None:
    lines = list(markdown_rows({"rates": Rates, "names": Names}))
    assert lines[0] == "\n### rates\n\nHow fast and how long.\n\n| option | default | meaning |\n|---|---|---|"
    assert "| `--learning_rate` | `0.0001` | How fast. |" in lines
    assert "| `--name` |  | A &lt;name> \\| or two. |" in lines
    assert "| `--kind` | `plain` | Which kind. One of `plain`, `fancy`. |" in lines
    assert "| `--gone` |  | Was needed. *Has no effect: nothing to do now.* |" in lines


def test_secrets_are_never_shown(tmp_path: Path) -> None:
    words = ["--pretrained_model_name_or_path", "m", "--output_dir", "o", "--dataset_config", "d"]
    secret = ["--huggingface_token", "hf_secret", "--wandb_api_key", "wb_secret"]
    given = resolve(NetworkTrainerOptions, FAMILIES["sd"].option_groups, [*words, *secret], prog="t").options
    for text in (dump_toml(given), str(changed_values(given, all_values=True)), str(given), repr(given)):
        assert "secret" not in text
    assert given.hub.huggingface_token == "hf_secret"


# ---- how a run ends -------------------------------------------------------------------------------------------------


def ending(error: BaseException) -> int:
    def fail() -> int:
        raise error

    return cli.guarded(fail)


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.guarded(lambda: 0) == 0
    assert ending(UserError(["one", "two"])) == 2
    assert capsys.readouterr().err == "error: one\nerror: two\n"
    assert ending(SaveError("/out: no room left")) == 2
    assert capsys.readouterr().err == "error: /out: no room left\n"
    assert ending(StopTraining("the loss of step 3 is not finite")) == 4
    assert capsys.readouterr().err == "stopped: the loss of step 3 is not finite\n"
    assert ending(KeyboardInterrupt()) == 3
    assert "nothing was written" in capsys.readouterr().err
    assert ending(KeyboardInterrupt("what was encoded stays in the cache")) == 3
    assert capsys.readouterr().err == "stopped before training began: what was encoded stays in the cache\n"


def test_what_the_machine_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(OSError(errno.ENOSPC, "No space left on device", "/out/x")) == 2
    assert capsys.readouterr().err == "error: /out/x: No space left on device\n"
    assert ending(ConnectionError("the hub is away\nmore")) == 2
    assert capsys.readouterr().err == "error: the hub is away\n"
    assert ending(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More")) == 2
    assert capsys.readouterr().err.startswith("error: CUDA out of memory: give --vram_budget with ")
    assert ending(MemoryError()) == 2
    assert capsys.readouterr().err.startswith("error: out of main memory")
    with pytest.raises(RuntimeError):  # a mistake of ours keeps its traceback
        ending(RuntimeError("unexpected"))


def test_the_traceback_of_a_refusal_is_there_for_who_looks(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(level="DEBUG", file=None, simple=True)
    try:
        assert ending(OSError(errno.EIO, "Input/output error", "/x")) == 2
        assert "Traceback" in capsys.readouterr().err
    finally:
        logger = get_logger()
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


def test_log_file_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "none" / "log.txt"
    with pytest.raises(UserError) as told:
        setup_logging(level=None, file=str(file), simple=False)
    assert str(told.value) == f"--console_log_file: {file} cannot be written: No such file or directory"
    get_logger().propagate = True


def test_lines_are_few_and_each_is_one() -> None:
    many = [f"/d/k{i}.toml: unknown key 'k{i}'" for i in range(20000)]
    assert UserError(["first", *many, "last"]).lines() == [
        "first", *many[:9], "and 19991 more of this kind", "last",
    ]  # fmt: skip
    assert UserError(many[:10]).lines() == many[:10]
    several = [
        f"d.toml: {word} is wrong"
        for word in ["abc", "defghij", "klmnopq", "rst", "uvw", "xyz", "é", "ö", "ü", "ä", "ß", "ç"]
    ]
    assert UserError(several).lines() == [*several[:9], "d.toml: and 3 more mistakes"]
    assert UserError("a\nb\x1b[2J\u2028: \x00").lines() == [r"a\nb\x1b[2J\u2028: \x00"]
    (line,) = UserError("x" * 10**6).lines()
    assert len(line) < 2100 and line.endswith("(1000000 letters)")


def test_unknown_names_are_few_and_found_quickly() -> None:
    found = specs(cli.option_groups("network", "sd"))
    lines = problems(*(word for i in range(3000) for word in (f"--xq{i}", "1")))
    assert len(lines) == 10 and lines[-1] == "and 2991 more unknown options"
    line = unknown("c.toml", "zzzz", found)
    assert len(line) < 200 and "nearest: " in line
    assert len(unknown("c.toml", "z" * 10**6, found)) < 10**6 + 200


def test_config_files_of_other_kinds(tmp_path: Path) -> None:
    assert problems("--config_file", "my preset.json")[0].startswith(
        "--config_file: my preset.json is a preset of a graphical program, not a file of options: load it there"
    )
    config = tmp_path / "c.toml"
    config.write_text("[a]\ndim = 2\n[b]\ndim = 3\n")
    assert problems("--config_file", str(config)) == [f"{config}: dim stands there twice, under two headings"]
    config.write_text("".join(f"k{i} = 1\n" for i in range(5000)))
    assert len(problems("--config_file", str(config))) == 10


def test_what_is_no_text_and_paths_that_are_not_utf8() -> None:
    (line,) = problems("--name", "caf\udce9")
    assert line.startswith("--name is not valid text")
    where = specs(cli.option_groups("network", "sd"))
    assert where["output_dir"].read("/data/caf\udce9") == "/data/caf\udce9"
    for name, value in (("output_dir", "a\0b"), ("output_dir", "\ud800"), ("output_dir", "a" * 300)):
        with pytest.raises(ValueError, match=r"NUL|not valid text|too long"):
            where[name].read(value)
    for name in ("output_name", "training_comment", "caption_prefix", "metadata_title", "log_prefix"):
        with pytest.raises(ValueError, match="not valid text"):
            where[name].read("caf\udce9")


def test_a_path_that_toml_cannot_say_is_a_comment() -> None:
    words = ["--pretrained_model_name_or_path", "m", "--output_dir", "caf\udce9", "--train_data_dir", "d"]
    given = resolve(NetworkTrainerOptions, FAMILIES["sd"].option_groups, words, prog="t").options
    assert "\n# give this on the command line, it is not UTF-8 text: output_dir = " in dump_toml(given)


def test_lines_about_names() -> None:
    assert unknown("--x", "dmi", ["dim", "alpha"]) == "--x: unknown key 'dmi'. Did you mean 'dim'?"
    assert unknown("--x", "zzz", ["b", "a", "a"], kind="name") == "--x: unknown name 'zzz'. Known: a, b"
    assert first_names(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert first_names(["a"]) == "a"


def test_help_is_quick_because_it_reads_no_torch() -> None:
    code = (
        "import sys, runpy\nsys.argv = ['train_network.py', '--help']\n"
        "try: runpy.run_path('train_network.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'PIL', 'transformers', 'diffusers'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "--pretrained_model_name_or_path" in done.stdout and "Train a LoRA" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of that kind")
def test_configuration_on_a_full_disk_is_not_there(tmp_path: Path) -> None:
    """Whole or not at all, and one line."""
    path, output = tmp_path / "new" / "x.toml", tmp_path / "output"
    process = os.fork()
    if process == 0:
        import resource

        code = 1
        try:
            sys.stderr = output.open("w", encoding="utf-8", buffering=1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            code = cli.guarded(lambda: bool(cli.write_output_config("a = 1\n" * 1000, path)))
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 2
    assert list(path.parent.iterdir()) == []
    assert output.read_text(encoding="utf-8").startswith(f"error: {path.parent}: no room left for x.toml: ")
