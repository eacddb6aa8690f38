"""The key of a sequence: 128 bits of what the model saw of it.

N is the number of pairs.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_ext import _core
from dpo_ext.errors import RefLogpsError, describe
from dpo_ext.layout.fill import SIDES, factors
from dpo_ext.pairs import Pairs, Ragged, map_of

# Pairs whose keys are worked out at once: so much of a mapped data set is resident meanwhile.
PART = 1 << 18
# Two passes of one reference differ by at most this times the root of the number of tokens: the
# budget of bfloat16 in two layouts. What differs by more is of another reference.
BUDGET = 0.02

Keys = NDArray[np.uint64]


class PairKeys:
    """The keys of the pairs ``index`` of a data set, both sides of a pair together.

    A key is a hash of the ids of prompt and completion, of where the one ends, and of the weights
    of the completion's tokens; see `_core.example_keys`. Ids are those after truncation: the
    padding, the layout, the order and the batch of a pair are not in it.
    """

    def __init__(
        self, pairs: Pairs, index: Any = None, token_weights: Mapping[str, Any] | None = None
    ) -> None:
        if not isinstance(pairs, Pairs):
            raise TypeError(f"`pairs` must be a PairDataset, found {describe(pairs)}")
        self.index = _index(index, len(pairs))
        weights = factors(pairs, token_weights)
        self._prompt = _columns(pairs.prompt_ids)
        self._sides: list[tuple[Any, Any, Any]] = []  # ids, offsets, weights
        for side, ragged in zip(SIDES, (pairs.chosen_ids, pairs.rejected_ids), strict=True):
            values, offsets = _columns(ragged)
            own = None if weights is None else np.ascontiguousarray(weights[side].values)
            self._sides.append((values, offsets, own))
        self._maps = {
            id(mapped): mapped
            for values in (self._prompt[0], *(side[0] for side in self._sides))
            if (mapped := map_of(values)) is not None
        }

    def __len__(self) -> int:
        return len(self.index)

    def whole(self) -> Keys:
        """(4N,) uint64, two numbers a key."""
        if len(self) <= PART:
            return _core.example_keys(self._prompt, self._sides, self.index)
        return np.concatenate([keys for _, keys in self.parts()])

    def parts(self) -> Iterator[tuple[int, Keys]]:
        """The same, some pairs at a time, each with the number of its first pair."""
        for start in range(0, len(self), PART):
            part = self.index[start : start + PART]
            yield start, _core.example_keys(self._prompt, self._sides, part)
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)

    def name(self, sequence: int) -> str:
        """Of one of the 2N sequences, for messages."""
        return f"pair {self.index[sequence // 2]}, `{SIDES[sequence % 2]}`"

    @property
    def tokens(self) -> NDArray[np.int64]:
        """(2N,) tokens of each completion."""
        return np.stack([np.diff(o)[self.index] for _, o, _ in self._sides], axis=1).reshape(-1)

    def sums(self, token_logps: Ragged) -> NDArray[np.float64]:
        """(2N,) float64: the log-probs of each sequence's tokens, times their weights, added up."""
        lengths, values = token_logps.lengths, token_logps.values.astype(np.float64)
        for first, (_, offsets, weights) in enumerate(self._sides):
            if weights is not None:
                is_own = np.repeat(np.arange(len(lengths)) % 2 == first, lengths)
                values[is_own] *= Ragged(weights, offsets).select(self.index).values
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        return np.bincount(sequence, values, minlength=len(lengths)).astype(np.float64)

    def apart(
        self,
        sequences: NDArray[np.int64],
        logps: NDArray[np.float64],
        others: NDArray[np.float64],
    ) -> NDArray[np.bool_]:
        """Which log-probs of sequences are not two roundings of one number."""
        if np.array_equal(logps, others):
            return np.zeros(len(logps), bool)
        budget = BUDGET * self._largest_weight() * np.sqrt(self.tokens[sequences])
        found: NDArray[np.bool_] = np.abs(logps - others) > budget
        return found

    def compare(
        self,
        sequences: NDArray[np.int64],
        logps: NDArray[np.float64],
        others: NDArray[np.float64],
        who: str,
    ) -> None:
        """That two log-probs of a sequence are two roundings of one number.

        Raises:
            RefLogpsError: they are not.
        """
        apart = self.apart(sequences, logps, others)
        if apart.any():
            i = int(apart.argmax())
            raise RefLogpsError(
                f"{self.name(int(sequences[i]))}: expected the log-prob that {who} for these "
                f"tokens, {others[i]}, found {logps[i]}; {int(apart.sum())} of {len(logps)} differ "
                "by more than rounding\n"
                "hint: the reference changed and its fingerprint did not, or one of the two was "
                "made with dropout, another dtype or other token weights"
            )

    def _largest_weight(self) -> float:
        own = (weights for _, _, weights in self._sides if weights is not None)
        return max([1.0, *(float(np.abs(part).max(initial=0)) for part in own)])


def _index(index: Any, n: int) -> NDArray[np.int64]:
    if index is None:
        return np.arange(n)
    found = np.asarray(index)
    if found.size == 0:
        return np.empty(0, np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise TypeError(f"`index` must be whole numbers of one dimension, found {describe(found)}")
    if found.min() < 0 or found.max() >= n:
        outside = found[(found < 0) | (found >= n)][0]
        raise IndexError(f"pair {outside} is out of range for {n} pairs")
    return np.ascontiguousarray(found, np.int64)


def _columns(ragged: Ragged) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    whole = ragged.contiguous()
    return whole.values, whole.offsets
