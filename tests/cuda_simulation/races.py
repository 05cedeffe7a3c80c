# SPDX-License-Identifier: Apache-2.0
"""Finds accesses to the same memory by different streams that nothing puts in order: waits that are missing.

    with Races() as races:
        train()
    assert not races.found

What is found does not depend on timing: a vector clock for each stream says which operations of others are certain to
be done when an operation begins (streams.py). An operation runs on the current stream of its thread. It must come

    to read     after the last write
    to write    after the last write and all reads since
    to free     after all, unless the allocator knows of the stream (the one it was allocated on, or record_stream)

The host is a stream of its own. It waits by synchronize(), and in copies that are not non_blocking. Memory that is not
pinned is copied by the host itself; numbers (tensors of the CPU without dimensions) are arguments of a kernel.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda_simulation.install import installed
from tests.cuda_simulation.streams import STREAMS, Clock

Tensors = dict[int, Tensor]  # by their storage

HOST = -1  # as a stream's number
MOST = 200  # races that are written down
DEPTH = 6  # lines that name an access
ROOMS = ("/library/", "/networks/", "/tests/")  # the project's
WITHOUT_ACCESS = {
    "aten::is_pinned", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty",
    "aten::new_empty_strided", "aten::set_", "aten::detach",
}  # fmt: skip


@dataclass
class Cell:
    """Who has used one piece of memory, as far as it matters to those who come after."""

    owner: int  # the stream it was allocated on, or HOST
    kept_by_allocator: bool  # memory of the host that is not given to others while the card uses it
    watch: weakref.ref[Any] | None = None
    write: tuple[int, int] | None = None  # the last: stream, and its count of operations then
    reads: dict[int, int] = field(default_factory=dict)  # since then: stream -> the last
    recorded: set[int] = field(default_factory=set)
    places: dict[int, str] = field(default_factory=dict)  # stream -> its last operation


class Races(TorchDispatchMode):
    """A context in which accesses are checked, in backward passes, too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []  # one line each
        self.checked = 0  # accesses
        self._cells: dict[int, Cell] = {}
        self._lock = threading.RLock()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        with self._lock:
            self._watch(func, args, kwargs or {}, result)
        return result

    # ---- operations -------------------------------------------------------------------------------------------------

    def _watch(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        name = func._schema.name
        if name == "aten::record_stream":
            self._cell(args[0]).recorded.add(args[1].stream_id)
            return
        made = list(tensors_in(result))
        if func.is_view or name in WITHOUT_ACCESS:
            for tensor in made:
                self._cell(tensor)
            return
        reads, writes = arguments(func, args, kwargs)
        writes.update({key_of(tensor): tensor for tensor in made if key_of(tensor) not in writes})
        if any(tensor.is_cuda for tensor in (*reads.values(), *writes.values())):
            self._on_card(name, reads, writes, is_asynchronous(func, args, kwargs))
        else:
            self._access(name, HOST, STREAMS.host, reads, writes)

    def _on_card(self, name: str, reads: Tensors, writes: Tensors, asynchronous: bool) -> None:
        """An operation of the current stream. The host waits for it where it reads a value, or copies and waits."""
        stream = STREAMS.current
        clock = STREAMS.clocks[stream]
        clock.join(STREAMS.host)
        copies = any(tensor.is_cpu and tensor.dim() for tensor in (*reads.values(), *writes.values()))
        reads, writes = ({k: t for k, t in part.items() if seen_by_card(t)} for part in (reads, writes))
        self._access(name, stream, clock, reads, writes)
        if name == "aten::_local_scalar_dense" or (copies and not asynchronous):
            STREAMS.host.join(clock)

    def _access(self, name: str, stream: int, clock: Clock, reads: Tensors, writes: Tensors) -> None:
        clock[stream] += 1
        what = f"{name} at {place()}"
        for key, tensor in reads.items():
            if key not in writes:
                self._read(self._cell(tensor), what, stream, clock)
        for tensor in writes.values():
            self._write(self._cell(tensor), what, stream, clock)

    # ---- cells ------------------------------------------------------------------------------------------------------

    def _read(self, cell: Cell, what: str, stream: int, clock: Clock) -> None:
        self.checked += 1
        self._after_write(cell, what, stream, clock)
        cell.reads[stream] = clock[stream]
        cell.places[stream] = what

    def _write(self, cell: Cell, what: str, stream: int, clock: Clock) -> None:
        self.checked += 1
        self._after_write(cell, what, stream, clock)
        for other, count in cell.reads.items():
            if other != stream and count > clock[other]:
                self._report(f"stream {stream} writes before {other} has read: {what}; {cell.places[other]}")
        cell.write, cell.reads = (stream, clock[stream]), {}
        cell.places[stream] = what

    def _after_write(self, cell: Cell, what: str, stream: int, clock: Clock) -> None:
        if cell.write is None:
            return
        other, count = cell.write
        if other != stream and count > clock[other]:
            self._report(f"stream {stream} goes on before {other} has written: {what}; {cell.places[other]}")

    def _report(self, text: str) -> None:
        if len(self.found) < MOST:
            self.found.append(text)

    def _cell(self, tensor: Tensor) -> Cell:
        key = key_of(tensor)
        cell = self._cells.get(key)
        if cell is None:
            kept = tensor.is_cpu and tensor.is_pinned() and not installed().is_registered(tensor.data_ptr())
            cell = self._cells[key] = Cell(STREAMS.current if tensor.is_cuda else HOST, kept)
            cell.watch = weakref.ref(tensor.untyped_storage(), lambda _: self._freed(key))
        return cell

    def _freed(self, key: int) -> None:
        with self._lock:
            cell = self._cells.pop(key, None)
            if cell is None or cell.kept_by_allocator:
                return
            done = Clock(STREAMS.host)
            if cell.owner != HOST:
                done.join(STREAMS.clocks[cell.owner])
            accesses = [*([cell.write] if cell.write else []), *cell.reads.items()]
            for stream, count in accesses:
                if stream not in (HOST, cell.owner, *cell.recorded) and count > done[stream]:
                    self._report(f"freed while stream {stream} may use it: {cell.places[stream]}")


# ---- what an operation does -----------------------------------------------------------------------------------------


def key_of(tensor: Tensor) -> int:
    """The number of a tensor's storage."""
    return tensor.untyped_storage()._cdata


def arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
    """The tensors that an operation reads and those that it writes to."""
    reads: Tensors = {}
    writes: Tensors = {}
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tensors_in(value):
            (writes if written else reads)[key_of(tensor)] = tensor
    return reads, writes


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def is_asynchronous(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """True for a copy that the host does not wait for, if memory allows."""
    names = [argument.name for argument in func._schema.arguments]
    if "non_blocking" not in names:
        return False
    number = names.index("non_blocking")
    return bool(args[number] if number < len(args) else kwargs.get("non_blocking", False))


def seen_by_card(tensor: Tensor) -> bool:
    """False for what the host hands over: numbers, and memory that is not pinned."""
    return tensor.is_cuda or (tensor.dim() > 0 and tensor.is_pinned())


def place() -> str:
    """The lines of the project that lead here, the innermost first."""
    lines: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(lines) < DEPTH:
        file = frame.f_code.co_filename
        if any(room in file for room in ROOMS) and "/cuda_simulation/" not in file:
            lines.append(f"{file.rsplit('/', 1)[-1]}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(lines)
