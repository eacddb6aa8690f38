"""A part of a long list, another one from day to day, so that a week of runs has seen it all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import date

PARTS = 4
WHOLE = os.environ.get("DPO_EXT_DEEP") == "1"
# In the environment, so that all workers of a run take the same part, also at midnight.
SEED = int(os.environ.setdefault("DPO_EXT_SEED", str(date.today().toordinal())))


def sample(names: Iterable[str]) -> list[str]:
    """A quarter of ``names``; all of them in `make deep`."""
    names = list(names)
    return names if WHOLE else names[SEED % PARTS :: PARTS]


def seeds(count: int) -> range:
    """A quarter of ``count`` seeds, in one piece; all of them and more in `make deep`, few in `make test-fast`."""
    examples = int(os.environ.get("DPO_EXT_EXAMPLES", "0"))
    if WHOLE:
        return range(count * max(1, examples // 500))
    first = SEED % PARTS * count // PARTS
    return range(first, first + count // (50 if 0 < examples < 50 else PARTS))


def header() -> str:
    """What the first lines of a run say of it."""
    return "samples: whole" if WHOLE else f"samples: 1 of {PARTS}, DPO_EXT_SEED={SEED}"
