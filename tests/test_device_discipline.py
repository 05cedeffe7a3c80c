# SPDX-License-Identifier: Apache-2.0
"""What depends on the kind of device is decided in library/device*.py and library/memory, and nowhere else.

tools/setup, which installs a torch for the kind that is there, is not about runs.
There is no GPU here. Where a kind of device is meant, the calls that torch would get are recorded.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import library.device
from library.device import (
    DistributedSettings,
    HostCopy,
    empty_cache,
    exact_float,
    forget_peak,
    free_bytes,
    is_card,
    kept_random_state,
    limit_memory,
    make_accelerator,
    peak_bytes,
    seed_everything,
)
from library.errors import UserError
from library.rng import torch_generator

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("cuda", "mps", "xpu")
MODULES = {f"torch.{name}" for name in (*KINDS, "backends.cuda", "backends.cudnn", "backends.mps")}
OF_TENSORS = {"is_cuda", "is_mps", "is_xpu", "cuda", "xpu"}  # attributes of any value


# ---- who speaks of devices ------------------------------------------------------------------------------------------


def may_know(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return parts[:2] in (("library", "memory"), ("tools", "setup")) or (
        parts[0] == "library" and parts[1].startswith("device")
    )


def files() -> list[Path]:
    rooms = [path for room in ("library", "networks", "tools") for path in ROOT.glob(f"{room}/**/*.py")]
    return sorted(path for path in rooms if not may_know(path))


def dotted(node: ast.AST) -> str:
    """`torch.cuda.Event` as text; empty for what is no such chain."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


def device_facts(text: str) -> Iterator[str]:
    """Where a module speaks of a kind of device: `line: what`."""
    for node in ast.walk(ast.parse(text)):
        found = ""
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            known = name in MODULES or (node.attr in OF_TENSORS and not name.startswith("torch."))
            found = (name or node.attr) if known else ""
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = [f"{module}{alias.name}." for alias in node.names]
            found = next((name for name in names for own in MODULES if name.startswith(f"{own}.")), "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = node.value if node.value.partition(":")[0] in KINDS else ""
        if found:
            yield f"{node.lineno}: {found}"


@pytest.mark.parametrize("room", ["library", "networks", "tools"])
def test_kinds_of_devices_are_known_in_few_places(room: str) -> None:
    found = [f"{p.relative_to(ROOT)}:{fact}" for p in files() if p.is_relative_to(ROOT / room)
             for fact in device_facts(p.read_text(encoding="utf-8"))]  # fmt: skip
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.cuda.empty_cache()", "x = torch.mps", "event: torch.xpu.Event | None = None", "import torch.cuda.amp",
        "from torch import cuda", "from torch.cuda import Event", "torch.backends.cudnn.benchmark = True",
        "pin = device.type == 'cuda'", "torch.zeros(1, device='cuda:0')", "y = x.is_cuda", "y = f(x).cuda()",
    ],
)  # fmt: skip
def test_what_speaks_of_a_device_is_found(line: str) -> None:
    assert len(list(device_facts(line))) == 1


def test_what_is_written_about_devices_is_not_found() -> None:
    text = '"""torch.cuda does it."""\nhelp = "cuda or cpu"\ntorch.device("cpu")\ntorch.get_device_module(device)\n'
    assert list(device_facts(text)) == []


# ---- what a device gets ---------------------------------------------------------------------------------------------


class Calls(list[tuple[Any, ...]]):
    """What was called with what, in order."""

    def returning(self, name: str, value: Any = None) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.append((name, *args))
            return value

        return call


@pytest.fixture
def calls() -> Calls:
    return Calls()


def with_functions(patch: pytest.MonkeyPatch, calls: Calls, kind: str, **values: Any) -> torch.device:
    """A device of that kind, as far as these functions of its module go."""
    for name, value in values.items():
        patch.setattr(getattr(torch, kind), name, calls.returning(name, value), raising=False)
    return torch.device(kind)


