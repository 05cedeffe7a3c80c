# SPDX-License-Identifier: Apache-2.0
"""Which of the published builds of torch fits a machine, and how pip gets it.

`BUILDS` is the table of facts, for the one torch release that requirements.txt pins. Sources:
- builds and GPU architectures: PyTorch's RELEASE.md, "Release Compatibility Matrix" and "PyTorch CUDA Support Matrix";
  what lies on PyPI for each system was read off PyPI
- drivers: NVIDIA, "CUDA Compatibility", minor version compatibility (12.x: 525, 13.x: 580), and the CUDA 12.0 release
  notes for Windows (528.33)
- AMD targets: torch.cuda.get_arch_list() of the ROCm 7.2 build
- Intel: PyTorch's "Getting Started on Intel GPU"
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from library.errors import UserError, unknown
from library.machine import Machine, Nvidia, NvidiaCard, System

TORCH = "2.13.0"
INDEX = "https://download.pytorch.org/whl"
LINUX, LINUX_ARM, WINDOWS, MACOS = "Linux x86_64", "Linux arm64", "Windows x86_64", "macOS arm64"
AUTO, KEEP = "auto", "keep"

AMD_TARGETS = (
    "gfx900", "gfx906", "gfx908", "gfx90a", "gfx942", "gfx950",
    "gfx1030", "gfx1100", "gfx1101", "gfx1102", "gfx1150", "gfx1151", "gfx1200", "gfx1201",
)  # fmt: skip
_TURING_TO_BLACKWELL = ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0))
_ARM_SERVERS = ((8, 0), (9, 0), (10, 0), (11, 0), (12, 0))


@dataclass(frozen=True)
class Build:
    """One published build of torch. `name`: its folder on pytorch.org's index and its version's local part."""

    name: str
    title: str
    device: str  # what torch calls the device that it is for: cuda (NVIDIA and AMD), xpu, mps, cpu
    systems: tuple[str, ...]
    on_pypi: tuple[str, ...] = ()  # systems whose wheel on PyPI is this build
    driver: dict[str, str] | None = None  # NVIDIA: the oldest driver on Linux and on Windows
    compiled_for: dict[str, tuple[tuple[int, int], ...]] | None = None  # NVIDIA: compute capabilities, by system

    def driver_needed(self, system: System) -> str:
        """The oldest NVIDIA driver that runs it on this system."""
        return (self.driver or {}).get(system.name, "")

    def driver_suffices(self, nvidia: Nvidia, system: System) -> bool:
        """True when the installed driver is new enough."""
        return nvidia.driver_version >= Nvidia(driver=self.driver_needed(system)).driver_version

    def supports(self, card: NvidiaCard, system: System) -> bool:
        """True when it has code for the card. Code for 8.0 runs on 8.x from 8.0 up, and on no other major version."""
        if card.capability is None:
            return True
        major, minor = card.capability
        return any(major == a and minor >= b for a, b in (self.compiled_for or {}).get(system.title, ()))


# Newest first: of the builds that fit, the first is taken. cu132 is PyTorch's experimental one, so only on demand.
BUILDS = (
    Build(
        "cu130", "CUDA 13.0", "cuda", (LINUX, LINUX_ARM, WINDOWS), on_pypi=(LINUX, LINUX_ARM),
        driver={"Linux": "580", "Windows": "580"},
        compiled_for={LINUX: _TURING_TO_BLACKWELL, WINDOWS: _TURING_TO_BLACKWELL, LINUX_ARM: _ARM_SERVERS},
    ),
    Build(
        "cu126", "CUDA 12.6", "cuda", (LINUX, LINUX_ARM, WINDOWS),
        driver={"Linux": "525.60.13", "Windows": "528.33"},
        compiled_for={
            **dict.fromkeys((LINUX, WINDOWS), ((5, 0), (6, 0), (7, 0), (7, 5), (8, 0), (8, 6), (9, 0))),
            LINUX_ARM: ((8, 0), (9, 0)),
        },
    ),
    Build(
        "cu132", "CUDA 13.2", "cuda", (LINUX, LINUX_ARM, WINDOWS),
        driver={"Linux": "580", "Windows": "580"},
        compiled_for={LINUX: _TURING_TO_BLACKWELL, WINDOWS: _TURING_TO_BLACKWELL, LINUX_ARM: _ARM_SERVERS},
    ),
    Build("rocm7.2", "ROCm 7.2", "cuda", (LINUX,)),
    Build("xpu", "Intel XPU", "xpu", (LINUX, WINDOWS)),
    Build("cpu", "CPU", "cpu", (LINUX, LINUX_ARM, WINDOWS), on_pypi=(WINDOWS,)),
    Build("mps", "macOS (mps)", "mps", (MACOS,), on_pypi=(MACOS,)),
)  # fmt: skip
BUILD = {build.name: build for build in BUILDS}
AUTOMATIC_CUDA = (BUILD["cu130"], BUILD["cu126"])


@dataclass(frozen=True)
class TorchChoice:
    """The build for a machine. `card`: the GPU it is for. `advice`: what a person must do before it can be used."""

    build: Build
    system: System
    why: str
    card: str = ""
    advice: str = ""

    @property
    def pip_arguments(self) -> list[str]:
        """Arguments of `pip install`."""
        if self.system.title in self.build.on_pypi:
            return [f"torch=={TORCH}"]
        # with the build's name, so that no other configured index can answer with another build of the same release
        return [f"torch=={TORCH}+{self.build.name}", "--index-url", self.index]

    @property
    def index(self) -> str:
        """The address of pytorch.org's index of this build."""
        return f"{INDEX}/{self.build.name}"

    def __str__(self) -> str:
        """`torch: 2.13.0, CUDA 12.6 build for NVIDIA GeForce RTX 3060 (driver 560.94): why`."""
        return f"torch: {TORCH}, {self.build.title} build{f' for {self.card}' if self.card else ''}: {self.why}"


