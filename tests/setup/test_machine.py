# SPDX-License-Identifier: Apache-2.0
"""What is read off a machine: from real small programs in PATH and a folder with the kernel's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.machine import AmdCard, Machine, Nvidia, NvidiaCard, System, ask_nvidia_smi
from tests.setup.fakes import FakeMachine, program
from tools.setup.torch_choice import AMD_TARGETS

LINUX = "Linux x86_64"
ROCMINFO = """ROCk module is loaded
*******
Agent 1
*******
  Name:                    AMD Ryzen 9 7950X
  Marketing Name:          AMD Ryzen 9 7950X
*******
Agent 2
*******
  Name:                    gfx1100
  Marketing Name:          AMD Radeon RX 7900 XTX
    Name:                  amdgcn-amd-amdhsa--gfx1100
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    return FakeMachine(tmp_path, monkeypatch)


def test_two_nvidia_cards(fake: FakeMachine) -> None:
    fake.nvidia("560.94", ("NVIDIA GeForce RTX 3060", "12288", "8.6"), ("NVIDIA GB10", "[N/A]", "12.1"))
    machine = Machine.here(fake.system(LINUX))
    assert machine.nvidia is not None
    assert machine.nvidia.driver_version == (560, 94)
    assert machine.nvidia.cards == (
        NvidiaCard("NVIDIA GeForce RTX 3060", 12288, (8, 6)),
        NvidiaCard("NVIDIA GB10", None, (12, 1)),
    )
    assert machine.describe() == [
        "Linux x86_64, Python 3.11",
        "NVIDIA GeForce RTX 3060, 12288 MiB, compute capability 8.6, driver 560.94",
        "NVIDIA GB10, compute capability 12.1, driver 560.94",
    ]


def test_an_old_driver_does_not_know_the_compute_capability(fake: FakeMachine) -> None:
    fake.nvidia("470.42", ("GeForce GTX 1080", "8119", "6.1"), knows_capability=False)
    assert Machine.here(fake.system("Windows x86_64")).nvidia == Nvidia(
        (NvidiaCard("NVIDIA GeForce GTX 1080", 8119, None),), "470.42"
    )


@pytest.mark.parametrize(
    ("code", "said"), [(9, "couldn't communicate with the NVIDIA driver"), (6, "No devices were found"), (0, "")]
)
def test_a_driver_that_does_not_answer_is_a_problem_with_its_words(fake: FakeMachine, code: int, said: str) -> None:
    fake.tool("nvidia-smi", said, code)
    nvidia = Machine.here(fake.system(LINUX)).nvidia
    assert nvidia is not None and nvidia.cards == ()
    assert (said or "code 0") in nvidia.problem


def test_a_tool_that_cannot_start_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "did not start" in ask_nvidia_smi(str(tmp_path / "nothing")).problem
    program(tmp_path / "slow", "import time\ntime.sleep(60)")
    monkeypatch.setattr("library.machine.SECONDS_TO_ANSWER", 0.2)
    assert "did not answer" in ask_nvidia_smi(str(tmp_path / "slow")).problem


def test_nvidia_smi_is_found_where_the_driver_puts_it(fake: FakeMachine) -> None:
    fake.nvidia("580.88", ("NVIDIA GeForce RTX 5090", "32607", "12.0"))
    (fake.root / "System32").mkdir(parents=True)
    (fake.tools / "nvidia-smi").rename(fake.root / "System32" / "nvidia-smi.exe")
    nvidia = Machine.here(fake.system("Windows x86_64")).nvidia
    assert nvidia is not None and nvidia.cards[0].capability == (12, 0)


def test_an_nvidia_card_without_its_driver_is_seen_on_the_bus(fake: FakeMachine) -> None:
    fake.pci("0x10de", "0x2504")
    nvidia = Machine.here(fake.system(LINUX)).nvidia
    assert nvidia is not None and "driver is missing" in nvidia.problem


def test_nothing_is_found_on_a_bare_machine(fake: FakeMachine) -> None:
    fake.pci("0x10de", "0x1234", kind="0x040300")  # a sound device
    for title in (LINUX, "Windows x86_64"):
        assert Machine.here(fake.system(title)) == Machine(fake.system(title))
    assert Machine.here(fake.system("macOS arm64")).apple_gpu
    assert not Machine.here(fake.system("macOS x86_64")).apple_gpu


def test_amd_by_rocminfo_and_by_the_kernel(fake: FakeMachine) -> None:
    nodes = "sys/class/kfd/kfd/topology/nodes"
    for number, version in enumerate((0, 110000, 90010, 100306)):
        fake.kernel_file(f"{nodes}/{number}/properties", f"simd_count 1\ngfx_target_version {version}\n")
    by_kernel = Machine.here(fake.system(LINUX)).amd
    assert [card.target for card in by_kernel] == ["gfx1100", "gfx90a", "gfx1036"]
    assert [card.target in AMD_TARGETS for card in by_kernel] == [True, True, False]
    fake.tool("rocminfo", ROCMINFO)
    assert Machine.here(fake.system(LINUX)).amd == (AmdCard("gfx1100", "AMD Radeon RX 7900 XTX"),)


def test_intel_cards_but_not_integrated_graphics(fake: FakeMachine) -> None:
    for device in ("0xe20b", "0x56a0", "0xa780", "0x7d55", "0x64a0", "0x5690"):  # B580, A770, three integrated, A770M
        fake.pci("0x8086", device)
    assert Machine.here(fake.system(LINUX)).intel == ("Intel GPU 0xe20b", "Intel GPU 0x56a0", "Intel GPU 0x5690")
    fake.tool(
        "powershell", "Intel(R) Arc(TM) 140V GPU (16GB)\nIntel(R) Arc(TM) B580 Graphics\nIntel(R) UHD Graphics 770"
    )
    assert Machine.here(fake.system("Windows x86_64")).intel == ("Intel(R) Arc(TM) B580 Graphics",)


def test_this_machine_is_one_that_is_described() -> None:
    here = Machine.here(System.here())
    assert here.describe()[0].startswith(here.system.title)
