# SPDX-License-Identifier: Apache-2.0
"""One line about the device of a run, and a warning when a better one is not used."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

from library.log import get_logger
from library.machine import INSTALL_TORCH, System, find_nvidia, main_memory, nvidia_line

log = get_logger()
ENVIRONMENT = Path(__file__).resolve().parents[1] / ".venv"
FP8_PRODUCTS = (8, 9)  # lowest compute capability of NVIDIA cards that multiply matrices in fp8
CPU_WANTED = ("1", "true", "yes", "y", "t", "on")  # values of ACCELERATE_USE_CPU that mean yes to accelerate


def report_device(device: torch.device, *, processes: int, mixed_precision: str) -> None:
    """Log the device of the run. Warn about a card that is not used or that does not support bf16."""
    log.info(f"running on {describe_device(device, processes)}")
    if device.type == "cpu" and (card := unused_card()):
        log.warning(f"TRAINING ON THE CPU, NOT ON THE CARD: {card}")
    if device.type == "cuda" and mixed_precision == "bf16" and not has_bf16(device):
        major, minor = torch.cuda.get_device_capability(device)
        log.warning(
            f"--mixed_precision bf16: {torch.cuda.get_device_name(device)} (compute {major}.{minor}) has no bf16, and "
            "torch emulates it slowly: use --mixed_precision fp16"
        )


# ---- the device -----------------------------------------------------------------------------------------------------


def describe_device(device: torch.device, processes: int = 1) -> str:
    """`cuda:0: NVIDIA GeForce RTX 3060, 12.0 GB, compute 8.6, bf16 yes, fp8 products no, torch 2.13.0 (CUDA 12.8)`."""
    return f"{_names(device, processes)}: {abilities(device)}, torch {torch_build()}"


def torch_build() -> str:
    """Version of torch and the platform of its build: `2.13.0 (CUDA 12.8)`."""
    version = torch.__version__.partition("+")[0]
    kinds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": vars(torch.version).get("xpu")}
    built_for = next((f"{kind} {release}" for kind, release in kinds.items() if release), "CPU build")
    return version if torch.backends.mps.is_built() else f"{version} ({built_for})"


def has_bf16(device: torch.device) -> bool:
    """Whether a card supports bf16 natively."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def has_fp8_products(device: torch.device) -> bool:
    """Whether an NVIDIA card multiplies matrices in fp8. Storing weights in fp8 (--fp8_base) works on every card."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= FP8_PRODUCTS


def abilities(device: torch.device) -> str:
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        parts = [found.name, _gigabytes(found.total_memory), f"compute {found.major}.{found.minor}"]
        parts += [f"bf16 {_yes(has_bf16(device))}", f"fp8 products {_yes(has_fp8_products(device))}"]
        return ", ".join(parts)
    if device.type == "xpu":
        properties = torch.xpu.get_device_properties(device)
        return f"{properties.name}, {_gigabytes(properties.total_memory)}"
    memory = main_memory(System.here())
    parts = [f"Apple {platform.machine()}" if device.type == "mps" else f"{os.cpu_count()} cores"]
    return ", ".join([*parts, _gigabytes(memory.total)] if memory else parts)


def _names(device: torch.device, processes: int) -> str:
    """`cuda:0`, `cuda:0-7 (8 processes)`, `the CPU, where training is slow`."""
    if device.type == "cpu":
        name = "the CPU, where training is slow"
    elif processes == 1 or device.type == "mps":
        name = f"{device.type}:{device.index or 0}"
    else:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        name = f"{device.type}:0-{here - 1}" if here > 1 else f"{device.type}:{device.index or 0}"
    return name if processes == 1 else f"{name} ({processes} processes)"


def _gigabytes(size: int) -> str:
    """Bytes in units of 2^30, which vendors of cards call GB."""
    return f"{size / 2**30:.1f} GB"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


# ---- unused cards ---------------------------------------------------------------------------------------------------


def unused_card() -> str | None:
    """One line about an NVIDIA card that torch cannot use, with the command that fixes it. None: there is no such card.

    Also None when the user asked for the CPU. NVIDIA's driver is queried only when torch sees no card.
    """
    if torch.cuda.is_available() or _cpu_is_wanted():
        return None
    nvidia = find_nvidia(System.here())
    if nvidia is None:
        return None
    if not nvidia.cards:
        return f"{nvidia.problem}; when NVIDIA's driver works: {_mend()}"
    card = nvidia_line(nvidia.cards[0], nvidia.driver)
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return f"torch cannot use {card}: CUDA_VISIBLE_DEVICES={visible} hides it: unset that variable"
    return f"torch cannot use {card}: {_why_unused()}: {_mend()}"


def _cpu_is_wanted() -> bool:
    """Whether environment variables ask for the CPU: no visible cards, or accelerate's variable."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and (not visible.strip() or visible.strip().startswith("-"))
    return hidden or os.environ.get("ACCELERATE_USE_CPU", "").lower() in CPU_WANTED


def _why_unused() -> str:
    """Why torch cannot use a card that the driver lists."""
    if torch.version.cuda is None:
        return f"torch {torch_build()} is not built for CUDA"
    try:
        torch.cuda.init()
    except RuntimeError as error:  # "The NVIDIA driver on your system is too old (found version 11040). Please ..."
        return f"torch {torch_build()} says: {str(error).partition('. ')[0].splitlines()[0]}"
    return f"torch {torch_build()} finds no card"


def _mend() -> str:
    """The command that installs a fitting torch, and the Python to use then."""
    inside = Path(sys.prefix).resolve() == ENVIRONMENT
    return INSTALL_TORCH if inside else f"{INSTALL_TORCH}, then train with the Python in .venv"
