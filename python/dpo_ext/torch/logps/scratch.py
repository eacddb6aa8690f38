"""Large memory of a CPU, lent again when nobody holds it.

What costs time in new memory is the first touch of its pages: for a chunk of logits of 300 MB more
than the product that fills it, and as much as computing a gradient of logits.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

HUGE_BYTES = 1 << 24  # from which memory is kept, in huge pages
KEPT = 2
"""Free memories that are kept: one of the policy, one of its reference."""
# Appended to by whatever thread drops the last tensor: a deque needs no lock.
_free: deque[mmap.mmap] = deque(maxlen=KEPT)


def lent(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Contiguous memory that holds anything. Large memory of a CPU comes back when the last tensor
    in it is gone, and stays with the process for the next call, unless the system needs it.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE_BYTES or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    memory = _taken(size)
    if memory is None:
        return torch.empty(shape, dtype=dtype, device=device)
    root = np.frombuffer(memory, np.uint8)  # each tensor in it holds this, and nothing else does
    weakref.finalize(root, _keep, memory).atexit = False
    return torch.from_numpy(root)[:size].view(dtype).view(shape)


def _keep(memory: mmap.mmap) -> None:
    """For the next call; the system may take pages that nobody has written to since."""
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_FREE)
    _free.append(memory)


def _taken(size: int) -> mmap.mmap | None:
    """Free memory that is large enough, else new; None where the system has none such."""
    while True:
        try:
            memory = _free.pop()
        except IndexError:
            break
        if len(memory) >= size:
            return memory
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        # An eighth more, which costs nothing until it is touched: the next batch differs.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, size + size // 8, flags=flags)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return None
    return memory
