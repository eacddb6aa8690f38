"""Buffers that batches are built in, reused as soon as nobody holds anything made from them."""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dpo_ext.layout.memory import ALIGNMENT, ITEM_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Ring:
    """Lends buffers and takes each back when every array and tensor made from it is gone.

    A batch that somebody keeps keeps its buffer; the ring then makes another one, so that it never
    waits and never writes over what is still held. What costs time in fresh memory is the first
    touch of its pages (and, if pinned, locking them), not the copy.

    Args:
        keep: free buffers that are kept.
        pinned: page-locked memory, allocated by torch, for copies to a GPU that do not wait.
    """

    def __init__(self, keep: int, *, pinned: bool = False) -> None:
        self._pinned = pinned
        # Appended to by whatever thread drops the last reference: a deque needs no lock.
        self._free: deque[tuple[NDArray[np.uint8], Any]] = deque(maxlen=keep)
        self.size_bytes = 0

    def lend(self) -> Loan:
        """A buffer, free or new."""
        while self._free:
            store, event = self._free.pop()
            if event is not None:
                event.synchronize()  # the copy to the device may still be reading
            if len(store) >= self.size_bytes:
                return Loan(self, store)
        return Loan(self, self.allocate(self.size_bytes))

    def allocate(self, size_bytes: int) -> NDArray[np.uint8]:
        """Fresh memory, page-locked if the ring's is."""
        size_bytes = max(size_bytes, ALIGNMENT)
        if self._pinned:
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True).numpy()
        store = np.empty(size_bytes + ALIGNMENT, np.uint8)
        start = -store.ctypes.data % ALIGNMENT
        return store[start : start + size_bytes]

    def take_back(self, store: NDArray[np.uint8], event: Any) -> None:
        """A buffer that nobody holds, free once ``event`` (or None) has happened."""
        self._free.append((store, event))

    def close(self) -> None:
        """Waits for copies that still read from a free buffer, before its memory goes."""
        while self._free:
            _, event = self._free.pop()
            if event is not None:
                event.synchronize()

    def __del__(self) -> None:
        self.close()


class Loan:
    """One buffer of a ring, cut into arrays by :meth:`take`."""

    def __init__(self, ring: Ring, store: NDArray[np.uint8]) -> None:
        self._ring = ring
        # Every array made below has this one as its base (NumPy shortens chains of bases down to
        # the array before a foreign owner), so that its end is the end of them all.
        self._root = np.frombuffer(store.data, np.uint8)
        self._events: list[Any] = []
        self._used = 0
        back = weakref.finalize(self._root, _give_back, weakref.ref(ring), store, self._events)
        back.atexit = False

    def take(self, count: int, dtype: Any) -> NDArray[Any]:
        """A flat array of the buffer; its content is whatever was there. One that does not fit is
        allocated alone, and the ring's next buffers are larger.
        """
        size = count * ITEM_BYTES[dtype]
        if size == 0:  # else all of no items had one address, as if they were one array
            return np.empty(0, dtype)
        start, self._used = self._used, self._used + -(-size // ALIGNMENT) * ALIGNMENT
        if self._used <= len(self._root):
            return self._root[start : start + size].view(dtype)
        # A quarter more, since the next batches differ.
        self._ring.size_bytes = max(self._ring.size_bytes, self._used + self._used // 4)
        return self._ring.allocate(size)[:size].view(dtype)

    def copied(self, event: Any) -> None:
        """Says that the buffer is read until ``event``, recorded on a stream."""
        self._events.append(event)

    def end(self) -> None:
        """Lets go of the buffer; the arrays may live on."""
        del self._root


def _give_back(ring: weakref.ref[Ring], store: NDArray[np.uint8], events: list[Any]) -> None:
    event = events[-1] if events else None
    alive = ring()
    if alive is not None:
        alive.take_back(store, event)
    elif event is not None:
        event.synchronize()
