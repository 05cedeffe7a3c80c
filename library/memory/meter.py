# SPDX-License-Identifier: Apache-2.0
"""Memory that tensors take while a program runs, measured by their live storages, for real and fake tensors.

    meter = Meter()
    meter.hold(model.parameters())  # tensors that exist already
    with meter, watched(meter, blocks) as watch:
        loss = step()  # forward pass
        watch.forward_done()
        loss.backward()
    meter.peak, watch.figures()

The same meter measures a real step on the CPU and, inside a FakeTensorMode, a step of a model of any size.
It sees what goes through torch's dispatcher: every tensor that an operation returns, until its storage is freed.
Scratch memory of kernels and memory that an allocator caches are not counted.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from library.memory.estimate import BlockFigures, BoundaryStorage, Segment, StepFigures
from library.memory.work import Work, work_of

OUTSIDE = "outside"  # tag of storages that are made outside of all blocks


class _Entry:
    """A live storage."""

    __slots__ = ("ident", "size", "tag", "weak")

    def __init__(self, ident: int, size: int, tag: Hashable) -> None:
        self.ident, self.size, self.tag = ident, size, tag
        self.weak: weakref.ref[Any] | None = None


class Meter(TorchDispatchMode):
    """Bytes of live storages: current, peak, and by tag. A new storage gets the tag that is set at that moment.

    counts_work: also count operations, matmul FLOPs and bytes moved (see library.memory.work). device: count only
    storages on devices of this type; None: all devices.
    """

    def __init__(self, *, counts_work: bool = False, device: torch.device | None = None) -> None:
        super().__init__()
        self.counts_work, self.device = counts_work, device
        self.live = self.peak = 0
        self.tag: Hashable = OUTSIDE
        self.by_tag: dict[Hashable, int] = defaultdict(int)
        self.work = Work()
        self._entries: dict[int, _Entry] = {}  # address of the storage -> entry
        self._count = 0

    # ---- live storages

    def hold(self, tensors: Iterable[Tensor], tag: Hashable = "held") -> int:
        """Count tensors that exist already; each storage counts once. Returns the bytes that are new."""
        before = self.live
        for tensor in tensors:
            self._entry(tensor, tag)
        return self.live - before

    def ident(self, tensor: Tensor) -> int:
        """A number for the tensor's storage that is never used for another one, even after it is freed."""
        return self._entry(tensor, self.tag).ident

    def living(self) -> dict[int, tuple[int, Hashable]]:
        """Number -> (bytes, tag) of every live storage."""
        return {entry.ident: (entry.size, entry.tag) for entry in self._entries.values()}

    def restart(self) -> None:
        """Reset `peak` to the current bytes."""
        self.peak = self.live

    def _entry(self, tensor: Tensor, tag: Hashable) -> _Entry:
        storage = tensor.untyped_storage()
        address = storage._cdata
        entry = self._entries.get(address)
        if entry is not None:
            return entry
        self._count += 1
        counts = self.device is None or tensor.device.type == self.device.type
        entry = self._entries[address] = _Entry(self._count, storage.nbytes() if counts else 0, tag)

        def gone(_: Any) -> None:
            del self._entries[address]
            self.live -= entry.size
            self.by_tag[entry.tag] -= entry.size

        entry.weak = weakref.ref(storage, gone)
        self.live += entry.size
        self.by_tag[tag] += entry.size
        self.peak = max(self.peak, self.live)
        return entry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # fake tensors ask for it all the time
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._entry(tensor, self.tag)
        if self.counts_work:
            self.work += work_of(func, args, kwargs or {}, out)
        return out


# ---- blocks ---------------------------------------------------------------------------------------------------------


class Watch:
    """Cuts a forward and backward pass into segments at the boundaries of blocks. Each block may run once per pass."""

    def __init__(self, meter: Meter, blocks: Sequence[nn.Module]) -> None:
        self.meter, self.blocks = meter, blocks
        self.base = meter.live
        self.segments: list[Segment] = []
        self.inputs: list[frozenset[int]] = [frozenset()] * len(blocks)
        self.outputs: list[frozenset[int]] = [frozenset()] * len(blocks)
        self.work = [Work()] * len(blocks)  # work of each block's forward pass
        self.stored: dict[int, BoundaryStorage] = {}
        self.kept = 0
        self._seen: dict[int, tuple[int, Hashable]] = {}
        self._returned: set[int] = set()  # blocks whose backward pass has begun
        self._begin("forward", None)

    def forward_done(self) -> None:
        """Call it between the forward and the backward pass, when all activations are allocated."""
        alive = self.meter.living()
        wanted = frozenset().union(*self.inputs, *self.outputs)
        for ident in wanted:
            size, tag = self._seen[ident]
            self.stored[ident] = BoundaryStorage(size, tag if isinstance(tag, int) else None, ident in alive)
        self.kept_in = [sum(size for size, tag in alive.values() if tag == i) for i in range(len(self.blocks))]
        self.kept = self.meter.live - self.base
        self._cut("backward", None)

    def figures(self) -> StepFigures:
        """The figures of the step. Call it once, after the backward pass."""
        self._end()
        blocks = tuple(
            BlockFigures(kept, inputs, outputs, work)
            for kept, inputs, outputs, work in zip(self.kept_in, self.inputs, self.outputs, self.work, strict=True)
        )
        return StepFigures(tuple(self.segments), blocks, self.stored, self.base, self.kept, self.meter.work)

    # ---- boundaries

    def _begin(self, phase: str, block: int | None) -> None:
        self._phase, self._block, self._start = phase, block, self.meter.live
        self.meter.restart()

    def _end(self) -> None:
        base = self.base
        self.segments.append(Segment(self._phase, self._block, self._start - base, self.meter.peak - base))

    def _cut(self, phase: str, block: int | None) -> None:
        self._end()
        self._begin(phase, block)

    def _idents(self, values: Any) -> frozenset[int]:
        """Numbers of the storages of all tensors in (nested) arguments or results."""
        found = frozenset(self.meter.ident(tensor) for tensor in _tensors(values))
        if not self._seen.keys() >= found:
            self._seen |= self.meter.living()
        return found

    def hooks(self, index: int) -> Iterator[Any]:
        """Register the hooks of one block. Yields their handles."""
        block = self.blocks[index]

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._cut("forward", index)
            self.inputs[index] = self._idents((args, kwargs))
            self.meter.tag, self._before = index, self.meter.work

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.outputs[index] = self._idents(output)
            self.work[index] = self.meter.work - self._before
            self.meter.tag = OUTSIDE
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(back)
            self._cut("forward", None)

        def back(gradients: Any) -> None:
            if index not in self._returned:  # the first output whose gradient arrives begins the block's backward pass
                self._returned.add(index)
                self._cut("backward", index)

        yield block.register_forward_pre_hook(enter, with_kwargs=True)
        yield block.register_forward_hook(leave)


@contextmanager
def watched(meter: Meter, blocks: Sequence[nn.Module]) -> Iterator[Watch]:
    """Watch the passes through `blocks` inside the context."""
    watch = Watch(meter, blocks)
    handles = [handle for index in range(len(blocks)) for handle in watch.hooks(index)]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors; each storage counts once."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())
