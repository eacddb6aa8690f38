"""Memory of a chunk of logits, lent again when nobody holds it.

What costs time in new memory of a CPU is the first touch of its pages: for a chunk of 300 MB more
than the product that fills it.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

from dpo_ext.torch.logps.ops import HUGE_BYTES, fresh

KEPT = 2
"""Free memories that are kept: one of the policy, one of its reference."""
# Appended to by whatever thread drops the last tensor: a deque needs no lock.
_free: deque[mmap.mmap] = deque(maxlen=KEPT)


def lent(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `fresh`: contiguous memory that holds anything. Large memory of a CPU comes back when the
    last tensor in it is gone, and stays with the process for the next call.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE_BYTES or torch.compiler.is_compiling():
        return fresh(shape, dtype, device)
    memory = _taken(size)
    if memory is None:
        return fresh(shape, dtype, device)
    root = np.frombuffer(memory, np.uint8)  # each tensor in it holds this, and nothing else does
    weakref.finalize(root, _free.append, memory).atexit = False
    return torch.from_numpy(root)[:size].view(dtype).view(shape)


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