def test_which_devices_are_cards() -> None:
    assert [is_card(torch.device(kind)) for kind in ("cuda", "cuda:1", "xpu", "mps", "cpu")] == [True] * 3 + [False] * 2
    long = [exact_float(torch.device(kind)) for kind in ("cpu", "cuda", "mps", "xpu")]
    assert long == [torch.float64, torch.float64, torch.float32, torch.float32]


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_of_the_accelerator_that_is_there_is_emptied(
    kind: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in KINDS:
        home = torch.backends.mps if name == "mps" else getattr(torch, name)
        monkeypatch.setattr(home, "is_available", lambda own=name: own == kind)
        monkeypatch.setattr(getattr(torch, name), "empty_cache", calls.returning(name))
    assert library.device.accelerator_present()
    empty_cache()
    assert calls == [(kind,)]


def test_free_memory_and_its_limit(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    mps = with_functions(
        monkeypatch, calls, "mps",
        recommended_max_memory=1000, current_allocated_memory=300, set_per_process_memory_fraction=None,
    )  # fmt: skip
    properties = SimpleNamespace(total_memory=2000)
    xpu = with_functions(
        monkeypatch, calls, "xpu", mem_get_info=(500, 2000), memory_reserved=200, memory_allocated=50,
        get_device_properties=properties, set_per_process_memory_fraction=None,
    )  # fmt: skip
    assert free_bytes(mps) == 700 and free_bytes(xpu) == 650
    calls.clear()
    limit_memory(mps, 250)
    limit_memory(xpu, 500)
    limit_memory(xpu, 3000)
    limits = [call[1:] for call in calls if call[0] == "set_per_process_memory_fraction"]
    assert limits == [(0.25,), (0.25, xpu), (1.0, xpu)]
    monkeypatch.delattr(torch.xpu, "set_per_process_memory_fraction")
    limit_memory(xpu, 500)  # torch 2.6 cannot: no error


def test_free_memory_that_is_not_known_is_said_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError("not supported by this driver")

    monkeypatch.setattr(torch.xpu, "mem_get_info", refuse, raising=False)
    with pytest.raises(UserError, match="give --vram_budget"):
        free_bytes(torch.device("xpu"))
    monkeypatch.delattr(torch.xpu, "mem_get_info")
    with pytest.raises(UserError, match="give --vram_budget"):
        free_bytes(torch.device("xpu"))


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_peaks_are_those_of_the_card(kind: str, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    device = with_functions(monkeypatch, calls, kind, reset_peak_memory_stats=None, max_memory_allocated=7)
    forget_peak(device)
    assert peak_bytes(device) == 7
    assert calls == [("reset_peak_memory_stats", device), ("max_memory_allocated", device)]


@pytest.mark.parametrize("kind", KINDS)
def test_random_states_of_the_device_are_kept(kind: str, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    device = with_functions(monkeypatch, calls, kind, get_rng_state="its state", set_rng_state=None)
    before = torch.get_rng_state()
    with kept_random_state(device):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert calls == [("get_rng_state", device), ("set_rng_state", "its state", device)]


def test_the_seed_reaches_every_device(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, name in (("cuda", "manual_seed_all"), ("mps", "manual_seed"), ("xpu", "manual_seed_all")):
        monkeypatch.setattr(getattr(torch, kind), name, calls.returning(kind))
    seed_everything(2**63 - 1)
    assert calls == [(kind, 2**63 - 1) for kind in KINDS]


class Remote:
    """As much of a tensor on a device as HostCopy uses: the copy, or what it was asked for."""

    def __init__(self, kind: str, calls: Calls) -> None:
        self.device, self.calls = torch.device(kind), calls

    def detach(self) -> Remote:
        return self

    def to(self, device: str, *, non_blocking: bool) -> torch.Tensor:
        self.calls.append(("copied", device, non_blocking))
        return torch.tensor(5.0)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_card_copies_while_the_host_goes_on(kind: str, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    event = SimpleNamespace(
        record=calls.returning("record"), query=calls.returning("query", False), synchronize=calls.returning("wait")
    )
    monkeypatch.setattr(getattr(torch, kind), "Event", lambda: event)
    copy = HostCopy(Remote(kind, calls))  # type: ignore[arg-type]
    assert calls == [("copied", "cpu", True), ("record",)] and not copy.ready
    assert copy.value() == 5.0 and calls[2:] == [("query",), ("wait",)]


def test_from_elsewhere_a_value_is_there_at_once(calls: Calls) -> None:
    copy = HostCopy(Remote("mps", calls))  # type: ignore[arg-type]
    assert calls == [("copied", "cpu", False)] and copy.ready and copy.value() == 5.0
    weight = torch.ones(2, requires_grad=True)
    assert HostCopy(weight).ready and not HostCopy(weight).value().requires_grad


def test_precisions_that_a_mac_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: major < 14)
    with pytest.raises(UserError, match="bf16 needs macOS 14"):
        make_accelerator("bf16", DistributedSettings())
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.7.1"))
    with pytest.raises(UserError, match=r"fp16 needs torch 2\.8 or newer on a Mac, this is 2\.7\.1"):
        make_accelerator("fp16", DistributedSettings())


@pytest.mark.parametrize("kind", KINDS)
def test_generators_are_made_on_the_device(kind: str, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def generator(device: torch.device) -> SimpleNamespace:
        calls.append(("made", device))
        return SimpleNamespace(manual_seed=lambda seed: seed)

    monkeypatch.setattr(torch, "Generator", generator)
    assert 0 <= torch_generator(7, "noise", device=torch.device(kind)) < 2**63  # type: ignore[operator]
    assert calls == [("made", torch.device(kind))]


@pytest.mark.parametrize("kind", ["cpu", *KINDS])
def test_autocast_knows_each_kind(kind: str) -> None:
    """The names that `device.type` gives are those that autocast takes."""
    assert torch.amp.autocast_mode.is_autocast_available(kind)
