# SPDX-License-Identifier: Apache-2.0
"""Block swap: the weights of some blocks are kept in main memory and copied to the device when the block runs.

    swap = BlockSwap(blocks, swapped=spread(len(blocks), 20), device=device)
    swap.install()     # forward and backward passes give the same results from here on, in less memory
    swap.home()        # before weights are read, for example by a save
    swap.change(...)   # swap other blocks from now on
    swap.remove()

Each swapped block has one image in main memory (host_image.py); the images share a few slots on the device (ring.py).
A block is loaded before its forward pass and before the first node of its backward pass, and the blocks that are
expected next are prefetched. Prefetching is a prediction only: whatever needs a block loads it if it is not there.

The backward pass needs the weights that the forward pass saved (`F.linear` saves W^T). While a swapped block runs, a
tensor in a slot is therefore saved as its position in the block's image, and looked up in the slot that holds the
block by then. With recomputation, autograd saves the inputs of the block; unpacking them loads the block, too.

Weights that learn must be updated while their block is in a slot: in the backward pass, by hooks on the gradients.
Their updates must be reported (`changed`); then the learning part is copied home when the block loses its slot. Frozen
bytes are never copied home. The hooks are on the modules, outside of whatever replaces their `forward`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from library.memory.host_image import HostImage, is_placeholder, tensors_of
from library.memory.pinning import Pinning
from library.memory.ring import CudaCopyQueue, Ring
from library.memory.slots import SLOTS


def spread(total: int, count: int) -> list[int]:
    """`count` of the indices 0 ... total - 1, evenly spaced, ascending."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


@dataclass(frozen=True)
class SavedView:
    """A tensor that autograd saved and that is a view of a block's weights: its position in the block's image."""

    size: torch.Size
    stride: tuple[int, ...]
    start: int  # offset in elements of dtype
    dtype: torch.dtype


@dataclass
class OpenForward:
    """A block whose forward pass is running."""

    index: int
    hooks: saved_tensors_hooks | None = None  # None: without gradient
    inputs: frozenset[int] = frozenset()  # ids of its input tensors


def shared_tensors(blocks: Iterable[nn.Module], without: Collection[int] = ()) -> dict[int, Tensor]:
    """Tensors that belong to several of the blocks, by id. They stay on the device."""
    owned = [tensor for block in blocks for tensor in tensors_of(block, without)]
    owners = Counter(id(tensor) for tensor in owned)
    return {id(tensor): tensor for tensor in owned if owners[id(tensor)] > 1}


def moved_bytes(blocks: Sequence[nn.Module], without: Iterable[Tensor] = ()) -> list[int]:
    """Bytes of each block that are moved when it is swapped. without: see BlockSwap."""
    left_alone = frozenset(id(tensor) for tensor in without)
    left_alone |= shared_tensors(blocks, left_alone).keys()
    return [sum(tensor.nbytes for tensor in tensors_of(block, left_alone)) for block in blocks]


