# SPDX-License-Identifier: Apache-2.0
"""Main memory that stays in place, so that a CUDA device copies it by itself; ordinary memory where that is refused.

    pinning = Pinning(device)  # one for a whole run
    buffer = pinning.empty(size)  # pinned by torch's allocator, which rounds up to a power of two
    memory = pages(size)
    unlock = pinning.lock(memory)  # pinned in place, without rounding; None: it is ordinary memory

A system may refuse either (Windows and WSL at a limit of their own, containers). Copies from and to ordinary memory
give the same bytes, but the computation waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from library.device import is_card, reason_of
from library.log import get_logger

PAGE = 4096  # bytes: what the driver locks in place
PORTABLE = 1  # cudaHostRegisterPortable: for every context

log = get_logger()


class Pinning:
    """Pins main memory for `device` until the system refuses it for the first time, which is one warning."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.active = is_card(device)

    def empty(self, size: int) -> Tensor:
        """`size` bytes, pinned where that is possible."""
        if self.active:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self._refused(size, reason_of(error))
        return torch.empty(size, dtype=torch.uint8)

    def lock(self, memory: Tensor) -> Callable[[], None] | None:
        """Lock pages of `pages` in place: what undoes it, or None where they are ordinary memory."""
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
        """Whether a little memory can be pinned now; warns where it cannot."""
        self.empty(PAGE)
        return self.active

    def _refused(self, size: int, reason: str) -> None:
        self.active = False
        log.warning(
            f"the system does not let {size / (1 << 20):.1f} MB of main memory be locked in place for the card "
            f"({reason}): ordinary memory is used from now on, and the card waits for copies"
        )


def pages(size: int) -> Tensor:
    """`size` bytes of main memory, which share no page with anything else."""
    buffer = torch.empty(-(-size // PAGE) * PAGE + PAGE, dtype=torch.uint8)
    start = -buffer.data_ptr() % PAGE
    return buffer[start : start + size]


def _unlock(address: int) -> None:
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


def _forget_error(device: torch.device) -> None:
    """Take the refusal from the driver's record, where the next kernel would find it and fail in its place."""
    try:
        torch.ones((), device=device).add_(1)
    except RuntimeError as error:
        log.debug(f"forgotten: {error}")
