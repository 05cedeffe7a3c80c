# SPDX-License-Identifier: Apache-2.0
"""Page-locked ("pinned") main memory, which a CUDA device copies by itself; ordinary memory where that is refused.

    pinning = Pinning(device)  # one for a whole run
    buffer = pinning.empty(size)  # pinned by torch's allocator, which rounds up to a power of two
    memory = pages(size)
    unlock = pinning.lock(memory)  # pinned in place, without rounding; None: it stays ordinary memory

A system may refuse either (Windows and WSL above a limit, containers). Copies to and from ordinary memory give the same
bytes, but the computation waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from library.device import is_card, reason_of
from library.log import get_logger

PAGE = 4096  # bytes; the driver locks whole pages
PORTABLE = 1  # cudaHostRegisterPortable: pinned for all contexts

log = get_logger()


class Pinning:
    """Pins main memory for `device`, until the system refuses it for the first time, with one warning."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.active = is_card(device)

    def empty(self, size: int) -> Tensor:
        """A buffer of `size` bytes, pinned if possible."""
        if self.active:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self._refused(size, reason_of(error))
        return torch.empty(size, dtype=torch.uint8)

    def lock(self, memory: Tensor) -> Callable[[], None] | None:
        """Pin memory from `pages` in place. Returns the function that unpins it; None: it stays ordinary memory."""
        if not self.active or self.device.type != "cuda" or not memory.numel():
            return None
        size = -(-memory.numel() // PAGE) * PAGE
        error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, PORTABLE)
        if int(error):
            self._refused(size, torch.cuda.cudart().cudaGetErrorString(error))
            _forget_error(self.device)
            return None
        return partial(_unlock, memory.data_ptr())

    def works(self) -> bool:
        """Whether memory can be pinned. Tries a page, and warns when that is refused."""
        self.empty(PAGE)
        return self.active

    def _refused(self, size: int, reason: str) -> None:
        self.active = False
        log.warning(
            f"the system does not let {size / (1 << 20):.1f} MB of main memory be locked in place for the card "
            f"({reason}): ordinary memory is used from now on, and the card waits for copies"
        )


def pages(size: int) -> Tensor:
    """`size` bytes of main memory on pages of their own."""
    buffer = torch.empty(-(-size // PAGE) * PAGE + PAGE, dtype=torch.uint8)
    start = -buffer.data_ptr() % PAGE
    return buffer[start : start + size]


def _unlock(address: int) -> None:
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


def _forget_error(device: torch.device) -> None:
    """Clear the refusal from the driver's error state, so that the next kernel does not report it."""
    try:
        torch.ones((), device=device).add_(1)
    except RuntimeError as error:
        log.debug(f"forgotten: {error}")