class BlockSwap:
    """Swaps blocks[i] for i in `swapped`. Nothing else may swap or flatten these weights at the same time.

    without: tensors of these blocks that are moved by other code (modulation hoisting) and left alone here. Tensors
    that several blocks share stay on the device. pinning: the run's, shared by all its users.
    """

    ring_class: ClassVar[type[Ring]] = Ring

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        swapped: Collection[int],
        device: torch.device,
        *,
        slots: int = SLOTS,
        without: Iterable[Tensor] = (),
        pinning: Pinning | None = None,
    ) -> None:
        if slots < 2:
            raise ValueError("at least two slots are needed")
        self.blocks, self.device, self._slots = list(blocks), torch.device(device), slots
        self._choose(swapped)
        self.pinning = pinning or Pinning(self.device)
        left_alone = frozenset(id(tensor) for tensor in without)
        self._shared = shared_tensors(blocks, left_alone)
        self._without = left_alone | self._shared.keys()
        self.before_leaving: Callable[[Sequence[nn.Parameter]], None] | None = None
        # pack and unpack hooks for saved tensors that are not weights: only one pair of hooks can be active at a time
        self.rest: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] = (_itself, _itself)
        self._image_of: dict[int, HostImage] = {}  # by the block's index in `blocks`
        self._images: list[HostImage] = []  # of `swapped`
        self._ring: Ring | None = None
        self._handles: list[Any] = []
        self._open: list[OpenForward] = []
        self._with_backward: set[int] = set()  # blocks that the last forward pass with gradient gave a backward pass
        self._went_backward: set[int] = set()  # blocks whose last pass was a backward pass
        self._changed: set[int] = set()
        self._block_of: dict[int, int] = {}  # id of a learning parameter -> its block

    def _choose(self, swapped: Collection[int]) -> None:
        wrong = [i for i in swapped if not 0 <= i < len(self.blocks)]
        if wrong:
            raise ValueError(f"no such blocks: {wrong}")
        self._chosen = sorted(set(swapped))
        self.swapped = [self.blocks[i] for i in self._chosen]  # in the order of execution

    # ---- life -------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Move the weights of swapped blocks into images, and those of all other blocks to the device.

        The weights that require a gradient now are those that learn.
        """
        others = (block for i, block in enumerate(self.blocks) if i not in self._chosen)
        staying = [tensor for block in others for tensor in tensors_of(block, self._without)]
        for tensor in (*staying, *self._shared.values()):
            tensor.data = tensor.data.to(self.device)
        self._exchange(room=0)

    def change(self, swapped: Collection[int]) -> None:
        """Swap these blocks from now on. Call it between two steps. Blocks that stay swapped keep their images.

        While it runs, the device never holds more than before or afterwards, and main memory at most one more image,
        unless fewer blocks have more bytes. When it fails halfway (out of memory), no weight is lost and it can be
        called again; no pass can run until it has succeeded.
        """
        self._choose(swapped)
        self._exchange(room=self._stop())

    def _exchange(self, room: int) -> None:
        """Make images of the chosen blocks and bring the others back. room: bytes of the device to use meanwhile."""
        coming = [index for index in self._image_of if index not in self._chosen]
        for index in self._chosen:
            if index in self._image_of:
                continue
            while coming and self._image_of[coming[0]].nbytes <= room:
                room -= self._bring_back(coming.pop(0))
            room += self._send_away(index)
        for index in coming:
            self._bring_back(index)
        self._start()

    def _send_away(self, index: int) -> int:
        """Move a block's weights into an image. Returns the number of bytes."""
        image = HostImage(tensors_of(self.blocks[index], self._without), self.pinning)
        image.point(image.at_home)
        self._image_of[index] = image
        return image.nbytes

    def _bring_back(self, index: int) -> int:
        """Move a block's weights from its image to the device and drop the image. Returns the number of bytes."""
        image = self._image_of[index]
        image.bring(self.device)
        image.release()
        del self._image_of[index]
        return image.nbytes

    def _start(self) -> None:
        """Make a ring for the images and put hooks on the swapped blocks."""
        self._images = [self._image_of[index] for index in self._chosen]
        self._ring = self.ring_class(self._images, self.device, min(self._slots, len(self.swapped)))
        self._block_of = {id(p): index for index, image in enumerate(self._images) for p in image.learning}
        for index, block in enumerate(self.swapped):
            self._handles += [
                block.register_forward_pre_hook(partial(self._enter, index), prepend=True, with_kwargs=True),
                block.register_forward_hook(partial(self._leave, index), always_call=True),
            ]

    def _stop(self) -> int:
        """Copy every weight home and drop the ring and the hooks. Returns the bytes of the ring."""
        if self._ring is None:
            return 0
        self.reset()
        self.home()
        for handle in self._handles:
            handle.remove()
        room = self.ring.nbytes
        self._handles, self._images, self._ring, self._block_of = [], [], None, {}
        return room

    def remove(self) -> None:
        """Undo `install`: swapped weights become ordinary tensors in main memory; all others stay on the device."""
        self._stop()
        for image in self._image_of.values():
            image.release()
        self._image_of = {}

    def home(self) -> None:
        """Point every tensor of swapped blocks to its image and complete the images, to read or write weights.

        Waits for the device. The next pass loads blocks again by itself.
        """
        if self._ring is None:  # a change has failed halfway
            return
        self.ring.vacate_all(self._goes_home)
        for image in self._images:
            image.point(image.at_home)

    def reset(self) -> None:
        """Forget a pass that ended with an exception. Its updates are kept, and the next pass starts clean."""
        while self._open:
            self._close(self._open.pop())
        self._with_backward.clear()
        self._went_backward.clear()
        if self._ring is not None:
            self.ring.vacate_all(self._goes_home)

    def changed(self, parameters: Iterable[Tensor]) -> None:
        """Report that these parameters have just been updated. Parameters outside of swapped blocks are ignored.

        Raises RuntimeError when the block of one of them is not in a slot: the update is lost.
        """
        for parameter in parameters:
            index = self._block_of.get(id(parameter))
            if index is None or index in self._changed:
                continue
            if self.ring.slot_of(index) is not None:
                self._changed.add(index)
            elif is_placeholder(parameter):
                raise RuntimeError("a swapped weight was updated while its block was away: update in the backward pass")

    # ---- figures ----------------------------------------------------------------------------------------------------

    @property
    def ring(self) -> Ring:
        assert self._ring is not None, "not installed"
        return self._ring

    def measure(self) -> None:
        """Start to measure for how long the computation waits for copies (CUDA only)."""
        if isinstance(self.ring.queue_in, CudaCopyQueue):
            self.ring.queue_in.stalls = []

    def stalled(self) -> float:
        """Seconds that the computation has waited since `measure`. Synchronizes the device."""
        return self.ring.queue_in.stalled() if isinstance(self.ring.queue_in, CudaCopyQueue) else 0.0

    # ---- which blocks are loaded ------------------------------------------------------------------------------------

    def _need(self, index: int, ahead: Iterable[int], *, backward: bool) -> None:
        """Load block `index` and prefetch what comes next, as far as there are slots."""
        wanted = [index]
        for following in ahead:
            if len(wanted) == len(self.ring.slots):
                break
            if following not in wanted:
                wanted.append(following)
        self.ring.arrange(wanted, self._loses_slot_in_backward if backward else self._goes_home)
        self.ring.use(index)

    def _forward_from(self, index: int) -> Iterator[int]:
        """The blocks after this one and, without gradient, those that the next pass begins with."""
        yield from range(index + 1, len(self.swapped))
        if not torch.is_grad_enabled():
            yield from range(index)

    def _backward_from(self, index: int) -> Iterator[int]:
        """The blocks before this one, then those that the next forward pass begins with."""
        yield from (i for i in range(index - 1, -1, -1) if i in self._with_backward)
        yield from range(len(self.swapped))

    def _need_backward(self, index: int) -> None:
        self._need(index, self._backward_from(index), backward=True)

    def _loses_slot_in_backward(self, index: int) -> bool:
        learning = self._images[index].learning
        # the gradients of a block are not complete before its own backward pass
        if learning and self.before_leaving is not None and index in self._went_backward:
            self.before_leaving(learning)
        self._went_backward.discard(index)
        return self._goes_home(index)

    def _goes_home(self, index: int) -> bool:
        """Whether the learning part of the block, which loses its slot, must be copied home."""
        was_changed = index in self._changed
        self._changed.discard(index)
        return was_changed

    # ---- hooks on the blocks ----------------------------------------------------------------------------------------

    def _enter(self, index: int, block: nn.Module, args: Any, kwargs: Any) -> None:
        self._need(index, self._forward_from(index), backward=False)
        self._went_backward.discard(index)
        if not torch.is_grad_enabled():
            self._open.append(OpenForward(index))
            return
        hooks = saved_tensors_hooks(partial(self._pack, index), self._unpack)
        hooks.__enter__()
        self._open.append(OpenForward(index, hooks, frozenset(id(tensor) for tensor in _tensors((args, kwargs)))))

    def _leave(self, index: int, block: nn.Module, args: Any, output: Any) -> None:
        """Also called when the forward pass has failed, then without output."""
        if not self._open or self._open[-1].index != index:
            return  # a hook failed before `_enter` was done
        opened = self._open.pop()
        self._close(opened)
        if opened.hooks is None:
            return
        # an output that is an input belongs to another block's backward pass
        results = [tensor for tensor in _tensors(output) if id(tensor) not in opened.inputs]
        nodes = {node for tensor in results if (node := tensor.grad_fn) is not None}
        for node in nodes:
            node.register_prehook(partial(self._before_backward, index))
        (self._with_backward.add if nodes else self._with_backward.discard)(index)

    def _close(self, opened: OpenForward) -> None:
        if opened.hooks is not None:
            opened.hooks.__exit__()

    def _before_backward(self, index: int, gradients: Any) -> None:
        self._went_backward.add(index)
        self._need_backward(index)

    # ---- what autograd saves ----------------------------------------------------------------------------------------

    def _pack(self, index: int, tensor: Tensor) -> tuple[int, Any]:
        slot = self.ring.slot_in(tensor)
        if slot is None:  # not detached, an output would keep its own node alive
            return index, self.rest[0](tensor.detach())
        assert slot.holds is not None
        return slot.holds, SavedView(tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    def _unpack(self, saved: tuple[int, Any]) -> Tensor:
        index, value = saved
        slot = self.ring.slot_of(index)
        if slot is None or slot.arrival is not None:  # the prediction was wrong
            self._need_backward(index)
            slot = self.ring.use(index)
        if not isinstance(value, SavedView):
            return self.rest[1](value)
        return slot.memory.view(value.dtype).as_strided(value.size, value.stride, value.start)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
