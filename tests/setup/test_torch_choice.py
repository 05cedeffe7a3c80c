# SPDX-License-Identifier: Apache-2.0
"""The build of torch for a machine, from the table of what is published."""

from __future__ import annotations

import pytest

from library.errors import UserError
from library.machine import AmdCard, Machine, Nvidia, NvidiaCard, System
from tools.setup.environment import ROOT, in_range
from tools.setup.torch_choice import AMD_TARGETS, AUTO, BUILDS, KEEP, TORCH, builds_for, check_name, choose_torch

LINUX, ARM = System("Linux", "x86_64", (3, 11)), System("Linux", "arm64", (3, 11))
WINDOWS, MAC = System("Windows", "x86_64", (3, 11)), System("Darwin", "arm64", (3, 11))


def nvidia(driver: str, *capabilities: tuple[int, int] | None) -> Nvidia:
    return Nvidia(tuple(NvidiaCard(f"NVIDIA card {number}", 8192, c) for number, c in enumerate(capabilities)), driver)


@pytest.mark.parametrize(
    ("system", "cards", "build", "advice"),
    [
        (WINDOWS, nvidia("580.88", (8, 6)), "cu130", ""),
        (WINDOWS, nvidia("560.94", (8, 6)), "cu126", ""),
        (WINDOWS, nvidia("528.33", (8, 9)), "cu126", ""),
        (WINDOWS, nvidia("527.41", (8, 9)), "cu126", "528.33 or newer"),
        (WINDOWS, nvidia("580.88", (6, 1)), "cu126", ""),  # Pascal: dropped by CUDA 13
        (WINDOWS, nvidia("576.02", (12, 0)), "cu130", "580 or newer"),  # Blackwell: unknown to CUDA 12.6
        (LINUX, nvidia("580.65.06", (7, 5)), "cu130", ""),
        (LINUX, nvidia("580.65.06", (7, 0)), "cu126", ""),
        (LINUX, nvidia("525.60.13", (9, 0)), "cu126", ""),
        (LINUX, nvidia("525.60.11", (9, 0)), "cu126", "525.60.13 or newer"),
        (LINUX, nvidia("470.42", None), "cu126", "525.60.13 or newer"),
        (LINUX, nvidia("590.1", (6, 1), (8, 6), (12, 0)), "cu130", ""),  # two of three
        (LINUX, nvidia("470.42", (3, 5)), "cpu", ""),  # Kepler
        (LINUX, Nvidia(problem="nvidia-smi found no card: it failed"), "cpu", "install its driver"),
        (ARM, nvidia("580.65", (12, 1)), "cu130", ""),
        (ARM, nvidia("550.10", (9, 0)), "cu126", ""),
        (ARM, None, "cpu", ""),
        (WINDOWS, None, "cpu", ""),
        (MAC, None, "mps", ""),
    ],
)
def test_by_driver_and_card(system: System, cards: Nvidia | None, build: str, advice: str) -> None:
    choice = choose_torch(Machine(system, cards))
    assert choice.build.name == build
    assert (advice in choice.advice) if advice else not choice.advice
    assert choice.why and str(choice).startswith(f"torch: {TORCH}, ")


def test_nvidia_comes_before_amd_and_amd_before_intel() -> None:
    amd, intel = (AmdCard("gfx1036"), AmdCard("gfx1201", "AMD Radeon RX 9070 XT")), ("Intel GPU 0xe20b",)
    assert choose_torch(Machine(LINUX, nvidia("590", (8, 9)), amd, intel)).build.name == "cu130"
    assert choose_torch(Machine(LINUX, Nvidia(problem="broken"), amd, intel)).card == "AMD Radeon RX 9070 XT (gfx1201)"
    assert choose_torch(Machine(LINUX, None, amd[:1], intel)).build.name == "xpu"
    assert "no code for gfx1036" in choose_torch(Machine(LINUX, None, amd[:1])).why
    assert choose_torch(Machine(WINDOWS, None, (), intel)).build.name == "xpu"


def test_a_build_by_name_and_what_is_in_its_way() -> None:
    old = Machine(LINUX, nvidia("470.42", (6, 1)))
    assert choose_torch(old, "cpu").pip_arguments[0] == f"torch=={TORCH}+cpu"
    assert "too old" in choose_torch(old, "cu126").advice
    assert "no code for NVIDIA card 0" in choose_torch(old, "cu132").advice
    assert choose_torch(Machine(LINUX), "cu132").pip_arguments[2].endswith("/cu132")


@pytest.mark.parametrize(
    ("value", "system", "line"),
    [
        ("cu128", LINUX, "--torch: unknown build 'cu128'. Did you mean 'cu126'?"),
        ("cu12.6", LINUX, "--torch: unknown build 'cu12.6'. Did you mean 'cu126'?"),
        ("rocm", LINUX, "--torch: unknown build 'rocm'. Did you mean 'rocm7.2'?"),
        ("gpu", MAC, "--torch: unknown build 'gpu'. Known: auto, keep, mps"),
        ("rocm7.2", WINDOWS, "has no such build for Windows x86_64. Known: auto, keep, cu130, cu126, cu132, xpu, cpu"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(value: str, system: System, line: str) -> None:
    with pytest.raises(UserError, match=r"^--torch") as error:
        check_name(value, system)
    assert line in error.value.problems[0]


def test_systems_without_torch_are_told_so_in_one_line() -> None:
    with pytest.raises(UserError, match="Intel processors, for which torch ended"):
        builds_for(System("Darwin", "x86_64", (3, 11)))
    with pytest.raises(UserError, match=r"Windows arm64: torch .* is not published for it"):
        builds_for(System("Windows", "arm64", (3, 11)))


def test_the_table_agrees_with_the_pin_and_the_range() -> None:
    assert f"torch=={TORCH}\n" in (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert in_range(TORCH) and not in_range("2.5.1") and not in_range("3.0.0")
    for build in BUILDS:
        assert set(build.on_pypi) <= set(build.systems)
        if build.driver:
            assert set(build.compiled_for or {}) == set(build.systems)
    for title in {title for build in BUILDS for title in build.systems}:
        assert sum(title in build.on_pypi for build in BUILDS) == 1, f"one wheel on PyPI for {title}"


def test_the_page_says_what_the_table_says() -> None:
    page = (ROOT / "docs" / "torch_builds.md").read_text(encoding="utf-8")
    for build in BUILDS:
        linux, windows = ((build.driver or {}).get(name, "") for name in ("Linux", "Windows"))
        row = f"| `{build.name}` | {build.title} | {linux} | {windows} | {', '.join(build.systems)} | "
        assert row.replace("|  |", "| |").replace("|  |", "| |") in page
    assert f"AMD targets of the ROCm build (`rocminfo` prints yours): {', '.join(AMD_TARGETS)}." in " ".join(
        page.split()
    )
    assert f"torch {TORCH} " in page
    names = "|".join([AUTO, KEEP, *(build.name for build in BUILDS)])
    assert f"--torch {names}\n" in (ROOT / "start.py").read_text(encoding="utf-8")
