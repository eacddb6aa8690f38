"""The memory of a batch: one allocation for its long arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64
ITEM_BYTES = {t: np.dtype(t).itemsize for t in (np.int32, np.int64, np.float32, np.float64)}
# A shorter array is an allocation of its own, so that whoever keeps the numbers of a batch's pairs
# does not keep its rows.
SHORT_BYTES = 4096


class Block:
    """Gives flat arrays out of one allocation; what does not fit is allocated alone.

    Several long arrays that are freed together are more than the C library keeps of its heap: it
    returns them to the system, and every page of the next batch is a fault again. One allocation it
    keeps.

    Attributes:
        asked: bytes that were asked for so far: the size of a block in which all had fitted.
    """

    def __init__(self, size_bytes: int) -> None:
        self._memory = np.empty(size_bytes, np.uint8)
        self.asked = 0

    def take(self, count: int, dtype: Any) -> NDArray[Any]:
        """A flat array of any content."""
        size = count * ITEM_BYTES[dtype]
        if size < SHORT_BYTES:
            return np.empty(count, dtype)
        start, self.asked = self.asked, self.asked + -(-size // ALIGNMENT) * ALIGNMENT
        if start + size > len(self._memory):
            return np.empty(count, dtype)
        found: NDArray[Any] = self._memory[start : start + size].view(dtype)
        return found
