"""Pairs with made-up log-probs, and stores of them."""

from __future__ import annotations

import numpy as np
from pair_cases import random_pairs

from dpo_ext.reflogps import ReferenceStore


def values_of(pairs, seed=0):
    """One log-prob a sequence, the same for equal ones, as a reference gives it."""
    return np.array(
        [
            [-abs(hash((seed, tuple(map(int, p)), tuple(map(int, s))))) % 10**6 / 7e3 for s in two]
            for p, *two in zip(pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids, strict=True)
        ]
    ).reshape(-1, 2)


def pairs_and_values(n=60, seed=0):
    pairs = random_pairs(n, seed=seed)
    return pairs, values_of(pairs)


def opened(folder, fingerprint="model"):
    return ReferenceStore(folder, fingerprint=fingerprint)


def same(a, b):
    return a.dtype == b.dtype == np.float64 and a.tobytes() == b.tobytes()
