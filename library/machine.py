# SPDX-License-Identifier: Apache-2.0
"""The machine as reported by its system and drivers: operating system, Python, NVIDIA, AMD, Intel and Apple GPUs.

Uses the standard library only, since it runs before anything is installed. Missing or failing tools are reported as
values (`None`, an empty tuple, `Nvidia.problem`), never as exceptions.
"""

from __future__ import annotations

import ctypes
import getpass
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SECONDS_TO_ANSWER = 30  # time limit of a driver's tool: a driver that hangs must not block the set-up
INSTALL_TORCH = "python start.py setup --torch auto"  # with `auto`, since an earlier --torch is remembered
CARD_LINE = re.compile(r"\s*\d+(\.\d+)*\s*,.*,")  # in nvidia-smi's output: 560.94, NVIDIA GeForce RTX 3060, 12288
MOST_SAID = 300  # characters of a tool's error message that are kept
ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "aarch64": "arm64"}  # aliases of x86_64 and arm64

# Discrete Intel GPUs by PCI device id: Alchemist (Arc A, Flex), Battlemage (Arc B), Data Center GPU Max.
# Source: include/drm/intel/pciids.h of the Linux kernel. Integrated graphics have other ids and are left out.
INTEL_DISCRETE = re.compile(r"0x(56[9a-c][0-9a-f]|e2[0-2][0-9a-f]|0b[de][0-9a-f])")
# On Windows, by name: "Arc(TM) B580 Graphics" is a card, "Arc(TM) 140V GPU" and "Arc(TM) Graphics" are not
INTEL_DISCRETE_NAME = re.compile(r"Intel\(R\) Arc\(TM\) (Pro )?[AB]\d{2,3}M? Graphics")


@dataclass(frozen=True)
class System:
    """Operating system, processor and Python."""

    name: str  # value of platform.system(): Linux, Windows, Darwin
    architecture: str  # x86_64 or arm64; for others the system's name
    python: tuple[int, int]
    root: Path = Path("/")  # where /sys and /proc are

    @classmethod
    def here(cls) -> System:
        """This machine and the running Python."""
        architecture = platform.machine().lower()
        if sys.maxsize < 2**32:
            architecture = f"32-bit {architecture}"
        return cls(platform.system(), ARCHITECTURES.get(architecture, architecture), sys.version_info[:2])

    @property
    def title(self) -> str:
        """Name of the system for people: `macOS arm64`."""
        return f"{'macOS' if self.name == 'Darwin' else self.name} {self.architecture}"


@dataclass(frozen=True)
class NvidiaCard:
    """One NVIDIA GPU. None: not reported by the driver."""

    name: str
    memory_mib: int | None
    capability: tuple[int, int] | None  # compute capability, (8, 6)


@dataclass(frozen=True)
class Nvidia:
    """NVIDIA GPUs and driver. problem: why an installed GPU cannot be used, "" when it can."""

    cards: tuple[NvidiaCard, ...] = ()
    driver: str = ""  # "560.94"
    problem: str = ""

    @property
    def driver_version(self) -> tuple[int, ...]:
        """The driver's version as numbers, () when unknown."""
        return tuple(int(part) for part in re.findall(r"\d+", self.driver))


@dataclass(frozen=True)
class AmdCard:
    """One AMD GPU that the kernel's compute driver supports. target: name of its instruction set, such as gfx1100."""

    target: str
    name: str = ""


@dataclass(frozen=True)
class Machine:
    """The system and its GPUs."""

    system: System
    nvidia: Nvidia | None = None  # None: neither a card nor a driver
    amd: tuple[AmdCard, ...] = ()
    intel: tuple[str, ...] = ()  # discrete cards only: integrated graphics are common and slow

    @classmethod
    def here(cls, system: System | None = None) -> Machine:
        """Detect this machine. system: for tests."""
        system = system or System.here()
        nvidia = find_nvidia(system)
        # not with a working NVIDIA card, beside which the result does not matter: Windows takes seconds to list cards
        intel = () if nvidia and nvidia.cards else find_intel(system)
        return cls(system, nvidia, find_amd(system), intel)

    @property
    def apple_gpu(self) -> bool:
        """Whether this is Apple silicon, whose GPU torch calls mps."""
        return self.system.name == "Darwin" and self.system.architecture == "arm64"

    def describe(self) -> list[str]:
        """Lines for people: the system, then each GPU."""
        lines = [f"{self.system.title}, Python {'.'.join(map(str, self.system.python))}"]
        if self.nvidia:
            lines += [nvidia_line(card, self.nvidia.driver) for card in self.nvidia.cards]
            lines += [f"NVIDIA: {self.nvidia.problem}"] if self.nvidia.problem else []
        lines += [f"{card.name or 'AMD GPU'} ({card.target})" for card in self.amd]
        lines += list(self.intel)
        lines += ["Apple GPU (mps)"] if self.apple_gpu else []
        return lines


