# SPDX-License-Identifier: Apache-2.0
"""The functions of torch._C and cudart that a CUDA build of torch has, for the simulated card.

Above them torch.cuda is torch's own Python: it checks arguments, initialises late and raises as on any card.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tests.cuda_simulation.preload import Card
from tests.cuda_simulation.streams import CUDA, STREAMS, Event, Stream

CUDA_VERSION = "12.8"  # of torch's build, as far as libraries ask
SUCCESS, INVALID_VALUE, ALREADY_REGISTERED, NOT_REGISTERED = 0, 1, 712, 713  # of CUDA's runtime


@dataclass(frozen=True)
class Properties:
    """torch.cuda.get_device_properties."""

    total_memory: int
    name: str = "Simulated card"
    major: int = 9
    minor: int = 0
    multi_processor_count: int = 8
    warp_size: int = 32
    max_threads_per_multi_processor: int = 2048
    regs_per_multiprocessor: int = 65536
    shared_memory_per_multiprocessor: int = 233472
    shared_memory_per_block: int = 49152
    shared_memory_per_block_optin: int = 232448
    L2_cache_size: int = 50 << 20
    is_integrated: bool = False
    is_multi_gpu_board: bool = False
    gcnArchName: str = ""


def install(card: Card) -> None:
    """Make "cuda" the simulated card. To be called once, right after torch was imported."""
    for name, function in {**device_functions(), **memory_functions(card), **stream_functions(card)}.items():
        setattr(torch._C, f"_cuda_{name}", function)
    cuda: Any = torch.cuda
    cuda._exchange_device = torch._C._cuda_exchangeDevice
    cuda._maybe_exchange_device = torch._C._cuda_maybeExchangeDevice
    cuda._cudart = Cudart(card)
    cuda.Stream, cuda.Event = cuda.streams.Stream, cuda.streams.Event = Stream, Event
    torch._C._cuda_init = lambda: initialise(card)  # type: ignore[attr-defined]
    torch.version.cuda = CUDA_VERSION


def installed() -> Card:
    """The card of this process."""
    return torch.cuda._cudart.card  # type: ignore[attr-defined,union-attr]


def initialise(card: Card) -> None:
    """What torch's C++ does when the card is first used."""
    generator = torch.Generator("cuda")
    torch.ops.simulated_card.set_default_generator(generator)
    properties = Properties(card.total())
    cuda: Any = torch.cuda
    cuda.default_generators = (generator,)
    cuda._get_device_properties = lambda device: properties


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """As on a machine without a card, for libraries that look for one when they are imported."""
    count, version = torch._C._cuda_getDeviceCount, torch.version.cuda
    torch._C._cuda_getDeviceCount, torch.version.cuda = (lambda: 0), None
    try:
        yield
    finally:
        torch._C._cuda_getDeviceCount, torch.version.cuda = count, version
        torch.cuda._cached_device_count = None  # a library may have asked for it


# ---- functions of torch._C, without `_cuda_` ------------------------------------------------------------------------


def checked_device(device: int) -> int:
    """The device that was current; RuntimeError for one that the machine does not have."""
    if device > 0:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return 0


def device_functions() -> dict[str, Callable[..., Any]]:
    return {
        "getDeviceCount": lambda: 1,
        "getDevice": lambda: 0,
        "setDevice": lambda device: checked_device(device) and None,
        "exchangeDevice": lambda device: checked_device(device),  # two functions: they are keys of dynamo's
        "maybeExchangeDevice": lambda device: checked_device(device),
        "isInBadFork": lambda: False,
        "getCompiledVersion": lambda: 12080,
        "getArchFlags": lambda: "sm_90",
        "canDeviceAccessPeer": lambda device, peer: False,
        "ipc_collect": lambda: None,
        "isCurrentStreamCapturing": lambda: False,
        "clearCublasWorkspaces": lambda: None,
    }


def memory_functions(card: Card) -> dict[str, Callable[..., Any]]:
    return {
        "emptyCache": lambda: None,  # nothing is kept
        "memoryStats": lambda device: memory_stats(card),
        "resetPeakMemoryStats": lambda device: card.reset_peak(),
        "resetAccumulatedMemoryStats": lambda device: None,
        "setMemoryFraction": lambda fraction, device: card.set_limit(int(fraction * card.total())),
        "getMemoryFraction": lambda device: card.limit() / card.total(),
        "getAllocatorBackend": lambda: "native",
    }


def memory_stats(card: Card) -> dict[str, Any]:
    """What torch.cuda.memory_stats flattens. Nothing is reserved beyond what is allocated."""
    used = {"current": card.allocated(), "peak": card.peak(), "allocated": 0, "freed": 0}
    kinds = ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes")
    return {kind: {"all": dict(used)} for kind in kinds} | {"num_alloc_retries": 0, "num_ooms": 0}


def stream_functions(card: Card) -> dict[str, Callable[..., Any]]:
    def set_stream(stream_id: int, device_index: int, device_type: int) -> None:
        STREAMS.current = stream_id

    def synchronize() -> None:
        card.host_waits()
        STREAMS.host_waits_for_all()

    return {
        "getCurrentStream": lambda device: (STREAMS.current, 0, CUDA),
        "getDefaultStream": lambda device: (0, 0, CUDA),
        "getCurrentRawStream": lambda device: STREAMS.current,
        "setStream": set_stream,
        "synchronize": synchronize,
        # not the functions of ctypes themselves: dynamo keeps those of torch._C as keys, and they have no hash
        "set_sync_debug_mode": lambda mode: card.set_sync_mode(mode),
        "get_sync_debug_mode": lambda: card.sync_mode(),
    }


class Cudart:
    """torch.cuda.cudart()."""

    class cudaError(int):
        success = SUCCESS

    def __init__(self, card: Card) -> None:
        self.card = card

    def cudaMemGetInfo(self, device: int) -> tuple[int, int]:
        return self.card.total() - self.card.allocated(), self.card.total()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        return SUCCESS if self.card.register(address, size) else ALREADY_REGISTERED

    def cudaHostUnregister(self, address: int) -> int:
        return SUCCESS if self.card.unregister(address) else NOT_REGISTERED

    def cudaGetErrorString(self, error: int) -> str:
        return f"CUDA error {int(error)} of the simulated card"
