# SPDX-License-Identifier: Apache-2.0
"""A few buffers on the device, through which images of main memory pass one after the other.

On a CUDA device copies run on streams of their own, ordered by events, and the host never waits:

    in    image -> slot   after all that the computation was told so far (what used the slot before is among it),
                          and after all ways out so far (the slot's last one, and the image's own)
    use                   after the way in
    out   slot -> image   after the computation (the update), beside the ways in

On a CPU the same steps are plain copies. Images that are not pinned are copied with the host's help: a way out is done
when the call returns, so that a later way in, which may read the image at once, finds it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from library.memory.host_image import HostImage

# ---- ways -----------------------------------------------------------------------------------------------------------


class Way:
    """Where copies run one after the other. This one is the computation itself: a step is done when it is told."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def follow(self, *others: Way) -> None:
        """What is told from now on begins after what the computation, and these ways, were told so far."""

    def run(self, function: Callable[[], Any]) -> None:
        function()

    def mark(self) -> Any:
        """A point that `reach` can wait for: what was told so far. None: it is done."""
        return None

    def reach(self, mark: Any) -> None:
        """What the computation is told from now on begins after `mark`."""

    def finish(self) -> None:
        """The host waits until all is done."""


class CudaWay(Way):
    """A stream."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)
        self.stalls: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = None  # a list: measure

    def follow(self, *others: Way) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        for other in others:
            assert isinstance(other, CudaWay)
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

    def stalled(self) -> float:
        """Seconds for which the computation has waited for marks since `stalls` is a list. The host waits, too."""
        torch.cuda.synchronize(self.device)
        return sum(before.elapsed_time(after) for before, after in self.stalls or ()) / 1000


# ---- slots ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Slot:
    """A buffer, and whose image is in it or on its way into it."""

    number: int
    memory: Tensor  # uint8
    holds: int | None = None
    arrival: Any = None  # what the computation has yet to wait for


class Ring:
    """`count` slots as large as the largest image, for images of any kind. One Ring has all images to itself."""

    ways: ClassVar[dict[str, type[Way]]] = {"cuda": CudaWay}  # kind of device -> what copies run on

    def __init__(self, images: Sequence[HostImage], device: torch.device, count: int) -> None:
        self.images = images
        self.nbytes_of_slot = max((image.nbytes for image in images), default=0)
        memories = [torch.empty(self.nbytes_of_slot, dtype=torch.uint8, device=device) for _ in range(count)]
        self.slots = [Slot(number, memory) for number, memory in enumerate(memories)]
        self.copies = 0  # into slots
        self.copies_home = 0
        self.way_in, self.way_out = (self.ways.get(device.type, Way)(device) for _ in range(2))
        self._by_address = {s.memory.untyped_storage().data_ptr(): s for s in self.slots if self.nbytes_of_slot}
        self._where: dict[int, Slot] = {}
        # made once: making views takes longer than pointing to them
        self._views = [[image.views(slot.memory) for slot in self.slots] for image in images]
        self._nowhere = [image.placeholders(device) for image in images]
        for slot in self.slots:
            self.emptied(slot)
        for image, nowhere in zip(images, self._nowhere):
            image.point(nowhere)

    def emptied(self, slot: Slot) -> None:
        """A slot's bytes mean nothing now: when it is made, and before each way in. Tests poison them here."""

    def slot_of(self, index: int) -> Slot | None:
        """The slot that holds image `index`, or None."""
        return self._where.get(index)

    def slot_in(self, tensor: Tensor) -> Slot | None:
        """The slot that `tensor` lies in, or None."""
        return self._by_address.get(tensor.untyped_storage().data_ptr())

    def arrange(self, wanted: Sequence[int], before_leaving: Callable[[int], bool]) -> None:
        """Send the images `wanted` (at most as many as there are slots) on their way, in order, unless they are there.

        before_leaving(index): image `index` loses its slot; True: its learning part is to be copied home.
        """
        for index in wanted:
            if index in self._where:
                continue
            slot = next((s for s in self.slots if s.holds is None), None)
            if slot is None:
                slot = next(s for s in self.slots if s.holds not in wanted)
                self._vacate(slot, before_leaving)
            self._load(index, slot)

    def use(self, index: int) -> Slot:
        """Let the computation wait for image `index`, which is there or on its way."""
        slot = self._where[index]
        if slot.arrival is not None:
            self.way_in.reach(slot.arrival)
            slot.arrival = None
        return slot

    def vacate_all(self, before_leaving: Callable[[int], bool]) -> None:
        """Empty all slots. Afterwards every image is whole: the host waits for the ways under way."""
        for slot in self.slots:
            if slot.holds is not None:
                self._vacate(slot, before_leaving)
        self.way_in.finish()
        self.way_out.finish()

    def _load(self, index: int, slot: Slot) -> None:
        image = self.images[index]
        self.way_in.follow(self.way_out)
        self.way_in.run(lambda: self.emptied(slot))
        self.way_in.run(lambda: slot.memory[: image.nbytes].copy_(image.memory, non_blocking=True))
        slot.arrival = self.way_in.mark()
        self.copies += image.nbytes > 0
        slot.holds, self._where[index] = index, slot
        image.point(self._views[index][slot.number])

    def _vacate(self, slot: Slot, before_leaving: Callable[[int], bool]) -> None:
        assert slot.holds is not None
        index, image = slot.holds, self.images[slot.holds]
        if before_leaving(index):
            part = slice(0, image.learning_bytes)
            self.way_out.follow()
            self.way_out.run(lambda: image.memory[part].copy_(slot.memory[part], non_blocking=image.pinned))
            self.copies_home += 1
        image.point(self._nowhere[index])
        del self._where[index]
        slot.holds = slot.arrival = None