def nvidia_line(card: NvidiaCard, driver: str) -> str:
    """`NVIDIA GeForce RTX 3060, 12288 MiB, compute capability 8.6, driver 560.94`, without unknown parts."""
    parts = [card.name]
    parts += [f"{card.memory_mib} MiB"] if card.memory_mib is not None else []
    parts += [f"compute capability {card.capability[0]}.{card.capability[1]}"] if card.capability else []
    return ", ".join([*parts, f"driver {driver}"])


# ---- NVIDIA ---------------------------------------------------------------------------------------------------------


def find_nvidia(system: System) -> Nvidia | None:
    """The machine's NVIDIA cards, according to nvidia-smi or, without it, to the PCI bus. None: there are none."""
    if system.name == "Darwin":
        return None  # there is no NVIDIA driver for macOS
    tool = nvidia_smi(system)
    if tool is None:
        if any(vendor == "0x10de" for vendor, _ in _display_devices(system)):
            return Nvidia(problem="there is an NVIDIA card, but nvidia-smi was not found: NVIDIA's driver is missing")
        return None
    return ask_nvidia_smi(tool)


def nvidia_smi(system: System) -> str | None:
    """The path of nvidia-smi, from PATH or the folder where the driver installs it. None: not found."""
    if found := shutil.which("nvidia-smi"):
        return found
    if system.name == "Windows":
        windows = Path(os.environ.get("SYSTEMROOT", r"C:\Windows"))
        programs = Path(os.environ.get("PROGRAMFILES", r"C:\Program Files"))
        places = [windows / "System32/nvidia-smi.exe", programs / "NVIDIA Corporation/NVSMI/nvidia-smi.exe"]
    else:
        places = [system.root / "usr/bin/nvidia-smi", system.root / "usr/lib/wsl/lib/nvidia-smi"]
    return next((str(place) for place in places if place.is_file()), None)


