# SPDX-License-Identifier: Apache-2.0
"""Activation offloading: the inputs of recomputed blocks are moved to main memory while the card computes.

    offload = Offload(device, weights=[*denoiser.parameters(), *trained.parameters()])
    offload.keep(...)  # when weights have moved
    with offload.forward():  # around a whole prediction
        pred = model(...)
    loss.backward()

Between forward and backward pass autograd holds the inputs of recomputed blocks. Each large one is copied to pinned
memory on a separate stream and freed on the card. The backward pass brings it back on the same stream and prefetches
the one before it, so that it has arrived when it is needed. Streams wait for events; the host does not wait. Without
pinned memory (pinning.py) the host waits for the copies. On a CPU device the same is done with ordinary memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from library.memory.pinning import Pinning
from library.memory.ring import CopyQueue, copy_queue

SMALLEST = 1 << 20  # bytes; smaller storages stay on the card: many small copies cost more than they save


class HostBuffers:
    """Reusable host buffers: pinning memory is slow, and every step needs the same sizes."""

    def __init__(self, pinning: Pinning) -> None:
        self.pinning = pinning
        self.free: list[Tensor] = []
        self.made = 0  # bytes of all buffers, in use or free

    def take(self, size: int) -> Tensor:
        """A buffer of at least `size` and at most twice `size` bytes."""
        fitting = [buffer for buffer in self.free if size <= buffer.numel() <= 2 * size]
        if not fitting:
            self.made += size
            return self.pinning.empty(size)
        best = min(fitting, key=Tensor.numel)
        self.free = [buffer for buffer in self.free if buffer is not best]
        return best

    def give(self, buffer: Tensor) -> None:
        self.free.append(buffer)


class ParkedStorage:
    """The bytes of one storage in main memory, kept as long as autograd holds a tensor of that storage."""

    def __init__(
        self, storage: torch.UntypedStorage, copies: CopyQueue, pool: HostBuffers, before: ParkedStorage | None
    ) -> None:
        self.copies, self.pool, self.size = copies, pool, storage.nbytes()
        self.before = None if before is None else weakref.ref(before)
        # the newest one stays on the card until the next is parked: the backward pass needs it first
        there = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self.there: Tensor | None = there
        self.arrival: Any = None  # mark of the copy back
        buffer = pool.take(self.size)
        self.host = buffer[: self.size]
        weakref.finalize(self, pool.give, buffer)
        copies.follow()
        # ordinary memory is copied synchronously: `fetch` might read it too early
        copies.run(partial(self.host.copy_, there, non_blocking=self.host.is_pinned()))
        copies.lend(there)

    def leave(self) -> None:
        """Free the memory on the card."""
        self.there = None

    def fetch(self) -> None:
        """Start to copy the bytes back to the card, unless they are there."""
        if self.there is None:
            self.there = torch.empty(self.size, dtype=torch.uint8, device=self.copies.device)
            self.copies.follow()  # until earlier users of this memory are done
            self.copies.run(partial(self.there.copy_, self.host, non_blocking=True))
            self.copies.lend(self.there)
            self.arrival = self.copies.mark()

    def bytes(self) -> Tensor:
        """The bytes on the card. Prefetches the storage that was parked before this one."""
        self.fetch()
        if self.arrival is not None:
            self.copies.reach(self.arrival)
        before = None if self.before is None else self.before()
        if before is not None:
            before.fetch()
        assert self.there is not None
        return self.there


@dataclass(frozen=True)
class PackedView:
    """A tensor that is a view of parked bytes."""

    parked: ParkedStorage
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # in elements

    def tensor(self) -> Tensor:
        return self.parked.bytes().view(self.dtype).as_strided(self.size, self.stride, self.offset)


class Offload:
    """Parks the tensors that autograd saves, except `weights` (see `keep`). pinning: shared by the whole run."""

    def __init__(
        self,
        device: torch.device,
        weights: Iterable[Tensor] = (),
        *,
        smallest: int = SMALLEST,
        pinning: Pinning | None = None,
    ) -> None:
        self.device, self.smallest = device, smallest
        self.copies, self.pool = copy_queue(device), HostBuffers(pinning or Pinning(device))
        self.keep(weights)
        self._storages: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[ParkedStorage]]] = {}
        self._newest: weakref.ref[ParkedStorage] | None = None

    def keep(self, weights: Iterable[Tensor]) -> None:
        """Never park the storages of these tensors, which stay on the card. Call it again when they have moved."""
        self.staying = {weight.untyped_storage().data_ptr() for weight in weights}

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Inside the context, tensors that autograd saves for the backward pass are parked."""
        self._storages.clear()
        self._newest = None
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            yield
        self._storages.clear()  # releases their addresses; the backward pass does not need these entries

    def pack(self, tensor: Tensor) -> Tensor | PackedView:
        """Pack hook: what autograd keeps in place of a tensor that it saves."""
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != self.device.type:
            return tensor
        storage = tensor.untyped_storage()
        if storage.nbytes() < self.smallest or storage.data_ptr() in self.staying:
            return tensor
        parked = self._parked(storage, tensor._version)
        return PackedView(parked, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, packed: Tensor | PackedView) -> Tensor:
        """Unpack hook: the saved tensor."""
        return packed.tensor() if isinstance(packed, PackedView) else packed

    def _parked(self, storage: torch.UntypedStorage, version: int) -> ParkedStorage:
        """The parked bytes of this storage. All its tensors share them, unless it was written to in between."""
        known = StorageWeakRef(storage)  # keeps the address in use, so that no other storage can have it
        key = (known.cdata, version)
        found = self._storages[key][1]() if key in self._storages else None
        if found is None:
            before = None if self._newest is None else self._newest()
            found = ParkedStorage(storage, self.copies, self.pool, before)
            if before is not None:
                before.leave()
            self._storages[key] = (known, weakref.ref(found))
            self._newest = weakref.ref(found)
        return found
