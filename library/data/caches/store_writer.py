# SPDX-License-Identifier: Apache-2.0
"""A thread that writes to stores, so that encoding need not wait for the disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType

from library.data.caches.store import TensorStore
from library.data.caches.tensor_bytes import Tensors

MOST_WAITING = 64  # records

_Item = tuple[TensorStore, bytes, Tensors, bytes]


class StoreWriter:
    """Context manager around a writer thread. On exit, also after an error, everything that was put is flushed."""

    def __init__(self) -> None:
        self._queue: queue.Queue[_Item | None] = queue.Queue(MOST_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)

    def __enter__(self) -> StoreWriter:
        self._thread.start()
        return self

    def put(self, store: TensorStore, key: bytes, tensors: Tensors, owner: bytes = b"") -> None:
        """Queue one record. Raises the error of the thread, if it failed to write an earlier one."""
        if self._error is not None:
            raise self._error
        self._queue.put((store, key, tensors, owner))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        """Body of the thread. After an error it keeps draining the queue, so that `put` never blocks."""
        stores: dict[int, TensorStore] = {}
        while (item := self._queue.get()) is not None:
            store, key, tensors, owner = item
            stores[id(store)] = store
            if self._error is None:
                self._try(lambda: store.put(key, tensors, owner))  # noqa: B023 - called at once
        for store in stores.values():
            self._try(store.flush)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:  # raised again by the thread that encodes
            self._error = self._error or error
