"""Log-probs of single tokens in a store: what comes back, what is missing, what is refused."""

import numpy as np
import pytest
from pair_cases import random_pairs
from reflogps_cases import opened, same

from dpo_ext import PairDataset, Ragged, RefLogpsError, TensorError
from dpo_ext.reflogps import shards

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("torch")
hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, pytest.importorskip("hypothesis.strategies")

SIDES = ("chosen", "rejected")


def tokens_of(pairs):
    """A log-prob a token, the same for equal sequences."""

    def of(prompt, side):
        seed = abs(hash((tuple(map(int, prompt)), tuple(map(int, side)))))
        return -np.random.default_rng(seed).random(len(side), np.float32) * 9

    return {
        side: [of(p, s) for p, s in zip(pairs.prompt_ids, ids, strict=True)]
        for side, ids in zip(SIDES, (pairs.chosen_ids, pairs.rejected_ids), strict=True)
    }


def sums_of(tokens):
    return np.array(
        [[np.sum(one, dtype=np.float64) for one in tokens[side]] for side in SIDES]
    ).T.reshape(-1, 2)


def case(n=40, seed=0):
    pairs = random_pairs(n, seed=seed)
    tokens = tokens_of(pairs)
    return pairs, sums_of(tokens), tokens


def assert_equal(found, tokens, index=None):
    for side in SIDES:
        lists = found[side]
        assert isinstance(lists, Ragged)
        assert lists.values.dtype == np.float32
        expected = tokens[side] if index is None else [tokens[side][i] for i in index]
        assert len(lists) == len(expected)
        for own, other in zip(lists, expected, strict=True):
            assert own.tobytes() == np.asarray(other, np.float32).tobytes()


@given(
    rows=st.lists(st.tuples(*[st.lists(st.integers(0, 9), max_size=3)] * 3), max_size=6),
    split=st.integers(0, 6),
)
def test_tokens_that_are_put_come_back_bit_by_bit(rows, split, tmp_path_factory):
    pairs = PairDataset.from_ids(*([row[i] for row in rows] for i in range(3)))
    tokens = tokens_of(pairs)
    values = sums_of(tokens)
    store = opened(tmp_path_factory.mktemp("s") / "store")
    first = list(range(min(split, len(rows))))
    store.put(
        pairs,
        values[first],
        index=first,
        token_logps={s: [tokens[s][i] for i in first] for s in SIDES},
    )
    store.put(pairs, values)
    lacking = store.missing(pairs, tokens=True)
    assert not set(lacking) & set(first)
    assert len(store.missing(pairs)) == 0
    store.put(pairs, values, token_logps=tokens)
    back = list(range(len(rows)))[::-2]
    for again in (store, opened(store.folder)):
        assert len(again.missing(pairs, tokens=True)) == 0
        assert_equal(again.get_tokens(pairs), tokens)
        assert_equal(again.get_tokens(pairs, index=back), tokens, back)
        assert_equal(again.get_tokens(pairs.select(back)), tokens, back)
        assert same(again.get(pairs), values)


def test_a_sum_that_is_there_stays_when_its_tokens_come_later(tmp_path):
    pairs, values, tokens = case()
    store = opened(tmp_path)
    rows = store.put(pairs, values + 1e-4)
    assert store.put(pairs, values + 1e-4) == 0
    assert store.put(pairs, values, token_logps=tokens) == rows
    assert store.put(pairs, values, token_logps=tokens) == 0
    for again in (store, opened(tmp_path)):
        assert same(again.get(pairs), values + 1e-4)
        assert_equal(again.get_tokens(pairs), tokens)
    assert store.stats.rows == rows


def test_a_store_without_tokens_says_so_and_what_to_do(tmp_path):
    pairs, values, tokens = case(10)
    store = opened(tmp_path)
    store.put(pairs, values)
    store.put(pairs, values[:4], index=range(4), token_logps={s: tokens[s][:4] for s in SIDES})
    assert store.missing(pairs, tokens=True).tolist() == [4, 5, 6, 7, 8, 9]
    with pytest.raises(
        RefLogpsError, match="6 of 10 pairs are without log-probs of their tokens"
    ) as e:
        store.get_tokens(pairs)
    assert "missing(pairs, tokens=True)" in str(e.value)
    assert_equal(store.get_tokens(pairs, index=[3, 0]), tokens, [3, 0])


