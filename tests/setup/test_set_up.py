# SPDX-License-Identifier: Apache-2.0
"""`start.py setup` on machines of all kinds: what the environment's pip is told, and what a person reads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from library.errors import UserError
from library.machine import Machine, System
from tests.setup.fakes import FakeEnvironment, FakeMachine, RealPip
from tools.setup import commands
from tools.setup.commands import take_torch_option
from tools.setup.environment import ROOT, RUN, TEST, index_answers, set_up
from tools.setup.torch_choice import choose_torch

INDEX = "https://download.pytorch.org/whl"
WINDOWS, LINUX = "Windows x86_64", "Linux x86_64"
RTX_3060, RTX_5090 = ("NVIDIA GeForce RTX 3060", "12288", "8.6"), ("NVIDIA GeForce RTX 5090", "32607", "12.0")
GTX_1080 = ("NVIDIA GeForce GTX 1080", "8192", "6.1")
EVERYTHING = ["cu130", "cu126", "cu132", "rocm7.2", "xpu", "cpu"]  # what pytorch.org's index has
WORKING = {"cu130": ["cuda", "cpu"], "cu126": ["cuda", "cpu"], "rocm7.2": ["cuda", "cpu"], "mps": ["mps", "cpu"]}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    return FakeMachine(tmp_path, monkeypatch)


def torch_commands(environment: FakeEnvironment) -> list[str]:
    """The pip commands about torch; that the lock comes first, with its hashes checked, is looked at here for all."""
    lock, *others = environment.calls()
    assert lock.startswith("install --require-hashes --no-deps --only-binary :all: -r ") and lock.endswith(RUN)
    return others


def from_index(build: str) -> list[str]:
    """Ask whether the index has the build, then install it from there."""
    return [
        f"index versions torch --index-url {INDEX}/{build} --retries 0 --timeout 10",
        f"install torch==2.13.0+{build} --index-url {INDEX}/{build}",
    ]


@pytest.mark.parametrize(
    ("title", "driver", "card", "commands", "says"),
    [
        (
            WINDOWS,
            "581.08",
            RTX_3060,
            from_index("cu130"),
            "CUDA 13.0 build for NVIDIA GeForce RTX 3060 (driver 581.08)",
        ),
        (WINDOWS, "560.94", RTX_3060, from_index("cu126"), "CUDA 13.0 would need driver 580 or newer"),
        (WINDOWS, "", None, ["install torch==2.13.0"], "CPU build: no GPU was found that torch can use"),
        (LINUX, "580.95", RTX_5090, ["install torch==2.13.0"], "CUDA 13.0 build for NVIDIA GeForce RTX 5090"),
        (LINUX, "535.183", RTX_3060, from_index("cu126"), "CUDA 12.6 build for NVIDIA GeForce RTX 3060"),
        (LINUX, "580.95", GTX_1080, from_index("cu126"), "CUDA 13.0 has no code for this card any more"),
        (LINUX, "", None, from_index("cpu"), "CPU build: no GPU was found that torch can use"),
        ("macOS arm64", "", None, ["install torch==2.13.0"], "macOS (mps) build for Apple GPU"),
    ],
)
def test_eight_machines(
    fake: FakeMachine, capsys: pytest.CaptureFixture[str],
    title: str, driver: str, card: tuple[str, str, str] | None, commands: list[str], says: str,
) -> None:  # fmt: skip
    if card:
        fake.nvidia(driver, card)
    configured = {WINDOWS: "cpu", "macOS arm64": "mps"}.get(title, "cu130")
    environment = fake.environment(index=EVERYTHING, configured=configured, devices=WORKING)
    machine = Machine.here(fake.system(title))
    set_up(environment, RUN, machine=machine)
    assert torch_commands(environment) == commands
    said = capsys.readouterr().out
    assert says in said and "WARNING" not in said
    set_up(environment, RUN, machine=machine)  # again: nothing to do, nothing to say
    assert environment.calls() == [] and capsys.readouterr().out == ""
    set_up(environment, RUN, machine=machine, try_torch=True)
    assert environment.calls() == [] and capsys.readouterr().out.endswith("build, is kept\n")


def test_a_torch_that_was_replaced_behind_our_back_is_found_when_tried(fake: FakeMachine) -> None:
    fake.nvidia("560.94", RTX_3060)
    environment = fake.environment(index=EVERYTHING, devices=WORKING)
    machine = Machine.here(fake.system(WINDOWS))
    set_up(environment, RUN, machine=machine)
    environment.calls()
    environment.has_torch("2.14.1", "cpu", "cpu")
    set_up(environment, RUN, machine=machine, try_torch=True)
    ask, install = from_index("cu126")
    assert environment.calls() == [ask, "uninstall --yes torch", install]


def test_amd_and_then_a_new_nvidia_card(fake: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    fake.kernel_file("sys/class/kfd/kfd/topology/nodes/1/properties", "gfx_target_version 110000\n")
    environment = fake.environment(index=EVERYTHING, configured="cu130", devices={"cu130": ["cuda"]})
    set_up(environment, RUN, machine=Machine.here(fake.system(LINUX)))
    assert torch_commands(environment) == from_index("rocm7.2")
    assert "groups render and video" in capsys.readouterr().out  # this ROCm build does not see its card
    fake.nvidia("580.95", RTX_5090)
    set_up(environment, RUN, machine=Machine.here(fake.system(LINUX)))
    assert environment.calls() == ["uninstall --yes torch", "install torch==2.13.0"]
    assert "WARNING" not in capsys.readouterr().out


def test_an_index_out_of_reach_falls_back_and_is_tried_again(
    fake: FakeMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.nvidia("560.94", RTX_3060)
    environment = fake.environment(index=[], configured="cpu")
    machine = Machine.here(fake.system(WINDOWS))
    ask, install = from_index("cu126")
    set_up(environment, RUN, machine=machine)
    assert torch_commands(environment) == [ask, "install torch==2.13.0"]
    said = capsys.readouterr().out
    assert f"{INDEX}/cu126 did not give this build: the configured index's torch 2.13.0 instead" in said
    assert "WARNING: torch 2.13.0 (cpu) cannot use NVIDIA GeForce RTX 3060 (driver 560.94): run `python" in said
    set_up(environment, RUN, machine=machine)
    assert environment.calls() == [ask]
    assert "WARNING" in capsys.readouterr().out
    (environment.folder / "gives.json").write_text(
        '{"index": ["cu126"], "configured": "cpu", "devices": {"cu126": ["cuda"]}}'
    )
    set_up(environment, RUN, machine=machine)
    assert environment.calls() == [ask, "uninstall --yes torch", install]
    assert "WARNING" not in capsys.readouterr().out


def test_a_real_pip_asks_the_index_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder as index, with the page that an index has; then of a port where nobody listens."""
    page = tmp_path / "cpu" / "torch" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text('<a href="torch-2.13.0%2Bcpu-py3-none-any.whl">torch-2.13.0+cpu-py3-none-any.whl</a>')
    (tmp_path / "torch-2.13.0+cpu-py3-none-any.whl").touch()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    choice = choose_torch(Machine(System("Linux", "x86_64", (3, 11))))
    monkeypatch.setattr("tools.setup.torch_choice.INDEX", tmp_path.as_uri())
    assert index_answers(RealPip(tmp_path), choice)
    monkeypatch.setattr("tools.setup.torch_choice.INDEX", "http://127.0.0.1:9")
    assert not index_answers(RealPip(tmp_path), choice)


