# SPDX-License-Identifier: Apache-2.0
"""A few buffers on the device that images from main memory share, one after the other.

On a CUDA device copies run on separate streams, ordered by events, and the host never waits:

    in    image -> slot   after everything queued on the computation's stream so far (which includes the last use of
                          the slot), and after all copies out so far (the slot's last one, and the image's own)
    use                   after the copy in
    out   slot -> image   after the computation (the update), in parallel with copies in

On a CPU the same steps are plain copies. Images that are not pinned are copied synchronously: a copy out is complete
when the call returns, so that a later copy in, which may read the image at once, finds it complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.memory.host_image import HostImage

# ---- streams for copies ---------------------------------------------------------------------------------------------


class CopyQueue:
    """A queue of copies. This base class runs them synchronously, in the computation itself."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def follow(self, *others: CopyQueue) -> None:
        """Order later copies after everything queued so far on the computation's stream and on these queues."""

    def run(self, function: Callable[[], Any]) -> None:
        function()

    def mark(self) -> Any:
        """A mark after everything queued so far, for `reach`. None: it is complete."""
        return None

    def reach(self, mark: Any) -> None:
        """Let the computation wait for `mark`."""

    def finish(self) -> None:
        """Wait on the host until everything queued is complete."""

    def lend(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor that the computation may free until everything queued so far is complete."""


class CudaCopyQueue(CopyQueue):
    """A queue of copies on a CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)
        self.stalls: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = None  # a list: waits are measured

    def follow(self, *others: CopyQueue) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        for other in others:
            assert isinstance(other, CudaCopyQueue)
            self.stream.wait_stream(other.stream)

    def run(self, function: Callable[[], Any]) -> None:
        with torch.cuda.stream(self.stream):
            function()

    def mark(self) -> torch.cuda.Event:
        return self.stream.record_event()

    def reach(self, mark: torch.cuda.Event) -> None:
        computation = torch.cuda.current_stream(self.device)
        if self.stalls is None:
            computation.wait_event(mark)
            return
        before = computation.record_event(torch.cuda.Event(enable_timing=True))
        computation.wait_event(mark)
        self.stalls.append((before, computation.record_event(torch.cuda.Event(enable_timing=True))))

    def finish(self) -> None:
        self.stream.synchronize()

    def lend(self, tensor: Tensor) -> None:
        tensor.record_stream(self.stream)

    def stalled(self) -> float:
        """Seconds that the computation has waited for marks since `stalls` became a list. Synchronizes the device."""
        torch.cuda.synchronize(self.device)
        return sum(before.elapsed_time(after) for before, after in self.stalls or ()) / 1000


def copy_queue(device: torch.device) -> CopyQueue:
    """A queue of copies between main memory and a device."""
    return CudaCopyQueue(device) if device.type == "cuda" else CopyQueue(device)


# ---- slots ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class RingSlot:
    """A buffer, and the image that is in it or being copied into it."""

    number: int
    memory: Tensor  # uint8
    holds: int | None = None  # index of the image
    arrival: Any = None  # mark that the computation has not waited for yet


class Ring:
    """`count` slots, each as large as the largest image. An image may belong to one ring only."""

    new_queue = staticmethod(copy_queue)

    def __init__(self, images: Sequence[HostImage], device: torch.device, count: int) -> None:
        self.images = images
        self.nbytes_of_slot = max((image.nbytes for image in images), default=0)
        memories = [torch.empty(self.nbytes_of_slot, dtype=torch.uint8, device=device) for _ in range(count)]
        self.slots = [RingSlot(number, memory) for number, memory in enumerate(memories)]
        self.copies = 0  # into slots
        self.copies_home = 0
        self.queue_in, self.queue_out = (self.new_queue(device) for _ in range(2))
        self._by_address = {s.memory.untyped_storage().data_ptr(): s for s in self.slots if self.nbytes_of_slot}
        self._where: dict[int, RingSlot] = {}
        # made once: making views takes longer than assigning them
        self._views = [[image.views(slot.memory) for slot in self.slots] for image in images]
        self._nowhere = [image.placeholders(device) for image in images]
        for slot in self.slots:
            self.emptied(slot)
        for image, nowhere in zip(images, self._nowhere):
            image.point(nowhere)

    def emptied(self, slot: RingSlot) -> None:
        """Called when a slot's bytes become meaningless: when it is made and before each copy in. For tests."""

    @property
    def nbytes(self) -> int:
        """Bytes of the device that the slots take."""
        return self.nbytes_of_slot * len(self.slots)

    def slot_of(self, index: int) -> RingSlot | None:
        """The slot that holds image `index`, None when there is none."""
        return self._where.get(index)

    def slot_in(self, tensor: Tensor) -> RingSlot | None:
        """The slot that `tensor` is a view of, None when there is none."""
        return self._by_address.get(tensor.untyped_storage().data_ptr())

    def arrange(self, wanted: Sequence[int], before_leaving: Callable[[int], bool]) -> None:
        """Start to copy the images `wanted` into slots, in order, unless they are there.

        wanted: at most as many as there are slots. before_leaving: called with the index of an image that loses its
        slot; returns True when its learning part must be copied home.
        """
        for index in wanted:
            if index in self._where:
                continue
            slot = next((s for s in self.slots if s.holds is None), None)
            if slot is None:
                slot = next(s for s in self.slots if s.holds not in wanted)
                self._vacate(slot, before_leaving)
            self._load(index, slot)

    def use(self, index: int) -> RingSlot:
        """Let the computation wait for image `index`, which must be in a slot or on its way. Returns the slot."""
        slot = self._where[index]
        if slot.arrival is not None:
            self.queue_in.reach(slot.arrival)
            slot.arrival = None
        return slot

    def vacate_all(self, before_leaving: Callable[[int], bool]) -> None:
        """Empty all slots and wait on the host until all copies are complete, and with them the images."""
        for slot in self.slots:
            if slot.holds is not None:
                self._vacate(slot, before_leaving)
        self.queue_in.finish()
        self.queue_out.finish()

    def _load(self, index: int, slot: RingSlot) -> None:
        image = self.images[index]
        self.queue_in.follow(self.queue_out)
        self.queue_in.run(lambda: self.emptied(slot))
        self.queue_in.run(lambda: slot.memory[: image.nbytes].copy_(image.memory, non_blocking=True))
        slot.arrival = self.queue_in.mark()
        self.copies += image.nbytes > 0
        slot.holds, self._where[index] = index, slot
        image.point(self._views[index][slot.number])

    def _vacate(self, slot: RingSlot, before_leaving: Callable[[int], bool]) -> None:
        assert slot.holds is not None
        index, image = slot.holds, self.images[slot.holds]
        if before_leaving(index):
            part = slice(0, image.learning_bytes)
            self.queue_out.follow()
            self.queue_out.run(lambda: image.memory[part].copy_(slot.memory[part], non_blocking=image.pinned))
            self.copies_home += 1
        image.point(self._nowhere[index])
        del self._where[index]
        slot.holds = slot.arrival = None
