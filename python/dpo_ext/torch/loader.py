"""Batches of a plan, built ahead of the model by one thread and moved to its device."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Never, Protocol
from weakref import WeakSet, finalize

import torch

from dpo_ext.errors import describe
from dpo_ext.layout.epoch import EPOCH_SET
from dpo_ext.pairs import Examples
from dpo_ext.torch.ring import Loan, Ring

if TYPE_CHECKING:
    from dpo_ext.layout.batch import Batch


class Plan(Protocol):
    """What a loader reads: ``dpo_ext.BatchPlan``, or any sequence of batches that move."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Batch: ...


class PairLoader:
    """Iterates over the batches of a plan; while the model works, a thread builds the next ones.

    Same as::

        for i in range(len(plan)):
            yield plan[i].to(device)

    Rust fills a batch without the GIL, so that the thread and the training loop do not wait for
    each other. It is filled into a buffer that was used before, once nothing that was made from it
    is left: no array, no tensor, no view of one, and no copy to the device that still reads it. For
    a CUDA device the buffers are page-locked, and the copy to the device runs on the current stream
    without stopping the host. Leaving the loop, by ``break``
    or by an exception, ends the thread; so does dropping the iterator. An error in the thread is
    raised in the loop, in place of the batch that failed. One plan has one order: shard it by its
    own ``rank`` and ``world_size``.

    ``state_dict()`` counts the batches that the loop has taken, not those built ahead; a loader
    with the same plan goes on from there after ``load_state_dict``. Lightning and stateful data
    loaders call both by themselves.

    Args:
        plan: ``pairs.plan(...)``: a length, batches by index, each with ``.to(device)`` and, for a
            CUDA device, ``.pin_memory()``.
        device: where the batches go; None = the CPU, as torch tensors that share the plan's memory.
        prefetch: batches built ahead, >= 0; 0 builds each when it is asked for, without a thread.

    Raises:
        TypeError: ``plan`` is a data set, or gives no batches; an option of other loaders, such as
            ``num_workers``. ValueError: ``prefetch`` < 0.

    >>> from dpo_ext import PairDataset
    >>> pairs = PairDataset.from_ids([[1, 2], [6]], [[3, 4], [7]], [[5], [8, 9]])
    >>> plan = pairs.plan(layout="padded", pairs_per_batch=1, shuffle=False)
    >>> [batch.input_ids.tolist() for batch in PairLoader(plan)]
    [[[1, 2, 3, 4], [1, 2, 5, 0]], [[6, 7, 0], [6, 8, 9]]]
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device | str | int | None = None,
        prefetch: int = 2,
        **others: Never,
    ) -> None:
        if others:
            raise TypeError(
                f"`{next(iter(others))}` is no option of PairLoader: one thread builds the batches "
                "in Rust, without the GIL\n"
                "hint: `prefetch` says how many are built ahead"
            )
        if isinstance(plan, Examples):
            raise TypeError(
                f"`plan` must be a BatchPlan, found {type(plan).__name__}, a data set\n"
                "hint: use pairs.plan(...)"
            )
        if not (hasattr(plan, "__len__") and hasattr(plan, "__getitem__")):
            raise TypeError(
                f"`plan` must have a length and batches by index, found {type(plan).__name__}\n"
                "hint: use pairs.plan(...)"
            )
        if isinstance(prefetch, bool) or not isinstance(prefetch, int):
            raise TypeError(f"`prefetch` must be an int, found {type(prefetch).__name__}")
        if prefetch < 0:
            raise ValueError(f"`prefetch` must be at least 0, found {prefetch}")
        self.plan = plan
        if isinstance(device, int):
            device = torch.device("cuda", device)
        self.device = torch.device("cpu" if device is None else device)
        self.prefetch = prefetch
        self._fillers: WeakSet[_Filler] = WeakSet()
        # One buffer is being filled, one is with the model.
        self._ring = Ring(prefetch + 2, pinned=self.device.type == "cuda")
        # Where the latest iteration is, and where the next one starts.
        self._latest: _Filler | None = None
        self._start = 0

    def __len__(self) -> int:
        return len(self.plan)

    def set_epoch(self, epoch: int) -> None:
        """Sets the plan's epoch. An iteration that is still open ends with an error.

        The epoch of a loaded state keeps its position; another one starts at its first batch.
        """
        if epoch != getattr(self.plan, "epoch", None):
            self._start = 0
        self._close()
        self.plan.set_epoch(epoch)  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """``{seed, epoch, position, digest}`` after the latest batch of the latest iteration.

        Raises:
            TypeError: the plan has no ``state_dict``.
        """
        self._check_stateful()
        position = self._start if self._latest is None else self._latest.taken
        return self.plan.state_dict(position)  # type: ignore[attr-defined]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on behind the position of ``state``, those after it are whole.

        Raises:
            DataError: the state was saved for other data or options.
            TypeError: the plan has no ``load_state_dict``.
        """
        self._check_stateful()
        self._close()
        self._start = self.plan.load_state_dict(state)  # type: ignore[attr-defined]

    def _check_stateful(self) -> None:
        if not hasattr(self.plan, "load_state_dict"):
            raise TypeError(
                f"a plan of {type(self.plan).__name__} has no state\nhint: use pairs.plan"
            )

    def _close(self) -> None:
        self._latest = None
        for filler in list(self._fillers):
            filler.close()

    def __iter__(self) -> Iterator[Batch]:
        start, self._start = self._start, 0
        filler = _Filler(self.plan, self._ring, self.device, self.prefetch, start)
        self._fillers.add(filler)
        self._latest = filler
        return _Batches(filler, self.device)