def test_without_a_card_the_fallback_is_good_enough(fake: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    environment = fake.environment(index=[], configured="cu130")
    set_up(environment, RUN, machine=Machine.here(fake.system(LINUX)))
    assert len(torch_commands(environment)) == 2
    assert "WARNING" not in capsys.readouterr().out
    set_up(environment, TEST, machine=Machine.here(fake.system(LINUX)))
    (tests,) = environment.calls()
    assert tests.startswith("install --require-hashes --no-deps --no-build-isolation -r ") and tests.endswith(TEST)


def test_a_torch_that_works_is_kept(fake: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    fake.nvidia("560.94", RTX_3060)
    machine = Machine.here(fake.system(WINDOWS))
    environment = fake.environment(index=EVERYTHING, devices=WORKING)
    environment.has_torch("2.9.1", "cu128", "cuda", "cpu")
    set_up(environment, RUN, machine=machine)
    assert torch_commands(environment) == []
    assert "torch: 2.9.1, cu128 build, is kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "build", "devices"),
    [("2.13.0", "cpu", ["cpu"]), ("2.5.1", "cu126", ["cuda"]), ("2.9.1", "cu130", ["cpu"]), ("2.13.0", "cu126", [])],
)
def test_a_torch_that_will_not_do_is_replaced(fake: FakeMachine, version: str, build: str, devices: list[str]) -> None:
    """A CPU build beside a card, a version out of range, a build that the driver cannot run, one that is broken."""
    fake.nvidia("560.94", RTX_3060)
    environment = fake.environment(index=EVERYTHING, devices=WORKING)
    environment.has_torch(version, build, *devices)
    set_up(environment, RUN, machine=Machine.here(fake.system(WINDOWS)))
    ask, install = from_index("cu126")
    assert torch_commands(environment) == [ask, "uninstall --yes torch", install]


def test_what_was_asked_for_stays_until_something_else_is(fake: FakeMachine) -> None:
    fake.nvidia("580.95", RTX_3060)
    machine = Machine.here(fake.system(LINUX))
    environment = fake.environment(index=EVERYTHING, configured="cu130", devices=WORKING)
    set_up(environment, RUN, "cpu", machine)
    assert torch_commands(environment) == from_index("cpu")
    set_up(environment, RUN, None, machine)
    set_up(environment, RUN, "keep", machine)
    assert environment.calls() == []
    set_up(environment, RUN, "auto", machine)
    assert environment.calls() == ["uninstall --yes torch", "install torch==2.13.0"]
    set_up(environment, RUN, "cu126", machine)
    ask, install = from_index("cu126")
    assert environment.calls() == [ask, "uninstall --yes torch", install]


def test_a_torch_that_cannot_be_imported_is_reported(fake: FakeMachine) -> None:
    environment = fake.environment(index=["cpu"], devices={"cpu": []})
    with pytest.raises(UserError, match="cannot be used: ImportError: libcudart"):
        set_up(environment, RUN, machine=Machine.here(fake.system(LINUX)))
    assert environment.read_record().torch_chosen == ""


def test_keep_without_a_torch_and_wrong_values_end_before_anything_is_installed(fake: FakeMachine) -> None:
    environment = fake.environment()
    machine = Machine.here(fake.system(LINUX))
    for value, line in (("keep", "there is no torch that works"), ("cu128", "Did you mean 'cu126'?")):
        with pytest.raises(UserError, match=line.replace("?", r"\?")):
            set_up(environment, RUN, value, machine)
    with pytest.raises(UserError, match="Intel processors"):
        set_up(environment, RUN, None, Machine.here(fake.system("macOS x86_64")))
    assert environment.calls() == []


def test_a_driver_that_is_missing_is_said_loudly(fake: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    fake.tool("nvidia-smi", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9)
    environment = fake.environment(index=EVERYTHING)
    set_up(environment, RUN, machine=Machine.here(fake.system(LINUX)))
    assert torch_commands(environment) == from_index("cpu")
    said = capsys.readouterr().out
    assert "CPU build: nvidia-smi found no card: NVIDIA-SMI has failed" in said
    assert "WARNING: an NVIDIA card is used when nvidia-smi lists it: install its driver, then" in said


def test_the_option_is_taken_out_of_the_arguments() -> None:
    assert take_torch_option(["-k", "x", "--torch", "cpu"]) == ("cpu", ["-k", "x"])
    assert take_torch_option(["--torch=cu126"]) == ("cu126", [])
    assert take_torch_option(["--torchless"]) == (None, ["--torchless"])
    with pytest.raises(UserError, match="--torch needs a value"):
        take_torch_option(["--torch"])


def test_the_tests_on_a_simulated_card_follow_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(commands, "run", lambda command: ran.append(" ".join(command[2:])))
    monkeypatch.setattr(commands, "set_up", lambda environment, lock, asked: ran.append(f"{lock} {asked}"))
    monkeypatch.setattr(commands, "SIMULATED_CARD", tmp_path / "plugin.py")
    plain = [
        f"{TEST} None",
        "ruff check .",
        "ruff format --check .",
        "mypy",
        "pytest -n 2 --dist loadfile --no-loadscope-reorder",
    ]
    commands.test([])
    assert ran == plain
    (tmp_path / "plugin.py").write_text("", encoding="utf-8")
    ran.clear()
    commands.test([])
    assert ran == [
        *plain,
        "pytest -n 2 --dist loadfile --no-loadscope-reorder -p tests.cuda_simulation.plugin tests/on_card",
    ]
    ran.clear()
    commands.test(["--torch", "keep", "tests/io"])
    assert ran == [f"{TEST} keep", *plain[1:4], "pytest -n 2 --dist loadfile --no-loadscope-reorder tests/io"]


def test_start_py_itself_with_nothing_but_the_standard_library(fake: FakeMachine) -> None:
    """The real script in a process of its own, without any installed package, on this system with a card."""
    if sys.platform != "linux":
        pytest.skip("what is expected below is Linux's")
    environment = fake.environment(index=EVERYTHING, devices=WORKING)
    for name in ("start.py", "library/__init__.py", "library/errors.py", "library/machine.py", "tools/__init__.py"):
        (fake.project / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, fake.project / name)
    shutil.copytree(ROOT / "tools" / "setup", fake.project / "tools" / "setup")
    fake.nvidia("535.183", RTX_3060)

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        here = {"PATH": os.environ["PATH"]}
        command = [sys.executable, "-S", "start.py", *words]
        return subprocess.run(command, cwd=fake.project, env=here, capture_output=True, text=True)

    wrong = start("setup", "--torch", "rocm")
    assert (wrong.returncode, wrong.stderr) == (2, "error: --torch: unknown build 'rocm'. Did you mean 'rocm7.2'?\n")
    assert start("setup", "cpu").returncode == 2
    environment.calls()
    done = start("setup", "--torch", "auto")
    assert done.returncode == 0, done.stderr
    assert "CUDA 12.6 build for NVIDIA GeForce RTX 3060 (driver 535.183)" in done.stdout
    wrong = start("dmeo")
    assert (wrong.returncode, wrong.stderr) == (2, "error: start.py: unknown command 'dmeo'. Did you mean 'demo'?\n")
    assert start().returncode == start("--help").returncode == 0