def test_tokens_are_not_weighed_and_their_sums_are(tmp_path):
    pairs, _, tokens = case(12)
    rng = np.random.default_rng(1)
    weights = {s: [rng.integers(0, 3, len(one)).astype(float) for one in tokens[s]] for s in SIDES}
    weighed = sums_of(
        {s: [w * t for w, t in zip(weights[s], tokens[s], strict=True)] for s in SIDES}
    )
    store = opened(tmp_path)
    with pytest.raises(RefLogpsError, match="times their weights, have the sum"):
        store.put(pairs, sums_of(tokens), token_weights=weights, token_logps=tokens)
    store.put(pairs, weighed, token_weights=weights, token_logps=tokens)
    assert_equal(store.get_tokens(pairs, token_weights=weights), tokens)
    with pytest.raises(RefLogpsError, match="12 of 12"):
        store.get_tokens(pairs)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda t: {**t, "chosen": t["chosen"][:-1]}, TensorError, "must have 12 lists, one a pair, found 11"),
        (lambda t: {**t, "chosen": [*t["chosen"][:5], [0.0] * 99, *t["chosen"][6:]]}, TensorError,
         r"pair 5, `token_logps\['chosen'\]`: expected \d+ numbers, one a token of its completion, found 99"),
        (lambda t: {"chosen": t["chosen"]}, TensorError, r"found \['chosen'\]"),
        (lambda t: t["chosen"], TensorError, "must be"),
        (lambda t: {**t, "rejected": [["a"]] * 12}, TensorError, "pair 0, .*expected a list of numbers"),
        (lambda t: {**t, "rejected": [[[0.0]]] * 12}, TensorError, "expected a list of numbers"),
        (lambda t: {**t, "rejected": 3}, TensorError, "must be lists of numbers"),
        (lambda t: {**t, "rejected": [one * np.nan for one in t["rejected"]]}, RefLogpsError,
         "pair 0, `rejected`, token 0: expected a finite log-prob that float32 holds, found nan"),
        (lambda t: {**t, "rejected": [one.astype(float) * 1e39 for one in t["rejected"]]}, RefLogpsError, "found -inf"),
        (lambda t: {**t, "rejected": [one - 1 for one in t["rejected"]]}, RefLogpsError, "have the sum"),
    ],
)  # fmt: skip
def test_other_lists_are_refused_and_nothing_is_stored(tmp_path, change, error, match):
    pairs, values, tokens = case(12)
    store = opened(tmp_path / "s")
    with pytest.raises(error, match=match):
        store.put(pairs, values, token_logps=change(tokens))
    assert not (tmp_path / "s").exists()


def test_values_of_the_caller_are_not_written_to(tmp_path):
    pairs, values, tokens = case()
    store = opened(tmp_path)
    store.put(pairs, values)
    given = values + 1e-4
    before = given.copy()
    store.put(pairs, given, token_logps=tokens)
    assert same(given, before)


def test_many_tokens_go_into_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "TOKENS", 10)
    pairs, values, tokens = case()
    store = opened(tmp_path)
    store.put(pairs, values, token_logps=tokens)
    assert store.stats.shards > 5
    assert_equal(opened(tmp_path).get_tokens(pairs), tokens)


def test_a_shard_with_tokens_is_damaged_by_any_flip_and_healed_by_a_put(tmp_path):
    pairs, values, tokens = case(6)
    store = opened(tmp_path)
    store.put(pairs, values, token_logps=tokens)
    (shard,) = tmp_path.glob("*.parquet")
    data = bytearray(shard.read_bytes())
    for i in range(0, len(data), 97):
        data[i] ^= 1
        shard.write_bytes(data)
        data[i] ^= 1
        again = opened(tmp_path)
        assert len(again.missing(pairs, tokens=True)) == 6
        with pytest.raises(RefLogpsError):
            again.get_tokens(pairs)
    again.put(pairs, values, token_logps=tokens)
    assert_equal(opened(tmp_path).get_tokens(pairs), tokens)


def test_a_sound_shard_whose_tokens_are_nonsense_is_an_error(tmp_path):
    pairs, values, tokens = case(6)
    store = opened(tmp_path)
    store.put(pairs, values, token_logps=tokens)
    (shard,) = tmp_path.glob("*.parquet")
    table = pq.read_table(shard)
    for column in (
        pa.array([[0.0]] * len(table), pa.list_(pa.float64())),
        pa.array([None] * len(table), pa.list_(pa.float32())),
        pa.array([[np.nan]] * len(table), pa.list_(pa.float32())),
        pa.array([1] * len(table)),
        pa.array([[0.0] * 99] * len(table), pa.list_(pa.float32())),
    ):
        other = table.set_column(2, "token_logps", column)
        from dpo_ext.store.folder import Digest

        sink = pa.BufferOutputStream()
        pq.write_table(other, sink, compression="none")
        made = sink.getvalue().to_pybytes()
        digest = Digest()
        digest.update(memoryview(made))
        for old in tmp_path.glob("*"):
            old.unlink()
        (tmp_path / f"{digest.hexdigest()[:32]}.parquet").write_bytes(made)
        again = opened(tmp_path)
        assert same(again.get(pairs), values)
        with pytest.raises(RefLogpsError):
            again.get_tokens(pairs)


def test_of_no_pair_there_are_no_tokens(tmp_path):
    pairs = random_pairs(3)[:0]
    found = opened(tmp_path / "none").get_tokens(pairs)
    assert {side: len(lists) for side, lists in found.items()} == {"chosen": 0, "rejected": 0}