class _Batches(Iterator["Batch"]):
    """One pass over a plan. The thread does not know it, so that dropping it ends the thread."""

    def __init__(self, filler: _Filler, device: torch.device) -> None:
        self._filler, self._device = filler, device
        self._close = finalize(self, filler.close)  # also at exit, before the interpreter is gone

    def __next__(self) -> Batch:
        if not self._close.alive or self._filler.taken == self._filler.length:
            self._close()
            raise StopIteration
        try:
            batch, loan = self._filler.take()
            moved = batch.to(self._device, non_blocking=self._device.type == "cuda")
            if loan is not None and self._device.type == "cuda":
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self._device))
                loan.copied(event)
            return moved
        except BaseException:
            self._close()
            raise


class _Filler:
    """Builds the batches of one iteration in order, ``ahead`` of them ahead, in a thread if > 0."""

    def __init__(
        self, plan: Plan, ring: Ring, device: torch.device, ahead: int, start: int
    ) -> None:
        self.length = len(plan)
        self._plan, self._ring, self._device = plan, ring, device
        self._done: SimpleQueue[tuple[Any, Loan | None, BaseException | None]] = SimpleQueue()
        self._free = threading.Semaphore(ahead)
        self._closed = False
        self.taken = self._first = start
        self._thread: threading.Thread | None = None
        if ahead and start < self.length:
            self._thread = threading.Thread(target=self._run, name="dpo_ext-loader", daemon=True)
            self._thread.start()

    def take(self) -> tuple[Batch, Loan | None]:
        """The next batch and the buffer that it is in; raises what the thread raised."""
        if self._closed:
            raise RuntimeError(EPOCH_SET)
        self.taken += 1
        if self._thread is None:
            return self._build(self.taken - 1)
        batch, loan, error = self._done.get()
        self._free.release()
        if error is not None:
            raise error
        return batch, loan

    def close(self) -> None:
        """Ends the thread and waits for the batch that it is building."""
        self._closed = True
        self._free.release()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _build(self, i: int) -> tuple[Batch, Loan | None]:
        fill = getattr(self._plan, "build", None)
        if fill is None:
            batch = self._plan[i]
            if not hasattr(batch, "to"):
                raise TypeError(
                    f"`plan` must give batches, found {describe(batch)}\nhint: use pairs.plan(...)"
                )
            return (batch.pin_memory() if self._device.type == "cuda" else batch), None
        loan = self._ring.lend()
        batch = fill(i, loan.take)
        loan.end()
        return batch, loan

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            for i in range(self._first, self.length):
                self._free.acquire()
                if self._closed:
                    raise RuntimeError(EPOCH_SET)
                self._done.put((*self._build(i), None))
        except BaseException as error:  # whatever it is: the loop would wait for ever otherwise
            self._done.put((None, None, error))