def fallback_arguments() -> list[str]:
    """Arguments of `pip install` when pytorch.org's index cannot be reached."""
    return [f"torch=={TORCH}"]


def choose_torch(machine: Machine, asked: str = AUTO) -> TorchChoice:
    """The build that fits the machine, or the build with the given name. Raises UserError."""
    builds = builds_for(machine.system)
    if asked not in (AUTO, KEEP):
        check_name(asked, machine.system)
        return _asked_for(BUILD[asked], machine)
    if machine.apple_gpu:
        return TorchChoice(builds[0], machine.system, "PyPI's wheel for Apple silicon uses its GPU", "Apple GPU")
    nvidia = machine.nvidia
    if nvidia and nvidia.cards and (choice := _choose_cuda(nvidia, machine.system)):
        return choice
    if any(card.target in AMD_TARGETS for card in machine.amd) and BUILD["rocm7.2"] in builds:
        return _for_amd(machine)
    if machine.intel and BUILD["xpu"] in builds:
        return TorchChoice(BUILD["xpu"], machine.system, "Intel's discrete GPUs need it", machine.intel[0])
    return TorchChoice(BUILD["cpu"], machine.system, _why_cpu(machine), advice=_cpu_advice(machine))


def builds_for(system: System) -> tuple[Build, ...]:
    """The builds published for a system. Raises UserError if there is none."""
    builds = tuple(build for build in BUILDS if system.title in build.systems)
    if builds:
        return builds
    if system.name == "Darwin":
        raise UserError(
            "macOS: this Python is for Intel processors, for which torch ended with 2.2; on a Mac with Apple silicon "
            "install a Python for arm64, else use Linux or Windows"
        )
    raise UserError(
        f"{system.title}: torch {TORCH} is not published for it, only for {LINUX}, {LINUX_ARM}, {WINDOWS}, {MACOS}"
    )