def ask_nvidia_smi(tool: str) -> Nvidia:
    """The cards and the driver's version according to nvidia-smi."""
    fields = ["driver_version", "name", "memory.total", "compute_cap"]
    code, text = _ask([tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"])
    if code and "compute_cap" in text:  # drivers before 510 do not have this field
        code, text = _ask([tool, f"--query-gpu={','.join(fields[:3])}", "--format=csv,noheader,nounits"])
    # a card's line starts with the driver's version; warnings also contain commas
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if CARD_LINE.match(line)]
    if code or not rows:
        said = " ".join(text.split())[:MOST_SAID] or f"it ended with code {code}"
        return Nvidia(problem=f"nvidia-smi found no card: {said}")
    return Nvidia(tuple(_card(row) for row in rows), rows[0][0])


def _card(row: list[str]) -> NvidiaCard:
    capability = re.fullmatch(r"(\d+)\.(\d+)", row[3]) if len(row) > 3 else None
    return NvidiaCard(
        name=row[1] if row[1].startswith("NVIDIA") else f"NVIDIA {row[1]}",  # older drivers omit it
        memory_mib=int(row[2]) if row[2].isdecimal() else None,  # "[N/A]" for memory shared with the processor
        capability=(int(capability[1]), int(capability[2])) if capability else None,
    )


# ---- AMD and Intel --------------------------------------------------------------------------------------------------


def find_amd(system: System) -> tuple[AmdCard, ...]:
    """AMD GPUs that can compute, according to rocminfo or the kernel's list (Linux only)."""
    if system.name != "Linux":
        return ()
    if tool := shutil.which("rocminfo"):
        code, text = _ask([tool])
        if not code:
            return tuple(_rocminfo_cards(text))
    cards = []
    for file in sorted(system.root.glob("sys/class/kfd/kfd/topology/nodes/*/properties")):
        found = re.search(r"^gfx_target_version (\d+)", _read(file), re.MULTILINE)
        version = int(found[1]) if found else 0  # 100300 for gfx1030, 90010 for gfx90a, 0 for a processor
        if version:
            cards.append(AmdCard(f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"))
    return tuple(cards)


def _rocminfo_cards(text: str) -> list[AmdCard]:
    """The GPUs among the agents in rocminfo's output."""
    cards = []
    for agent in re.split(r"\n\*+\s*\nAgent \d+", text)[1:]:
        target = re.search(r"^\s*Name:\s*(gfx\w+)", agent, re.MULTILINE)
        name = re.search(r"^\s*Marketing Name:\s*(.*?)\s*$", agent, re.MULTILINE)
        if target:
            cards.append(AmdCard(target[1], name[1] if name else ""))
    return cards


def find_intel(system: System) -> tuple[str, ...]:
    """Discrete Intel GPUs (Arc A and B, Flex, Max)."""
    if system.name == "Windows":
        return tuple(name for name in _windows_display_names() if INTEL_DISCRETE_NAME.search(name))
    devices = [device for vendor, device in _display_devices(system) if vendor == "0x8086"]
    return tuple(f"Intel GPU {device}" for device in devices if INTEL_DISCRETE.fullmatch(device))


def _display_devices(system: System) -> list[tuple[str, str]]:
    """(vendor, device) of every display and 3D controller on the PCI bus (Linux)."""
    found = []
    for folder in sorted(system.root.glob("sys/bus/pci/devices/*")):
        if _read(folder / "class").startswith("0x03"):
            found.append((_read(folder / "vendor").strip(), _read(folder / "device").strip()))
    return found


def _windows_display_names() -> list[str]:
    shell = shutil.which("powershell")
    if shell is None:
        return []
    command = "Get-CimInstance Win32_VideoController | Select-Object -ExpandProperty Name"
    code, text = _ask([shell, "-NoProfile", "-NonInteractive", "-Command", command])
    return [] if code else [line.strip() for line in text.splitlines()]


# ---- main memory ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MainMemory:
    """Bytes of main memory. free: bytes available to programs now, None when the system does not report it."""

    total: int
    free: int | None


def main_memory(system: System) -> MainMemory | None:
    """The machine's main memory, None when it is unknown."""
    if system.name == "Linux":
        found = dict(line.split(":", 1) for line in _read(system.root / "proc/meminfo").splitlines() if ":" in line)
        kibibytes = {name: int(found[name].split()[0]) for name in ("MemTotal", "MemAvailable") if name in found}
        return MainMemory(*(1024 * count for count in kibibytes.values())) if len(kibibytes) == 2 else None
    if system.name == "Darwin":
        code, text = _ask(["sysctl", "-n", "hw.memsize"])
        return MainMemory(int(text), None) if code == 0 and text.strip().isdigit() else None
    return _windows_memory() if system.name == "Windows" else None


def _windows_memory() -> MainMemory | None:
    """Main memory by kernel32's GlobalMemoryStatusEx, whose structure has two 32-bit and seven 64-bit numbers."""
    status = (ctypes.c_uint64 * 8)()
    ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
    kernel = getattr(getattr(ctypes, "windll", None), "kernel32", None)
    if kernel is None or not kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return MainMemory(status[1], status[2])


# ---- helpers --------------------------------------------------------------------------------------------------------


def _read(file: Path) -> str:
    """Text of a file, "" when it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _ask(command: list[str]) -> tuple[int, str]:
    """Exit code and output of a driver's tool; -1 when it does not start or does not finish in time."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=SECONDS_TO_ANSWER, encoding="utf-8", errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1, f"it did not answer within {SECONDS_TO_ANSWER} s"
    except OSError as error:
        return -1, f"it did not start: {error.strerror or error}"
    return done.returncode, done.stdout


def private(text: str) -> str:
    """Replace the home folder and the user's name in a text by ~."""
    try:
        homes = {str(Path.home()), str(Path.home().resolve())}
    except RuntimeError:  # neither HOME nor a user whom the system knows
        homes = set()
    for home in sorted((home for home in homes if len(home) > 1), key=len, reverse=True):
        text = re.sub(re.escape(home) + r"(?![\w-])", "~", text)
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user whom the system does not know, in a container
        user = ""
    # also other users' folders: with sudo, or in a container, the project may lie in one
    text = re.sub(r"(?i)(?<![\w.-])((?:[A-Z]:)?[/\\](?:home|Users)[/\\])[^/\\\s]+", r"\1~", text)
    if not user:
        return text
    text = re.sub(rf"(?<=torchinductor_){re.escape(user)}(?![\w.-])", "~", text)  # torch's name of its own cache
    return re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\\s]|$)", "~", text)
