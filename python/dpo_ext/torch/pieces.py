"""`Plan`: which segments are attended alone and which together, and in which blocks.

Letters as in segments.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_ext.layout.segments import Segments

# Segments with fewer keys are attended many at a time: a call costs as much as their attention.
SHORT = 64
# Slots by which the segments of one call differ at most.
STEP = 16
# Queries of a call where scores are materialised, or where a window leaves most keys out.
BLOCK = 256

Span = tuple[int, int]


@dataclass(frozen=True)
class Call:
    """What a call asks for beside its tensors."""

    window: int | None
    scale: float
    softcap: float | None
    sinks: Tensor | None
    dropout: float

    @property
    def plain(self) -> bool:
        """Whether torch's fused attention computes it."""
        return self.softcap is None and self.sinks is None


def call_of(
    query: Tensor, segments: Segments, *, window: int | None, scale: float | None, **options: Any
) -> Call:
    """The options of `segment_attention`, with the default of ``scale``."""
    if window is not None and window >= segments.longest:
        window = None
    return Call(window, query.shape[-1] ** -0.5 if scale is None else scale, **options)


class Group(NamedTuple):
    """Segments of like length, behind their prefixes, and filled up with each one's first slot.

    - ``slots``: (G, L) int64, slots of the flattened rows.
    - ``own``: (G, L) bool, which of them are the segments themselves.
    """

    slots: Tensor
    own: Tensor


@dataclass(frozen=True)
class Plan:
    """How the segments of all layers of a batch are worked off.

    - ``alone``: row, prefix and segment, (row, p, q, a, b) as in `Segments`.
    - ``groups``: those worked off together.
    - ``place``: of each slot of the rows, where it stands in all of these behind one another,
      prefixes of ``alone`` left out; None: there.
    """

    alone: list[tuple[int, int, int, int, int]]
    groups: list[Group]
    place: Tensor | None

    @property
    def once(self) -> bool:
        """Whether each slot is worked off as a key but once."""
        return not self.groups and all(p == q for _, p, q, _, _ in self.alone)


def plan_of(segments: Segments, device: torch.device) -> Plan:
    """The plan of ``segments``, made once."""
    known: Plan | None = segments.plans.get(("pieces", device))
    if known is None:
        known = segments.plans["pieces", device] = _planned(segments, device)
    return known


def _planned(segments: Segments, device: torch.device) -> Plan:
    width = segments.shape[1]
    every = [s for s in segments if s[4] > s[3]]
    keys = np.array([q - p + b - a for _, p, q, a, b in every], dtype=np.int64)
    sizes = -(-keys // STEP) * STEP
    together, members = np.zeros(len(every), dtype=bool), []
    for size in np.unique(sizes[keys < SHORT]):
        found = np.flatnonzero((sizes == size) & (keys < SHORT))
        if len(found) > 2:
            together[found] = True
            members.append(found)
    alone = [one for one, grouped in zip(every, together, strict=True) if not grouped]
    place, behind = np.zeros(segments.shape[0] * width, dtype=np.int64), 0
    for row, _, _, a, b in alone:
        place[row * width + a : row * width + b] = behind + np.arange(b - a)
        behind += b - a
    groups = []
    for found in members:
        slots = np.empty((len(found), int(keys[found].max())), dtype=np.int64)
        own = np.zeros(slots.shape, dtype=bool)
        for line, index in enumerate(found):
            row, p, q, a, b = every[index]
            slots[line] = row * width + a
            slots[line, : q - p + b - a] = row * width + np.r_[p:q, a:b]
            own[line, q - p : q - p + b - a] = True
        place[slots[own]] = behind + np.flatnonzero(own)
        behind += slots.size
        groups.append(Group(*(torch.from_numpy(x).to(device) for x in (slots, own))))
    ordered = not groups and bool((np.diff(place) == 1).all())
    return Plan(alone, groups, None if ordered else torch.from_numpy(place).to(device))


def blocks(
    n: int, before: int, window: int, like: Tensor
) -> Iterator[tuple[Span, Span, bool, Tensor | None]]:
    """Blocks of ``n`` queries under a window, the first of them behind ``before`` keys: queries,
    the keys that any of them sees, whether causal says it all, and else what is added to scores.
    """
    first = 0
    if not before:  # no window yet
        first = min(window, n)
        yield (0, first), (0, first), True, None
    size = max(BLOCK, min(window, 2 * BLOCK))
    for i0 in range(first, n, size):
        i1 = min(i0 + size, n)
        lowest = before + i0 - window + 1
        k0, k1 = max(0, lowest), before + i1
        band = _band(size, window, like.dtype, like.device)
        yield (i0, i1), (k0, k1), False, band[: i1 - i0, k0 - lowest : k1 - lowest]


@lru_cache(maxsize=8)
def _band(size: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size, size + window - 1): 0 where query r sees key c, r <= c < r + window, else -inf."""
    with torch.inference_mode(False):  # such tensors cannot be kept for a backward
        seen = torch.ones(size, size + window - 1, dtype=torch.bool, device=device)
        seen = seen.tril_(window - 1).triu_()
        band = torch.zeros(seen.shape, dtype=dtype, device=device)
        return band.masked_fill_(~seen, float("-inf"))