def check_name(asked: str, system: System) -> None:
    """Raises UserError unless `asked` is a valid --torch on this system."""
    names = [AUTO, KEEP, *(build.name for build in builds_for(system))]
    if asked in BUILD and asked not in names:
        raise UserError(
            f"--torch {asked}: torch {TORCH} has no such build for {system.title}. Known: {', '.join(names)}"
        )
    if asked not in names:
        numbers = [name for name in names if re.fullmatch(r"cu\d+", name)]
        if numbers and re.fullmatch(r"cu\d+", asked):  # letter by letter, cu128 is as near to cu132 as to cu126
            names = [min(numbers, key=lambda name: (name[2:4] != asked[2:4], abs(int(name[2:]) - int(asked[2:]))))]
        raise UserError(unknown("--torch", asked, names, kind="build"))


# ---- reasons --------------------------------------------------------------------------------------------------------


def _choose_cuda(nvidia: Nvidia, system: System) -> TorchChoice | None:
    """The CUDA build for NVIDIA's cards: one that has code for most of them, then one that the driver runs."""
    published = [build for build in AUTOMATIC_CUDA if system.title in build.systems]
    covered = {build.name: [card for card in nvidia.cards if build.supports(card, system)] for build in published}
    most = max((len(cards) for cards in covered.values()), default=0)
    if not most:
        return None
    fitting = [build for build in published if len(covered[build.name]) == most]
    build = next((build for build in fitting if build.driver_suffices(nvidia, system)), fitting[-1])
    card = f"{covered[build.name][0].name} (driver {nvidia.driver})"
    advice = _driver_advice(build, nvidia, system)
    newest = published[0]
    if build == newest:
        why = f"the newest that has code for it; it needs driver {build.driver_needed(system)} or newer"
    elif newest in fitting:
        why = f"{newest.title} would need driver {newest.driver_needed(system)} or newer"
    else:
        lost = next(card for card in covered[build.name] if not newest.supports(card, system))
        which = "this card" if lost is covered[build.name][0] else lost.name
        why = f"{newest.title} has no code for {which} any more"
    left_out = [card.name for card in nvidia.cards if not build.supports(card, system)]
    if left_out:
        why += f"; it has no code for {', '.join(left_out)}, so hide that from torch (CUDA_VISIBLE_DEVICES)"
    return TorchChoice(build, system, why, card, advice)


def _driver_advice(build: Build, nvidia: Nvidia, system: System) -> str:
    if build.driver_suffices(nvidia, system):
        return ""
    return (
        f"driver {nvidia.driver} is too old for the {build.title} build: install NVIDIA's driver "
        f"{build.driver_needed(system)} or newer, then run `python start.py setup` again"
    )


def _for_amd(machine: Machine) -> TorchChoice:
    card = next(card for card in machine.amd if card.target in AMD_TARGETS)
    name = f"{card.name or 'AMD GPU'} ({card.target})"
    return TorchChoice(BUILD["rocm7.2"], machine.system, "AMD's GPUs need it", name)


def _asked_for(build: Build, machine: Machine) -> TorchChoice:
    """A build that a person named, with the card it is for and what is known to be in its way."""
    nvidia, system = machine.nvidia, machine.system
    if build.driver and nvidia and nvidia.cards:
        card = f"{nvidia.cards[0].name} (driver {nvidia.driver})"
        advice = _driver_advice(build, nvidia, system)
        if not build.supports(nvidia.cards[0], system):
            advice = f"the {build.title} build has no code for {nvidia.cards[0].name}: use --torch auto"
        return TorchChoice(build, system, "asked for with --torch", card, advice)
    return TorchChoice(build, system, "asked for with --torch")


def _why_cpu(machine: Machine) -> str:
    if machine.nvidia and machine.nvidia.problem:
        return machine.nvidia.problem
    if machine.nvidia:
        return f"torch {TORCH} has no code for {machine.nvidia.cards[0].name}"
    if machine.amd:
        return f"the ROCm build has no code for {machine.amd[0].target}"
    windows = "; AMD's are used on Linux only" if machine.system.name == "Windows" else ""
    return f"no GPU was found that torch can use{windows}"


def _cpu_advice(machine: Machine) -> str:
    if machine.nvidia and machine.nvidia.problem:
        return "an NVIDIA card is used when nvidia-smi lists it: install its driver, then `python start.py setup`"
    return ""
