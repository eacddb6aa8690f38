"""Data sets of random ids, and batches of them as bytes."""

from __future__ import annotations

import random

import numpy as np

from dpo_ext import PairDataset

# Several batches of a hundred pairs, by layout.

OPTIONS = {
    "padded": {"pairs_per_batch": 3},
    "packed": {"tokens_per_batch": 120, "bin_length": 60},
    "shared": {"tokens_per_batch": 60},
}


def random_pairs(n, seed=0, longest=12, shortest=1, vocabulary=99):
    rng = np.random.default_rng(seed)

    def side(least):
        return [
            rng.integers(1, vocabulary, rng.integers(least, longest + 1)).tolist() for _ in range(n)
        ]

    return PairDataset.from_ids(side(0), side(shortest), side(shortest), pad_id=0)


def small_pairs(n=20, seed=0, vocab_size=1000):
    rng = random.Random(seed)
    lists = [
        [[rng.randrange(vocab_size) for _ in range(rng.randint(0, 9))] for _ in range(n)]
        for _ in range(3)
    ]
    return PairDataset.from_ids(*lists, pad_id=seed, vocab_size=vocab_size)


# Of the other fields, once somebody asks.
WORKED_OUT = ("table", "segments")


def batch_bits(batch):
    """Every array of a batch, as bytes."""
    import torch

    values = {name: value for name, value in vars(batch).items() if name not in WORKED_OUT}
    return {
        name: torch.as_tensor(value).numpy().tobytes() if hasattr(value, "dtype") else value
        for name, value in values.items()
    }
