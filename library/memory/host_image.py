# SPDX-License-Identifier: Apache-2.0
"""All tensors of a module side by side in one piece of main memory: one copy moves them to the device, or back.

    image = HostImage(tensors)        # the values go into the image
    image.point(image.at_home)        # the tensors are the image ...
    image.point(image.views(memory))  # ... or lie in `memory`, some bytes of the device that the image was copied to
    image.point(image.placeholders(device))  # ... or are nowhere: whoever reads them meets NaN

The tensors themselves stay the objects that they are; only what they point to changes (`tensor.data = ...`). What
matters of torch's rules for that: their version counters do not move, and a parameter's gradient accumulator, with the
hooks on it, lives on as long as dtype and device stay. So what stands in during a step is always on the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.memory.pinning import Pinning, pages

ALIGNMENT = 256  # bytes: of every tensor, as the device's own allocations are
NOTHING = 0xFF  # each byte of what must not be read: NaN as a float of any width, -1 or the largest as an integer


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the image of its module."""

    tensor: Tensor
    start: int  # byte
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, memory: Tensor) -> Tensor:
        """This tensor within `memory`, the bytes of an image."""
        count = self.size.numel() * self.dtype.itemsize
        return memory[self.start : self.start + count].view(self.dtype).as_strided(self.size, self.stride)


class HostImage:
    """Tensors of any dtype in one buffer, those that learn first.

    pinning: locks the buffer in place, for copies beside the computation. Where it refuses, `pinned` is False.
    """

    def __init__(self, tensors: Sequence[Tensor], pinning: Pinning | None = None) -> None:
        ordered = sorted(tensors, key=lambda tensor: not tensor.requires_grad)  # stable
        places, start, learning = [], 0, 0
        for tensor in ordered:
            # dense strides are kept (channels_last), all others become those of a contiguous tensor
            stride = torch.empty_like(tensor, device="meta").stride()
            places.append(Place(tensor, start, tensor.shape, stride, tensor.dtype))
            start += aligned(tensor.numel() * tensor.element_size())
            learning = start if tensor.requires_grad else learning
        self.places = tuple(places)
        self.nbytes, self.learning_bytes = start, learning
        self.learning = [tensor for tensor in ordered if isinstance(tensor, nn.Parameter) and tensor.requires_grad]
        self.memory = pages(start)
        unlock = pinning.lock(self.memory) if pinning is not None else None
        self.pinned = unlock is not None
        # also where an image is dropped without `release`: the system may give its addresses to the next one
        self._unlock = weakref.finalize(self, unlock) if unlock is not None else None
        if self._unlock is not None:
            self._unlock.atexit = False
        self.at_home = self.views(self.memory)
        for place, view in zip(self.places, self.at_home):
            view.copy_(place.tensor.detach())

    def views(self, memory: Tensor) -> list[Tensor]:
        """All tensors within `memory`, a copy of the image."""
        return [place.view(memory) for place in self.places]

    def placeholders(self, device: torch.device) -> list[Tensor]:
        """As many numbers as each tensor has, all in the same few bytes: NaN, or what an integer has instead."""
        return [_nothing(place.dtype, device).expand(place.size) for place in self.places]

    def point(self, values: Sequence[Tensor]) -> None:
        """From now on the tensors are `values`, in their order."""
        for place, value in zip(self.places, values):
            place.tensor.data = value

    def bring(self, device: torch.device) -> None:
        """Move the tensors to `device`, where they stay. Whatever stops this halfway, it can be done again."""
        for place in self.places:
            place.tensor.data = place.tensor.data.to(device)

    def release(self) -> None:
        """Unlock the memory. The tensors may go on lying in it."""
        if self._unlock is not None:
            self._unlock()


def tensors_of(module: nn.Module, without: Collection[int] = ()) -> list[Tensor]:
    """Parameters and buffers of `module`, each once. without: ids of tensors that someone else takes care of."""
    found: dict[int, Tensor] = {id(t): t for t in _all_tensors(module)}
    return [tensor for key, tensor in found.items() if key not in without]


def is_placeholder(tensor: Tensor) -> bool:
    """Whether `tensor` (of several numbers) is one of `placeholders`."""
    return tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()


def aligned(count: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def _all_tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """One number of which every byte is NOTHING."""
    if dtype == torch.bool:
        return torch.ones((), dtype=dtype, device=device)
    return torch.full((dtype.itemsize,), NOTHING, dtype=torch.uint8, device=device).view(dtype)[0]
