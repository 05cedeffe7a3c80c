# SPDX-License-Identifier: Apache-2.0
"""A state holds everything, is whole or not there, and says what is wrong with it."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from library.errors import StopTraining, UserError
from library.io.atomic import SaveError
from library.io.state import (
    StateParts,
    compare,
    load_state,
    newest_state,
    read_facts,
    save_state,
    unlike,
)
from library.optim.optimizers import BuiltOptimizer
from tests.damage import damaged_copies

ROOT = Path(__file__).resolve().parents[2]


def parts(step: int = 3, **changes: Any) -> StateParts:
    known: dict[str, Any] = {
        "weights": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)},
        "step": step, "epoch": 1, "batch": 2, "fingerprint": {"--network_dim": 16},
    }  # fmt: skip
    return StateParts(**{**known, **changes})


def one_problem(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


# ---- everything comes back ----------------------------------------------------------------------------------------


def test_all_parts_come_back(tmp_path: Path) -> None:
    before = parts(
        fingerprint={"--network_dim": 16, "--network_args": {"conv_dim": "4"}, "dataset": "abc", "--unet_lr": None},
        optimizer={
            "state": {0: {"m": torch.rand(3), "step": torch.tensor(4.0), "k": None}},
            "param_groups": [{"lr": 1e-4}],
        },
        scheduler={"last_epoch": 7, "_last_lr": [0.1 + 0.2]},
        scaler={"scale": 65536.0},
        ema={"decay": 0.99, "weights": {"a": torch.rand(2)}},
        losses=[0.1, 1 / 3],
    )
    after = load_state(save_state(tmp_path / "a-state", before))
    for name in ("step", "epoch", "batch", "fingerprint", "losses", "scheduler", "scaler"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.weights.keys() == before.weights.keys()
    for key, value in before.weights.items():
        assert after.weights[key].dtype == value.dtype and torch.equal(after.weights[key], value)
    assert torch.equal(after.optimizer["state"][0]["m"], before.optimizer["state"][0]["m"])
    assert after.optimizer["state"][0]["k"] is None and after.ema is not None and after.ema["decay"] == 0.99
    assert read_facts(tmp_path / "a-state")["step"] == 3


def test_numpy_numbers_survive(tmp_path: Path) -> None:
    numbers = {"d": numpy.float64(0.1), "f": numpy.float32(0.1), "n": numpy.int64(3), "a": numpy.arange(3.0)}
    after = load_state(save_state(tmp_path / "a-state", parts(optimizer=numbers))).optimizer
    assert {k: type(v) for k, v in after.items()} == {k: type(v) for k, v in numbers.items()}
    assert after["d"] == 0.1 and after["f"] == numpy.float32(0.1) and (after["a"] == numpy.arange(3.0)).all()


def test_what_cannot_be_read_back_is_found_when_saving(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="without running code"):
        save_state(tmp_path / "a-state", parts(scheduler={"f": Path("x")}))
    assert list(tmp_path.iterdir()) == []


def test_slices_do_not_drag_their_storage_along(tmp_path: Path) -> None:
    big = torch.zeros(1_000_000)
    folder = save_state(tmp_path / "a-state", parts(optimizer={"x": big[:5]}, weights={"w": big[5:9]}))
    assert sum(p.stat().st_size for p in folder.iterdir()) < 20_000


def test_nonfinite_weights_do_not_replace_a_state(tmp_path: Path) -> None:
    save_state(tmp_path / "a-state", parts(1))
    with pytest.raises(StopTraining, match="not finite"):
        save_state(tmp_path / "a-state", parts(2, weights={"w": torch.tensor([float("nan")])}))
    with pytest.raises(StopTraining, match=r"1 of 1 tensors are empty \(w\)"):
        save_state(tmp_path / "a-state", parts(2, weights={"w": torch.zeros(0)}))
    assert load_state(tmp_path / "a-state").step == 1


# ---- real optimizers ----------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("torch.optim.AdamW", {"lr": 1e-2}),
    "SGDNesterov": ("torch.optim.SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    "AdamW8bit": ("bitsandbytes.optim.AdamW8bit", {"lr": 1e-2}),
    "PagedAdamW8bit": ("bitsandbytes.optim.PagedAdamW8bit", {"lr": 1e-2}),
    "PagedAdamW32bit": ("bitsandbytes.optim.PagedAdamW32bit", {"lr": 1e-2}),
    "Lion8bit": ("bitsandbytes.optim.Lion8bit", {"lr": 1e-2}),
    "DAdaptAdam": ("dadaptation.DAdaptAdam", {"lr": 1.0}),
    "DAdaptAdan": ("dadaptation.DAdaptAdan", {"lr": 1.0}),
    "DAdaptAdaGrad": ("dadaptation.DAdaptAdaGrad", {"lr": 1.0}),
    "DAdaptLion": ("dadaptation.DAdaptLion", {"lr": 1.0}),
    "DAdaptSGD": ("dadaptation.DAdaptSGD", {"lr": 1.0}),
    "DAdaptAdanIP": ("dadaptation.experimental.DAdaptAdanIP", {"lr": 1.0}),
    "Prodigy": ("prodigyopt.Prodigy", {"lr": 1.0, "use_bias_correction": True, "safeguard_warmup": True}),
    "AdamWScheduleFree": ("schedulefree.AdamWScheduleFree", {"lr": 1e-2, "warmup_steps": 5}),
    "RAdamScheduleFree": ("schedulefree.RAdamScheduleFree", {"lr": 1e-2}),
    "SGDScheduleFree": ("schedulefree.SGDScheduleFree", {"lr": 1e-2}),
    "Lion": ("lion_pytorch.Lion", {"lr": 1e-2}),
    "Adafactor": ("transformers.Adafactor", {"lr": None, "relative_step": True, "warmup_init": True}),
}


def build(name: str, weights: list[Tensor]) -> tuple[list[torch.nn.Parameter], Any]:
    path, settings = OPTIMIZERS[name]
    module, _, cls = path.rpartition(".")
    made = [torch.nn.Parameter(w.clone()) for w in weights]
    found = getattr(pytest.importorskip(module.split(".")[0]) and importlib.import_module(module), cls)
    optimizer = found([{"params": made[:1]}, {"params": made[1:]}], **settings)
    if "ScheduleFree" in name:
        optimizer.train()
    return made, optimizer


def train(made: list[torch.nn.Parameter], optimizer: Any, steps: range) -> None:
    for step in steps:
        for index, parameter in enumerate(made):
            generator = torch.Generator().manual_seed(100 * step + index)
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def start(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in ((80, 64), (7,))]  # bnb: 8 bit from 4096 on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore")
def test_optimizers_continue_exactly(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    straight, optimizer = build(name, start(dtype))
    train(straight, optimizer, range(3))
    weights = {str(i): p for i, p in enumerate(straight)}
    folder = save_state(tmp_path / "a-state", parts(weights=weights, optimizer=optimizer.state_dict()))
    train(straight, optimizer, range(3, 6))

    saved = load_state(folder)
    resumed, again = build(name, [saved.weights[str(i)] for i in range(2)])
    BuiltOptimizer(again, name, False, "ScheduleFree" in name, None).load_state_dict(saved.optimizer)
    train(resumed, again, range(3, 6))
    for left, right in zip(straight, resumed):
        assert torch.equal(left, right)


@pytest.mark.filterwarnings("ignore")
def test_schedulers_of_torch_come_back(tmp_path: Path) -> None:
    def made() -> Any:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        first = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
        return first, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)

    first, second = made()
    for loss in (1.0, 2.0, 3.0):
        first.step()
        second.step(loss)
    folder = save_state(tmp_path / "a-state", parts(scheduler={"1": first.state_dict(), "2": second.state_dict()}))
    saved = load_state(folder).scheduler
    again, plateau = made()
    again.load_state_dict(saved["1"])
    plateau.load_state_dict(saved["2"])
    assert again.last_epoch == first.last_epoch and plateau.best == second.best == 1.0


# ---- what is wrong with a state -----------------------------------------------------------------------------------


def test_a_truncated_or_changed_file_is_named(tmp_path: Path) -> None:
    folder = save_state(tmp_path / "a-state", parts())
    path = folder / "optimizer.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    line = one_problem(lambda: load_state(folder))
    assert line == f"--resume: {path} has {len(whole) - 100:,} of {len(whole):,} bytes; use another state"
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "is damaged" in one_problem(lambda: load_state(folder))
    path.unlink()
    assert "optimizer.pt is missing" in one_problem(lambda: read_facts(folder))
    (folder / "manifest.json").write_text("{")
    assert "manifest.json is damaged" in one_problem(lambda: load_state(folder))


def test_states_that_are_none(tmp_path: Path) -> None:
    save_state(tmp_path / "name-000001-state", parts())
    line = one_problem(lambda: load_state(tmp_path / "name-000002-state"))
    assert line.endswith(f"does not exist. Did you mean {tmp_path / 'name-000001-state'}?")
    assert one_problem(lambda: load_state(tmp_path / "xyz")).endswith("There are: name-000001-state")
    assert one_problem(lambda: load_state(tmp_path / "gone" / "xyz")).endswith("xyz does not exist")
    assert "holds states, it is none; give one of name-000001-state" in one_problem(lambda: load_state(tmp_path))
    (tmp_path / "file").write_text("x")
    assert "is a file" in one_problem(lambda: load_state(tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    assert "is not a state: manifest.json is missing" in one_problem(lambda: load_state(tmp_path / "empty"))


def test_a_state_of_sd_scripts_is_recognised(tmp_path: Path) -> None:
    folder = tmp_path / "lora-state"
    folder.mkdir()
    for name in ("model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "train_state.json"):
        (folder / name).write_text("x")
    line = one_problem(lambda: load_state(folder))
    assert "sd-scripts" in line and line.endswith(f"--network_weights {folder / 'model.safetensors'}")


def test_a_state_of_a_newer_program(tmp_path: Path) -> None:
    folder = save_state(tmp_path / "a-state", parts())
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    assert "newer Trainyard (state version 99" in one_problem(lambda: load_state(folder))


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch pwned",))


def test_code_in_a_state_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_state(tmp_path / "a-state", parts())
    path = folder / "optimizer.pt"
    torch.save({"optimizer": Evil()}, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["optimizer.pt"] = {
        "size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "more than numbers" in one_problem(lambda: load_state(folder))
    assert [p.name for p in tmp_path.iterdir()] == ["a-state"]


def signed(folder: Path) -> Path:
    """The manifest made anew for whatever lies in the folder."""
    names = ("weights.safetensors", "optimizer.pt", "train_state.json")
    found = {name: (folder / name).read_bytes() for name in names}
    files = {n: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in found.items()}
    manifest = {**json.loads((folder / "manifest.json").read_text()), "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt", "train_state.json"])
def test_parts_of_two_states_do_not_pass_for_one(tmp_path: Path, name: str) -> None:
    one, other = (save_state(tmp_path / f"{step}-state", parts(step, optimizer={"s": step})) for step in (1, 2))
    (other / "weights.safetensors").write_bytes(b"")  # of other values
    other = save_state(other, parts(2, optimizer={"s": 2}, weights={"a": torch.zeros(2)}))
    (one / name).write_bytes((other / name).read_bytes())
    for call in (load_state, read_facts):
        assert "of another state; use a whole one" in one_problem(lambda: call(signed(one)))  # noqa: B023 - called at once


def edited_facts(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        facts = json.loads((folder / "train_state.json").read_text())
        change(facts)
        (folder / "train_state.json").write_text(json.dumps(facts))

    return edit


def other_bundle(value: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        torch.save(value, folder / "optimizer.pt")
        edited_facts(lambda facts: facts.pop("parts"))(folder)

    return edit


def overwritten(name: str, text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        edited_facts(lambda facts: facts.pop("parts"))(folder)
        (folder / name).write_text(text)

    return edit


BUNDLE = {"optimizer": {}, "scheduler": {}, "scaler": None, "ema": None}
WRONG_PARTS: dict[str, Callable[[Path], None]] = {
    "facts without a step": edited_facts(lambda facts: facts.pop("step")),
    "a step that is text": edited_facts(lambda facts: facts.update(step="3")),
    "a negative batch": edited_facts(lambda facts: facts.update(batch=-1)),
    "losses that are no numbers": edited_facts(lambda facts: facts.update(losses=[1, None])),
    "a fingerprint that is a list": edited_facts(lambda facts: facts.update(fingerprint=[])),
    "a seed that is text": edited_facts(lambda facts: facts.update(fingerprint={"seed": "x"})),
    "facts that are nested": overwritten("train_state.json", "[" * 10**5),
    "facts that are a list": overwritten("train_state.json", "[1]"),
    "a number of 5,000 digits": overwritten("train_state.json", "9" * 5000),
    "an optimizer that is a list": other_bundle({**BUNDLE, "optimizer": []}),
    "no scheduler": other_bundle({key: BUNDLE[key] for key in ("optimizer", "scaler", "ema")}),
    "a tensor for all parts": other_bundle(torch.zeros(3)),
    "no pickle": overwritten("optimizer.pt", "hello"),
    "no safetensors": overwritten("weights.safetensors", "hello"),
}


@pytest.mark.parametrize("kind", WRONG_PARTS)
def test_signed_parts_of_a_wrong_form(tmp_path: Path, kind: str) -> None:
    folder = save_state(tmp_path / "a-state", parts())
    WRONG_PARTS[kind](folder)
    line = one_problem(lambda: load_state(signed(folder)))
    assert line.startswith(f"--resume: {folder}") and len(line) < 500 and "\n" not in line


def test_another_form_is_found() -> None:
    own = {"groups": [{"lr": 0.1, "betas": (0.9, 0.99), "on": True, "foreach": None}], "k": 3}
    same = {
        "groups": [{"lr": torch.tensor(1), "betas": [1, 2], "on": None, "foreach": 1}],
        "k": numpy.int64(3),
        "new": "",
    }
    assert unlike(own, own, "o") is None and unlike(own, same, "o") is None and unlike(own, {}, "o") is None
    assert unlike(own, {**same, "k": "3"}, "o") == "o k" and unlike(own, [], "o") == "o"
    assert unlike(own, {**same, "groups": []}, "o") == "o groups"
    assert unlike(own, {"groups": [{"betas": (1, None)}]}, "o") == "o groups 0 betas 1"


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt", "train_state.json", "manifest.json"])
def test_damaged_states(tmp_path: Path, name: str) -> None:
    """200 of each part, signed anew so that the reader and not the checksum must find it."""
    folder = save_state(tmp_path / "a-state", parts(optimizer={"m": torch.rand(3)}))
    edited_facts(lambda facts: facts.pop("parts"))(folder)
    whole = (folder / name).read_bytes()
    for data in damaged_copies(whole, 200, name):
        (folder / name).write_bytes(data)
        if name != "manifest.json":
            signed(folder)
        try:
            state = load_state(folder)
        except UserError as error:
            assert len(error.problems) <= 10 and "\n" not in error.problems[0], data
        else:
            assert type(state.step) is int and isinstance(state.weights, dict)


def test_differences_are_lines(tmp_path: Path) -> None:
    saved = {"--network_dim": 16, "--network_args": {"conv_dim": "4", "x": 1}, "dataset": "a" * 100, "--betas": (1, 2)}
    folder = save_state(tmp_path / "a-state", parts(fingerprint=saved))
    assert compare(read_facts(folder)["fingerprint"], saved) == []
    current = {"--betas": [1, 2], "--network_dim": 32, "--network_args": {"conv_dim": "8", "x": 1}, "new": 0.5}
    assert compare(read_facts(folder)["fingerprint"], current) == [
        "--network_dim was 16, is 32",
        "--network_args conv_dim was 4, is 8",
        f"dataset was {'a' * 77}..., is not set",
        "new was not noted, is 0.5",
    ]


# ---- the newest one -----------------------------------------------------------------------------------------------


def test_the_newest_state_of_a_run(tmp_path: Path) -> None:
    assert newest_state(tmp_path / "gone", "a") is None and newest_state(tmp_path, "a") is None
    steps = {
        "a-000001-state": 5,
        "a-step00000007-state": 7,
        "a-state": 6,
        "ab-state": 90,
        "a-x-state": 91,
        "last-state": 92,
    }
    for name, step in steps.items():
        save_state(tmp_path / name, parts(step))
    damaged = save_state(tmp_path / "a-step00000008-state", parts(8))
    (damaged / "weights.safetensors").write_bytes(b"")
    newest = newest_state(tmp_path, "a")
    assert newest is not None and newest.name == "a-step00000007-state"
    unnamed = newest_state(tmp_path, None)
    assert unnamed is not None and unnamed.name == "last-state"


SAVER = """
import sys
import torch
from library.io.state import StateParts, save_state
print("ready", flush=True)
for step in range(int(sys.argv[2]), 10**6):
    value = torch.full((20_000,), float(step))
    name = ("a-state", f"a-step{step % 2:08d}-state")[step % 2]
    save_state(f"{sys.argv[1]}/{name}", StateParts({"w": value}, step, 0, 0, {}, optimizer={"m": value.clone()}))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_killed_while_saving_states_the_newest_one_works(tmp_path: Path) -> None:
    moments = random.Random(3)
    step = 0
    for _ in range(4):
        command = [sys.executable, "-c", SAVER, str(tmp_path), str(step)]
        saver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert saver.stdout is not None and saver.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0.1, 0.3))
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        saver.stdout.close()
        newest = newest_state(tmp_path, "a")
        assert newest is not None and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
        for folder in tmp_path.iterdir():
            state = load_state(folder)
            assert torch.equal(state.weights["w"], torch.full((20_000,), float(state.step)))
            assert torch.equal(state.optimizer["m"], state.weights["w"])
        assert load_state(newest).step >= step - 1
        step = load_state(newest).step + 1


def test_saving_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(SaveError):
        save_state(tmp_path / "gone" / "a-state", parts())
