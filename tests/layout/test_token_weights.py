"""Weights of tokens from the data set: every layout's batches bring them to the score table."""

import pickle

import numpy as np
import pytest
import torch

from dpo_ext import DataError, PairDataset
from dpo_ext.torch import PairLoader, sequence_logps

V = 31
LAYOUTS = ["padded", "packed", "shared"]


def data(n=7, seed=0):
    """Pairs, some without a prompt or a completion, whose ids tell tokens apart; and their weights."""
    rng = np.random.default_rng(seed)
    ids = [
        [rng.integers(1, V, rng.integers(least, 6)).tolist() for _ in range(n)]
        for least in (0, 0, 1)
    ]
    pairs = PairDataset.from_ids(*ids, pad_id=0, vocab_size=V)
    weights = {
        name: [np.round(rng.normal(size=len(one)), 2).tolist() for one in lists]
        for name, lists in (("chosen", pairs.chosen_ids), ("rejected", pairs.rejected_ids))
    }
    return pairs, weights


def wanted(pairs, weights, index):
    """The weights of a batch's tokens by the definition."""
    out = []
    for i in index:
        skip = 0 if len(pairs.prompt_ids[i]) else 1  # no row predicts the first token
        for name in ("chosen", "rejected"):
            out += weights[name][i][skip:]
    return np.array(out, np.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{"pairs_per_batch": 3}, {"tokens_per_batch": 48}])
@pytest.mark.parametrize("seed", range(4))
def test_every_layout_brings_each_weight_to_its_token(layout, options, seed):
    pairs, weights = data(seed=seed)
    plan = pairs.plan(layout=layout, seed=seed, token_weights=weights, **options)
    plain = pairs.plan(layout=layout, seed=seed, **options)
    assert plan.digest == plain.digest
    for batch, other in zip(plan, plain, strict=True):
        want = wanted(pairs, weights, batch.pair_index)
        assert other.weights is None
        assert other.table.weights is None
        assert (batch.targets == np.where(want == 0, -100, other.targets)).all()
        assert batch.weights.dtype == np.float32
        for held in (batch, batch.to("cpu"), pickle.loads(pickle.dumps(batch))):
            assert np.array_equal(np.asarray(held.weights), want)
            assert np.array_equal(held.table.weights.numpy(), want)
        moved = batch.to("meta")
        assert moved.weights is moved.table.weights  # moved once


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_loader_brings_them_too(prefetch):
    pairs, weights = data()
    plan = pairs.plan(layout="packed", pairs_per_batch=2, token_weights=weights)
    for batch in PairLoader(plan, device="cpu", prefetch=prefetch):
        want = wanted(pairs, weights, batch.pair_index.tolist())
        assert np.array_equal(batch.table.weights.numpy(), want)


def test_the_log_prob_of_a_sequence_is_its_weighted_sum():
    pairs, weights = data()
    (batch,) = pairs.plan(layout="packed", pairs_per_batch=7, token_weights=weights)
    logits = torch.randn(*batch.input_ids.shape, V, dtype=torch.float64)
    (plain,) = pairs.plan(layout="packed", pairs_per_batch=7)
    token = torch.log_softmax(logits.flatten(0, 1), -1)[batch.logit_rows, plain.targets]
    want = wanted(pairs, weights, batch.pair_index).astype(float)
    sums = [
        (token.numpy()[a:b] * want[a:b]).sum()
        for a, b in zip(batch.seq_offsets[:-1], batch.seq_offsets[1:], strict=True)
    ]
    np.testing.assert_allclose(sequence_logps(logits, batch.table).flatten(), sums, atol=1e-10)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_lengths_count_the_tokens_that_weigh_something(layout):
    pairs = PairDataset.from_ids([[1], [2]], [[2, 3, 4], [5]], [[4], [6, 7]])
    weights = {"chosen": [[0.5, 0, 2], [0]], "rejected": [[1], [0, 1]]}
    (batch,) = pairs.plan(layout=layout, pairs_per_batch=2, shuffle=False, token_weights=weights)
    assert batch.table.lengths.tolist() == [[2, 1], [0, 1]]


def test_booleans_are_a_mask():
    pairs = PairDataset.from_ids([[1]], [[2, 3]], [[4]], pad_id=0, vocab_size=9)
    masks = {"chosen": [[True, False]], "rejected": [np.array([True])]}
    (batch,) = pairs.plan(layout="padded", pairs_per_batch=1, token_weights=masks)
    assert batch.weights.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("chosen", "rejected", "error", "message"),
    [
        (
            [[1.0]],
            [[1.0]],
            DataError,
            "pair 0, .*'chosen'.*expected 2 weights, .* found 1\nhint: pairs.ch",
        ),
        ([[1.0, 1.0]], [[]], DataError, "pair 0, .*'rejected'.*expected 1 weights, .* found 0"),
        ([], [[1.0]], DataError, "must have 1 lists, one a pair, found 0"),
        ([[1.0, np.nan]], [[1.0]], DataError, "pair 0, .*finite weights, found nan at token 1"),
        ([["a", "b"]], [[1.0]], TypeError, "pair 0, .*expected a list of numbers"),
    ],
)
def test_weights_that_do_not_fit_are_named_by_pair(chosen, rejected, error, message):
    pairs = PairDataset.from_ids([[1]], [[2, 3]], [[4]], pad_id=0, vocab_size=9)
    weights = {"chosen": chosen, "rejected": rejected}
    with pytest.raises(error, match=message):
        pairs.plan(layout="padded", pairs_per_batch=1, token_weights=weights)


def test_weights_of_other_names_or_kinds_are_refused():
    pairs = PairDataset.from_ids([[1]], [[2, 3]], [[4]], pad_id=0, vocab_size=9)
    with pytest.raises(DataError, match=r"must have `chosen` and `rejected`, found .'chosen'."):
        pairs.plan(layout="padded", pairs_per_batch=1, token_weights={"chosen": [[1, 1]]})
    with pytest.raises(TypeError, match=r"`token_weights` must be .*, found list"):
        pairs.plan(layout="padded", pairs_per_batch=1, token_weights=[[1, 1]])
