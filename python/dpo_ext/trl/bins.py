"""Batches by a budget of tokens: the pairs of an epoch packed into bins, which a loader samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from dpo_ext.errors import DataError
from dpo_ext.layout.fill import shared_slots
from dpo_ext.layout.plan import pack_lengths
from dpo_ext.trl.rows import lengths

_SEED = 2**31


def slots(dataset: Dataset, layout: str, max_length: int | None) -> NDArray[np.int64]:
    """(n,) int64: the places that each pair takes in a row, its sides cut to ``max_length``."""
    prompt, chosen, rejected = lengths(dataset).values()
    limit = np.iinfo(np.int64).max if max_length is None else max_length
    if layout == "packed":  # whichever end is cut
        return np.minimum(prompt + chosen, limit) + np.minimum(prompt + rejected, limit)
    prompt = np.minimum(prompt, limit)
    return shared_slots(
        prompt, np.minimum(chosen, limit - prompt), np.minimum(rejected, limit - prompt)
    )


class Bins(torch.utils.data.Sampler[tuple[int, ...]]):
    """The pairs of each batch of an epoch: best fit decreasing over all of them, in a new order.

    Same as, for an epoch, but for which of the pairs of one length go together::

        bins = pack_lengths(slots, tokens_per_batch, seed)
        for k in permutation(len(bins)):
            yield tuple(bins[k])

    Every epoch has as many bins, since lengths alone say how many there are. The order is a
    function of (seed, epoch), the same on all ranks.

    Args:
        slots: (n,) int64, places of each pair.
        tokens_per_batch: places of a bin.
        seed: of ties and of the order.

    Raises:
        DataError: a pair has more places than a bin; names the row.

    >>> bins = Bins(np.array([5, 4, 3, 2]), tokens_per_batch=8, seed=0)
    >>> sorted(sorted(bin) for bin in bins)
    [[0, 2], [1, 3]]
    """

    def __init__(self, slots: NDArray[np.int64], tokens_per_batch: int, seed: int) -> None:
        longest = int(slots.argmax()) if len(slots) else 0
        if len(slots) and slots[longest] > tokens_per_batch:
            raise DataError(
                f"row {longest + 1}: its pair has {slots[longest]} tokens, and `tokens_per_batch` "
                f"is {tokens_per_batch}\nhint: `max_length` cuts each side",
                line=longest + 1,
                reason="limit",
            )
        self._slots = slots
        self._tokens_per_batch = tokens_per_batch
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        random = np.random.default_rng([self._seed, epoch])
        self._bins = pack_lengths(
            self._slots, self._tokens_per_batch, seed=int(random.integers(_SEED))
        )
        self._order = random.permutation(len(self._bins))

    def __len__(self) -> int:
        return len(self._bins)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        # The epoch may be set while these are read ahead.
        bins, order = self._bins, self._order
        return (tuple(bins[k].tolist()) for k in order)


class BinnedRows(torch.utils.data.Dataset[Any]):
    """Rows that are taken a bin at a time. It hands on the epoch, which loaders tell a data set."""

    def __init__(self, rows: Dataset, bins: Bins) -> None:
        self._rows = rows
        self.bins = bins

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, bin: tuple[int, ...]) -> list[dict[str, Any]]:
        return self._rows.__getitems__(list(bin))

    def __getitems__(self, bins: list[tuple[int, ...]]) -> list[dict[str, Any]]:
        return [row for bin in bins for row in self[bin]]

    def set_epoch(self, epoch: int) -> None:
        self.bins.set_epoch(epoch)
