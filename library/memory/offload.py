# SPDX-License-Identifier: Apache-2.0
"""What recomputation starts from waits in main memory, copied while the card computes.

    offload = Offload(device, weights=[*denoiser.parameters(), *trained.parameters()])
    offload.keep(...)  # when weights have moved
    with offload.forward():  # around a whole prediction
        pred = model(...)
    loss.backward()

Between forward and backward pass autograd holds the inputs of recomputed blocks. Here each large one is copied to
pinned memory on a stream of its own and leaves the card; the backward pass brings it back on the same stream, and asks
for the one before it at the same time, so that this has arrived when it is needed. Streams wait for events, the host
for nothing. Where memory cannot be pinned (pinning.py) the host waits for the copies. On a CPU device the same is done
with ordinary memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from library.memory.pinning import Pinning

SMALLEST = 1 << 20  # bytes of a storage below which it stays: many small copies cost more than they save


class Pool:
    """Host buffers to be used again: pinning memory is slow, and the same sizes come back in each step."""

    def __init__(self, pinning: Pinning) -> None:
        self.pinning = pinning
        self.free: list[Tensor] = []
        self.made = 0  # bytes, in use or free

    def take(self, size: int) -> Tensor:
        """A buffer of at least `size` bytes, and not of more than twice as many."""
        fitting = [buffer for buffer in self.free if size <= buffer.numel() <= 2 * size]
        if not fitting:
            self.made += size
            return self.pinning.empty(size)
        best = min(fitting, key=Tensor.numel)
        self.free = [buffer for buffer in self.free if buffer is not best]
        return best

    def give(self, buffer: Tensor) -> None:
        self.free.append(buffer)


class Lane:
    """Copies between card and host, one after the other, beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def out(self, source: Tensor, host: Tensor) -> None:
        """Start to copy a card's bytes into `host`; their memory may be let go at once."""
        if self.stream is None:
            host.copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(source, non_blocking=host.is_pinned())  # else the way back might read it too early
        source.record_stream(self.stream)

    def back(self, host: Tensor) -> tuple[Tensor, Any]:
        """Start to copy `host` to the card: (bytes there, what `arrive` wants)."""
        there = torch.empty(host.numel(), dtype=torch.uint8, device=self.device)
        if self.stream is None:
            return there.copy_(host), None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # whoever had this memory before is done then
        with torch.cuda.stream(self.stream):
            there.copy_(host, non_blocking=True)
        there.record_stream(self.stream)
        return there, self.stream.record_event()

    def arrive(self, event: Any) -> None:
        """The computation goes on when the copy is there."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


class Parked:
    """The bytes of one storage in main memory, for as long as something that autograd holds speaks of them."""

    def __init__(self, storage: torch.UntypedStorage, lane: Lane, pool: Pool, before: Parked | None) -> None:
        self.lane, self.pool, self.size = lane, pool, storage.nbytes()
        self.before = None if before is None else weakref.ref(before)
        # the newest stays on the card until the next one is parked: the backward pass wants it first, and at once
        self.there: Tensor | None = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self.event: Any = None
        buffer = pool.take(self.size)
        self.host = buffer[: self.size]
        weakref.finalize(self, pool.give, buffer)
        lane.out(self.there, self.host)

    def leave(self) -> None:
        """Let go of the card's memory."""
        self.there = None

    def fetch(self) -> None:
        """Begin to come back."""
        if self.there is None:
            self.there, self.event = self.lane.back(self.host)

    def bytes(self) -> Tensor:
        """The bytes on the card. The one that was parked before follows."""
        self.fetch()
        self.lane.arrive(self.event)
        before = None if self.before is None else self.before()
        if before is not None:
            before.fetch()
        assert self.there is not None
        return self.there


@dataclass(frozen=True)
class Place:
    """A tensor inside of parked bytes."""

    parked: Parked
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # in elements

    def tensor(self) -> Tensor:
        return self.parked.bytes().view(self.dtype).as_strided(self.size, self.stride, self.offset)


class Offload:
    """Parks what autograd keeps, `weights` excepted (see `keep`). pinning: of the run."""

    def __init__(
        self,
        device: torch.device,
        weights: Iterable[Tensor] = (),
        *,
        smallest: int = SMALLEST,
        pinning: Pinning | None = None,
    ) -> None:
        self.device, self.smallest = device, smallest
        self.lane, self.pool = Lane(device), Pool(pinning or Pinning(device))
        self.keep(weights)
        self._storages: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[Parked]]] = {}
        self._newest: weakref.ref[Parked] | None = None

    def keep(self, weights: Iterable[Tensor]) -> None:
        """These tensors are on the card anyway: their storages stay there. To be said again when some have moved."""
        self.staying = {weight.untyped_storage().data_ptr() for weight in weights}

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Within it, what is saved for the backward pass is parked; without gradients nothing is saved."""
        self._storages.clear()
        self._newest = None
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            yield
        self._storages.clear()  # what holds their addresses until now; the backward pass needs it no more

    def pack(self, tensor: Tensor) -> Tensor | Place:
        """What is held in the place of a tensor that autograd saves."""
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != self.device.type:
            return tensor
        storage = tensor.untyped_storage()
        if storage.nbytes() < self.smallest or storage.data_ptr() in self.staying:
            return tensor
        parked = self._parked(storage, tensor._version)
        return Place(parked, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, packed: Tensor | Place) -> Tensor:
        """The tensor again."""
        return packed.tensor() if isinstance(packed, Place) else packed

    def _parked(self, storage: torch.UntypedStorage, version: int) -> Parked:
        """What holds this storage's bytes: once for all tensors in it, as long as nobody has written into it."""
        known = StorageWeakRef(storage)  # holds the address, so that no other storage can have it
        key = (known.cdata, version)
        found = self._storages[key][1]() if key in self._storages else None
        if found is None:
            before = None if self._newest is None else self._newest()
            found = Parked(storage, self.lane, self.pool, before)
            if before is not None:
                before.leave()
            self._storages[key] = (known, weakref.ref(found))
            self._newest = weakref.ref(found)
        return found
