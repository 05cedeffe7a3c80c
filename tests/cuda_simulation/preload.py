# SPDX-License-Identifier: Apache-2.0
"""The card's library in this process: loaded before torch is imported, since torch asks for its hooks once."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

TORCH_LIBRARIES = ("libc10.so", "libtorch_cpu.so", "libtorch.so")  # they define what the card's library uses
FUNCTIONS: dict[str, tuple[type | None, list[type]]] = {
    "total": (c_int64, []),
    "allocated": (c_int64, []),
    "peak": (c_int64, []),
    "reset_peak": (None, []),
    "set_limit": (None, [c_int64]),
    "limit": (c_int64, []),
    "waits": (c_int64, []),
    "host_waits": (None, []),
    "set_sync_mode": (None, [c_int]),
    "sync_mode": (c_int, []),
    "register": (c_bool, [c_void_p, c_size_t]),
    "unregister": (c_bool, [c_void_p]),
    "is_registered": (c_bool, [c_void_p]),
    "is_pinned": (c_bool, [c_void_p]),
}


class Card:
    """The functions of card.cpp's interface, by their names without `card_`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, (result, arguments) in FUNCTIONS.items():
            function = library[f"card_{name}"]
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:  # for type checkers: all are set above
        raise AttributeError(name)


def load(path: Path, torch_libraries: Path) -> Card:
    """Load the library that `build()` made, into a process that has not imported torch."""
    for name in TORCH_LIBRARIES:
        ctypes.CDLL(str(torch_libraries / name), mode=ctypes.RTLD_GLOBAL)
    return Card(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))
