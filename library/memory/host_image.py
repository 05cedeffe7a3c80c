# SPDX-License-Identifier: Apache-2.0
"""All tensors of a module in one contiguous piece of main memory: one copy moves them to the device or back.

    image = HostImage(tensors)        # copies the values into the image
    image.point(image.at_home)        # the tensors are views of the image ...
    image.point(image.views(memory))  # ... or of `memory`, bytes on the device to which the image was copied
    image.point(image.placeholders(device))  # ... or placeholders, which read as NaN

The tensor objects stay the same; only their data changes (`tensor.data = ...`). Two properties of torch matter here:
version counters do not change, and a parameter's gradient accumulator, with its hooks, is kept as long as dtype and
device stay the same. During a step all of these are therefore on the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from library.memory.pinning import Pinning, pages

ALIGNMENT = 256  # bytes, for every tensor; the device's allocator aligns likewise
NOTHING = 0xFF  # every byte of a placeholder: NaN as a float of any width, -1 or the largest integer


@dataclass(frozen=True)
class ImageSlice:
    """A tensor and its position in the image of its module."""

    tensor: Tensor
    start: int  # offset in bytes
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, memory: Tensor) -> Tensor:
        """View of this tensor in `memory`, the bytes of an image."""
        count = self.size.numel() * self.dtype.itemsize
        return memory[self.start : self.start + count].view(self.dtype).as_strided(self.size, self.stride)


class HostImage:
    """Tensors of any dtype in one buffer, those that learn first.

    pinning: locks the buffer in place, so that copies run in parallel with the computation. When that is refused,
    `pinned` is False.
    """

    def __init__(self, tensors: Sequence[Tensor], pinning: Pinning | None = None) -> None:
        ordered = sorted(tensors, key=lambda tensor: not tensor.requires_grad)  # stable
        slices, start, learning = [], 0, 0
        for tensor in ordered:
            # keeps dense strides (channels_last); all others become those of a contiguous tensor
            stride = torch.empty_like(tensor, device="meta").stride()
            slices.append(ImageSlice(tensor, start, tensor.shape, stride, tensor.dtype))
            start += aligned(tensor.numel() * tensor.element_size())
            learning = start if tensor.requires_grad else learning
        self.slices = tuple(slices)
        self.nbytes, self.learning_bytes = start, learning
        self.learning = [tensor for tensor in ordered if isinstance(tensor, nn.Parameter) and tensor.requires_grad]
        self.memory = pages(start)
        unlock = pinning.lock(self.memory) if pinning is not None else None
        self.pinned = unlock is not None
        # unlocks also an image that is dropped without `release`: its addresses may be reused
        self._unlock = weakref.finalize(self, unlock) if unlock is not None else None
        if self._unlock is not None:
            self._unlock.atexit = False
        self.at_home = self.views(self.memory)
        for part, view in zip(self.slices, self.at_home):
            view.copy_(part.tensor.detach())

    def views(self, memory: Tensor) -> list[Tensor]:
        """Views of all tensors in `memory`, a copy of the image."""
        return [part.view(memory) for part in self.slices]

    def placeholders(self, device: torch.device) -> list[Tensor]:
        """Tensors of the same shapes that are expanded from a single NaN, or -1 and the like for integers."""
        return [_nothing(part.dtype, device).expand(part.size) for part in self.slices]

    def point(self, values: Sequence[Tensor]) -> None:
        """Set the data of the tensors to `values`, in the same order."""
        for part, value in zip(self.slices, values):
            part.tensor.data = value

    def bring(self, device: torch.device) -> None:
        """Move the tensors to `device`. When this fails halfway, it can be called again."""
        for part in self.slices:
            part.tensor.data = part.tensor.data.to(device)

    def release(self) -> None:
        """Unlock the memory. Tensors may still be views of it."""
        if self._unlock is not None:
            self._unlock()


def tensors_of(module: nn.Module, without: Collection[int] = ()) -> list[Tensor]:
    """Parameters and buffers of `module`, each once. without: ids of tensors to leave out."""
    found: dict[int, Tensor] = {id(t): t for t in chain(module.parameters(), module.buffers())}
    return [tensor for key, tensor in found.items() if key not in without]


def is_placeholder(tensor: Tensor) -> bool:
    """Whether `tensor`, which has more than one element, is one of `placeholders`."""
    return tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()


def aligned(count: int) -> int:
    """`count` rounded up to a multiple of ALIGNMENT."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-dim tensor of which every byte is NOTHING."""
    if dtype == torch.bool:
        return torch.ones((), dtype=dtype, device=device)
    return torch.full((dtype.itemsize,), NOTHING, dtype=torch.uint8, device=device).view(dtype)[0]
