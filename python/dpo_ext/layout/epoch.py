"""`Epoch`: the seed and epoch of a plan, which its copies in the workers of a data loader follow.

A data loader gives each of its workers a copy of the plan, by a fork or by a pickle, and workers
that persist keep it. So the two numbers lie in memory that the processes share: an anonymous map,
which a fork inherits, and for those that are spawned a file without a name, whose descriptor goes
with the pickle. Nothing is left behind, however the processes end.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
import sys
import tempfile
from typing import Any
from weakref import WeakSet, WeakValueDictionary

EPOCH_SET = (
    "the epoch of the plan was set while its batches were being read\n"
    "hint: set it before the loop over the loader begins"
)

# Which of two slots counts, and in each of them seed and epoch: what is read is never half written.
_SLOT = struct.Struct("@QQ")
_FIRST, _SIZE = 8, 8 + 2 * _SLOT.size
_RETRIES = 100

# The plans of this process by what names them in their copies.
_OWN: WeakValueDictionary[str, Epoch] = WeakValueDictionary()
# Those and the copies that this process has: whichever it forks workers with must be its own.
_ALL: WeakSet[Epoch] = WeakSet()


class Epoch:
    """Seed and epoch of a plan, set by the process that made it.

    A copy in a worker of a DataLoader reads what that process has set. Every other copy, of
    ``copy.deepcopy``, of a pickle or of a fork, is on its own, and so is one in a worker once it
    was set there. One on its own is what workers that its process starts follow.
    """

    def __init__(self, seed: int, epoch: int) -> None:
        self._own(seed, epoch)
        _ALL.add(self)

    def _own(self, seed: int, epoch: int) -> None:
        self.name = secrets.token_hex(8)
        self._pid = os.getpid()
        self._maps = [_anonymous(self.name)]
        self._fd: int | None = None
        # In a worker: what fetches for the loader in this pass, and the order that it began with.
        self._pass: tuple[Any, tuple[int, int]] | None = None
        self._at = seed, epoch
        _write(self._maps[0], seed, epoch)
        _OWN[self.name] = self

    def set(self, seed: int, epoch: int) -> None:
        """Says it to all copies that follow; a copy that is set is none any more."""
        if not self.is_here:
            self._own(seed, epoch)
        self._at = seed, epoch
        for shared in self._maps:
            _write(shared, seed, epoch)

    def stand_alone(self) -> None:
        """In a process that has a copy and is no worker: its own workers follow this one."""
        if not (self.is_here or _in_worker()):
            self._own(*self._at)

    def told(self) -> tuple[int, int] | None:
        """What this copy follows: seed and epoch; None where it follows nobody.

        Raises:
            RuntimeError: they were set since the pass of the loader began.
        """
        if self.is_here or not _in_worker():
            return None
        order, fetcher = _read(self._maps[0]), _fetcher()
        if fetcher is not None:
            if self._pass is not None and self._pass[0] is fetcher and self._pass[1] != order:
                raise RuntimeError(EPOCH_SET)
            self._pass = fetcher, order
        return order

    @property
    def is_here(self) -> bool:
        """Whether this process made it."""
        return self._pid == os.getpid()

    def is_past(self, seed: int, epoch: int) -> bool:
        """Whether the plan has moved on from there."""
        return _read(self._maps[0]) != (seed, epoch)

    def __reduce__(self) -> tuple[Any, ...]:
        self.stand_alone()
        if not _is_spawning():
            return Epoch, _read(self._maps[0])
        if sys.platform == "win32":
            return Epoch._joined, (self.name, None, self._at)
        from multiprocessing.reduction import DupFd

        if self._fd is None:
            self._fd = _unnamed()
            self._maps.append(mmap.mmap(self._fd, _SIZE))
            _write(self._maps[-1], *_read(self._maps[0]))
        return Epoch._joined, (self.name, DupFd(self._fd), self._at)

    @classmethod
    def _joined(cls, name: str, descriptor: Any, at: tuple[int, int]) -> Epoch:
        """The copy of a process that was spawned."""
        if descriptor is None:
            shared = _anonymous(name)
        else:
            fd = descriptor.detach()
            try:
                shared = mmap.mmap(fd, _SIZE)
            finally:
                os.close(fd)
        made = cls.__new__(cls)
        vars(made).update(name=name, _pid=0, _maps=[shared], _fd=None, _pass=None, _at=at)
        _ALL.add(made)
        return made

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            os.close(self._fd)  # type: ignore[arg-type]


def _before_fork() -> None:
    for one in list(_ALL):
        one.stand_alone()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)


def of_name(name: str) -> Epoch | None:
    """The one of this name, where its plan was made in this process and is still there."""
    found = _OWN.get(name)
    return found if found is not None and found.is_here else None


def _anonymous(name: str) -> mmap.mmap:
    if sys.platform == "win32":  # where nothing forks: whoever is spawned finds it by its name
        return mmap.mmap(-1, _SIZE, tagname=f"dpo_ext-{name}")
    return mmap.mmap(-1, _SIZE)


def _write(shared: mmap.mmap, seed: int, epoch: int) -> None:
    other = 1 - shared[0]
    _SLOT.pack_into(shared, _FIRST + other * _SLOT.size, seed, epoch)
    shared[0] = other


def _read(shared: mmap.mmap) -> tuple[int, int]:
    found = (0, 0)
    for _ in range(_RETRIES):
        slot = shared[0]
        found = _SLOT.unpack_from(shared, _FIRST + slot * _SLOT.size)
        if shared[0] == slot:
            break
    return found


def _in_worker() -> bool:
    # Nobody is a worker of torch's loader where torch is not loaded.
    info = getattr(sys.modules.get("torch.utils.data"), "get_worker_info", None)
    return info is not None and info() is not None


def _fetcher() -> Any:
    """Which object of the loader asks, of those that call this; a worker has a new one each pass.
    None where the loader is not torch's.
    """
    frame = sys._getframe()  # noqa: SLF001 - nothing else tells a worker that a pass began
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_code.co_name == "fetch":
            return frame.f_locals.get("self")
    return None


def _is_spawning() -> bool:
    """Whether what is pickled goes to a process that multiprocessing starts."""
    context = sys.modules.get("multiprocessing.context")
    return context is not None and context.get_spawning_popen() is not None


def _unnamed() -> int:
    """The descriptor of a file of our size that no folder has."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("dpo_ext", os.MFD_CLOEXEC)
        os.ftruncate(fd, _SIZE)
        return fd
    with tempfile.TemporaryFile() as file:
        file.truncate(_SIZE)
        return os.dup(file.fileno())
