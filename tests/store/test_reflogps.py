"""The store of reference log-probs: what comes back, what is missing, what is refused."""

import pickle
import shutil
import threading

import numpy as np
import pytest
from pair_cases import random_pairs
from places import GOLDEN
from reflogps_cases import opened, pairs_and_values, same, values_of

from dpo_ext import PairDataset, RefLogpsError, TensorError
from dpo_ext.reflogps import Fingerprint
from dpo_ext.reflogps import keys as keys_file

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
torch = pytest.importorskip("torch")
hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, pytest.importorskip("hypothesis.strategies")


@given(
    rows=st.lists(
        st.tuples(*[st.lists(st.integers(0, 2**31 - 1), max_size=3)] * 3), max_size=5, unique_by=str
    ),
    data=st.data(),
)
def test_what_is_put_comes_back_bit_by_bit_and_the_rest_is_missing(rows, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("s") / "store"
    pairs = PairDataset.from_ids(*([row[i] for row in rows] for i in range(3)))
    finite = st.floats(allow_nan=False, allow_infinity=False)
    drawn = {}
    known = np.array(
        [
            [drawn.setdefault((str(p), str(side)), data.draw(finite)) for side in two]
            for p, *two in rows
        ]
    ).reshape(-1, 2)
    half = len(rows) // 2
    store = opened(folder)
    assert store.put(pairs[:half], known[:half]) == len(
        {(str(p), str(side)) for p, *two in rows[:half] for side in two}
    )
    assert same(store.get(pairs[:half]), known[:half])
    there = {(str(p), str(side)) for p, *two in rows[:half] for side in two}
    lacks = [
        i for i, (p, *two) in enumerate(rows) if any((str(p), str(s)) not in there for s in two)
    ]
    for again in (store, opened(folder)):
        assert again.missing(pairs).tolist() == lacks
    store.put(pairs, known)
    assert same(opened(folder).get(pairs), known)


def test_a_missing_pair_is_an_error_that_lists_examples(tmp_path):
    pairs, values = pairs_and_values()
    store = opened(tmp_path)
    store.put(pairs[:50], values[:50])
    with pytest.raises(
        RefLogpsError, match=r"10 of 60 pairs are missing: 50, 51, 52, 53, 54, \.\.\."
    ):
        store.get(pairs)
    assert store.missing(pairs).tolist() == list(range(50, 60))
    assert store.missing(pairs, index=[59, 0, 55]).tolist() == [59, 55]
    assert store.missing(pairs).dtype == np.int64
    with pytest.raises(RefLogpsError, match="1 of 2 pairs are missing: 55"):
        store.get(pairs, index=[0, 55])
    assert (store.stats.hits, store.stats.misses) == (50 + 50 + 1 + 50 + 1, 10 * 3 + 2 + 1)


def test_a_folder_that_is_not_there_has_nothing_and_is_not_made_by_reading(tmp_path):
    pairs, _ = pairs_and_values(3)
    store = opened(tmp_path / "none")
    assert store.missing(pairs).tolist() == [0, 1, 2]
    with pytest.raises(RefLogpsError, match="3 of 3 pairs"):
        store.get(pairs)
    assert store.stats.rows == 0
    assert not (tmp_path / "none").exists()


def test_of_no_pair_nothing_is_written(tmp_path):
    pairs = random_pairs(3)[:0]
    store = opened(tmp_path / "none")
    assert store.put(pairs, np.empty((0, 2))) == 0
    assert store.put(pairs, []) == 0
    assert store.get(pairs).shape == (0, 2)
    assert store.missing(pairs).tolist() == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_with_its_pair_and_nothing_is_stored(tmp_path, bad):
    pairs, values = pairs_and_values()
    values[7, 1] = bad
    store = opened(tmp_path / "s")
    with pytest.raises(RefLogpsError, match=r"pair 7, `rejected`: expected a finite log-prob"):
        store.put(pairs, values)
    with pytest.raises(RefLogpsError, match=r"pair 30, `rejected`"):
        store.put(pairs, values[[3, 7]], index=[2, 30])
    assert not (tmp_path / "s").exists()
    assert len(store.missing(pairs)) == len(pairs)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((4, 2)),
        np.zeros(6),
        np.zeros((3, 3)),
        np.zeros((2, 3)),
        np.zeros((3, 2), bool),
        "no",
        [["a", "b"]] * 3,
        None,
        np.zeros((3, 2), complex),
    ],
)
def test_values_of_another_shape_or_kind_are_refused(tmp_path, values):
    pairs, _ = pairs_and_values(3)
    with pytest.raises(TensorError, match=r"`values` must be of shape \(3, 2\)"):
        opened(tmp_path).put(pairs, values)


def test_tensors_are_values(tmp_path):
    pairs, values = pairs_and_values()
    store = opened(tmp_path)
    store.put(pairs, torch.from_numpy(values).float())
    assert same(store.get(pairs), values.astype(np.float32).astype(np.float64))
    with pytest.raises(TensorError, match="requires grad"):
        store.put(pairs, torch.from_numpy(values).requires_grad_())
    with pytest.raises(TensorError, match="bfloat16"):
        store.put(pairs, torch.from_numpy(values).bfloat16())


@pytest.mark.parametrize(
    ("index", "error"),
    [
        ([60], IndexError),
        ([-1], IndexError),
        ([0.5], TypeError),
        ([[1]], TypeError),
        ([True], TypeError),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, index, error):
    pairs, values = pairs_and_values()
    store = opened(tmp_path)
    for call in (store.get, store.missing, lambda p, index: store.put(p, values[:1], index=index)):
        with pytest.raises(error):
            call(pairs, index=index)


def test_rows_are_no_pairs(tmp_path):
    with pytest.raises(TypeError, match="`pairs` must be a PairDataset, found list"):
        opened(tmp_path).get([{"prompt": "a"}])


# What is in the key, and what is not


def knobs():
    """Changes of what the model sees, by name: each gives (pairs, token_weights) of the one pair."""
    base = {"prompt": [5, 6, 7, 8], "chosen": [9, 10, 11], "rejected": [12, 13]}
    ones = {"chosen": [[1.0] * 3], "rejected": [[1.0] * 2]}
    weighted = {"chosen": [[1.0, 0.5, 0.25]], "rejected": [[1.0, 0.5]]}

    def made(weights=None, **sides):
        parts = {**base, **sides}
        return PairDataset.from_ids(*([parts[k]] for k in base)), weights

    other = {
        "a prompt cut at its start": made(prompt=[6, 7, 8]),
        "a prompt cut at its end": made(prompt=[5, 6, 7]),
        "no prompt": made(prompt=[]),
        "a completion cut at its end": made(chosen=[9, 10], rejected=[12]),
        "a completion cut at its start": made(chosen=[10, 11], rejected=[13]),
        "an EOS at the end": made(chosen=[9, 10, 11, 2], rejected=[12, 13, 2]),
        "a BOS at the start": made(prompt=[1, 5, 6, 7, 8]),
        "one id of the prompt": made(prompt=[5, 6, 7, 9]),
        "one id of each completion": made(chosen=[9, 10, 12], rejected=[12, 14]),
        "two ids exchanged": made(prompt=[6, 5, 7, 8]),
        "a high bit of an id": made(prompt=[5 + 2**30, 6, 7, 8]),
        "the border one to the left": made(
            prompt=[5, 6, 7], chosen=[8, 9, 10, 11], rejected=[8, 12, 13]
        ),
        "the border one to the right": made(
            prompt=[5, 6, 7, 8, 9], chosen=[10, 11], rejected=[12, 13]
        ),
        "another system prompt": made(prompt=[50, 51, 5, 6, 7, 8]),
        "padding inside": made(prompt=[0, 5, 6, 7, 8]),
        "LD weights": made(weighted),
        "other LD weights": made({"chosen": [[1.0, 0.5, 0.5]], "rejected": [[1.0, 0.25]]}),
        "weights 0": made({"chosen": [[1.0, 1.0, 0.0]], "rejected": [[1.0, 0.0]]}),
        "an average": made({"chosen": [[1 / 3] * 3], "rejected": [[1 / 2] * 2]}),
        "sides of another pair": made(chosen=[12, 13, 14], rejected=[9, 10]),
    }
    return base, made, ones, weighted, other


@pytest.mark.parametrize("name", knobs()[-1])
def test_a_knob_that_moves_the_value_moves_the_key(tmp_path, name):
    _, made, _, _, other = knobs()
    pairs, _ = made()
    store = opened(tmp_path)
    store.put(pairs, [[-1.0, -2.0]])
    changed, weights = other[name]
    keys = [
        set(map(bytes, keys_file.PairKeys(p, None, w).whole().reshape(-1, 2)))
        for p, w in ((pairs, None), (changed, weights))
    ]
    assert len(keys[0] | keys[1]) == 4
    assert store.missing(changed, token_weights=weights).tolist() == [0]
    with pytest.raises(RefLogpsError, match="1 of 1 pairs"):
        store.get(changed, token_weights=weights)


def test_all_those_keys_differ_from_each_other():
    other = knobs()[-1]
    whole = [keys_file.PairKeys(p, None, w).whole().tobytes() for p, w in other.values()]
    assert len(set(whole)) == len(whole) == 20


def test_the_sides_of_a_pair_are_sequences_of_their_own(tmp_path):
    """A completion is found in another pair, on the other side too."""
    store = opened(tmp_path)
    store.put(PairDataset.from_ids([[1, 2]], [[3]], [[4]]), [[-1.0, -2.0]])
    other = PairDataset.from_ids([[1, 2]], [[4]], [[3]])
    assert store.get(other).tolist() == [[-2.0, -1.0]]


def layouts_of(pairs):
    for layout, options in (
        ("padded", {"pairs_per_batch": 7}),
        ("padded", {"pairs_per_batch": 3, "pad_to_multiple_of": 8}),
        ("packed", {"tokens_per_batch": 200}),
        ("shared", {"tokens_per_batch": 200}),
    ):
        for seed in (0, 1):
            yield pairs.plan(layout=layout, seed=seed, **options)


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "reorder",
        "subset",
        "repeat",
        "pad_id",
        "vocab_size",
        "columns",
        "ref_logps",
        "rows",
        "concat",
        "saved and mapped",
        "mapped unverified",
        "not contiguous",
        "weights of 1",
        "pickle",
    ],
)
def test_what_does_not_move_the_value_is_a_hit(tmp_path, name):
    pairs, values = pairs_and_values()
    store = opened(tmp_path / "store")
    store.put(pairs, values)
    order = np.random.default_rng(0).permutation(len(pairs))
    again, want, weights = pairs, values, None
    ids = (pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids)
    if name == "reorder":
        again, want = pairs.select(order), values[order]
    elif name == "subset":
        again, want = pairs[10:20], values[10:20]
    elif name == "repeat":
        again, want = pairs.select([3, 3, 5]), values[[3, 3, 5]]
    elif name == "pad_id":
        again = PairDataset.from_ids(*ids, pad_id=55)
    elif name == "vocab_size":
        again = PairDataset.from_ids(*ids, vocab_size=50_000)
    elif name == "columns":
        again.columns["source"] = np.arange(len(pairs))
    elif name == "ref_logps":
        again = pairs.with_ref_logps(values * 0)
    elif name == "rows":
        again.rows = again.rows + 1000
    elif name == "concat":
        again, want = pairs.concat(pairs), np.concatenate([values, values])
    elif name in ("saved and mapped", "mapped unverified"):
        pairs.save(tmp_path / "pairs")
        again = PairDataset.load(tmp_path / "pairs", verify=name == "saved and mapped")
    elif name == "not contiguous":
        again = PairDataset.from_ids(*ids)
        doubled = np.repeat(again.prompt_ids.values, 2)[::2]
        again.prompt_ids = type(again.prompt_ids)(doubled, again.prompt_ids.offsets)
    elif name == "weights of 1":
        weights = {
            side: [[1.0] * len(one) for one in lists]
            for side, lists in (("chosen", pairs.chosen_ids), ("rejected", pairs.rejected_ids))
        }
    elif name == "pickle":
        again = pickle.loads(pickle.dumps(pairs))
    for reader in (store, opened(tmp_path / "store"), pickle.loads(pickle.dumps(store))):
        assert same(reader.get(again, token_weights=weights), want)
        assert reader.missing(again, token_weights=weights).tolist() == []
        assert reader.put(again, want, token_weights=weights) == 0
    assert store.stats.shards == 1


def test_batches_of_every_layout_and_size_hit(tmp_path):
    pairs, values = pairs_and_values()
    store = opened(tmp_path)
    store.put(pairs, values)
    for plan in layouts_of(pairs):
        for batch in plan:
            assert same(store.get(pairs, index=batch.pair_index), values[batch.pair_index])


def test_the_folder_may_move_and_be_copied(tmp_path):
    pairs, values = pairs_and_values()
    opened(tmp_path / "a").put(pairs, values)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "c")
    for name in "bc":
        assert same(opened(tmp_path / name).get(pairs), values)


def test_the_size_of_the_puts_does_not_matter(tmp_path):
    pairs, values = pairs_and_values(101)
    for size in (1, 7, 101):
        store = opened(tmp_path / str(size))
        for start in range(0, 101, size):
            store.put(pairs[start : start + size], values[start : start + size])
        assert same(opened(tmp_path / str(size)).get(pairs), values)


def test_parts_of_a_large_data_set_are_one(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_ext.reflogps.keys.PART", 7)
    monkeypatch.setattr("dpo_ext.reflogps.shards.ROWS", 16)
    pairs, values = pairs_and_values(100)
    pairs.save(tmp_path / "pairs")
    mapped = PairDataset.load(tmp_path / "pairs")
    store = opened(tmp_path / "store")
    store.put(mapped, values)
    assert store.stats.shards > 5
    assert same(opened(tmp_path / "store").get(mapped), values)
    index = np.arange(99, -1, -3)
    assert same(opened(tmp_path / "store").get(mapped, index=index), values[index])
    others = random_pairs(50, seed=9)
    both = others.concat(pairs)
    assert store.missing(both).tolist() == store.missing(others).tolist()
    assert len(store.missing(others)) > 40


def test_a_hundred_thousand_keys_differ(tmp_path):
    n = 50_000
    ids = np.arange(n)
    pairs = PairDataset.from_ids(
        [[i % 7] for i in ids], [[i, 1] for i in ids], [[i, 2] for i in ids]
    )
    values = -np.arange(2.0 * n).reshape(n, 2)
    store = opened(tmp_path)
    assert store.put(pairs, values) == 2 * n
    assert same(opened(tmp_path).get(pairs), values)


# A value that is there stays


def test_equal_sequences_are_one_row_and_their_values_must_agree(tmp_path):
    pairs = PairDataset.from_ids([[1], [1]], [[2, 2], [2, 2]], [[3], [4]])
    store = opened(tmp_path)
    with pytest.raises(
        RefLogpsError, match=r"pair 1, `chosen`: expected the log-prob that an equal"
    ):
        store.put(pairs, [[-1.0, -2.0], [-1.5, -3.0]])
    assert store.missing(pairs).tolist() == [0, 1]
    assert store.put(pairs, [[-1.0, -2.0], [-1.01, -3.0]]) == 3
    assert store.get(pairs).tolist() == [[-1.0, -2.0], [-1.0, -3.0]]


def test_another_rounding_keeps_what_is_there(tmp_path):
    pairs, values = pairs_and_values()
    store = opened(tmp_path)
    store.put(pairs, values)
    assert store.put(pairs, values + 0.001) == 0
    assert same(opened(tmp_path).get(pairs), values)


def test_a_contradiction_is_an_error_that_names_the_pair(tmp_path):
    """The fingerprint was not complete: neither the old value nor the new one is taken in silence."""
    pairs, values = pairs_and_values()
    store = opened(tmp_path)
    store.put(pairs, values)
    changed = values.copy()
    changed[11, 0] += 0.5
    with pytest.raises(
        RefLogpsError, match=r"pair 11, `chosen`: expected the log-prob that the store"
    ):
        store.put(pairs, changed)
    assert same(opened(tmp_path).get(pairs), values)


# The fingerprint


@pytest.mark.parametrize(
    ("stored", "asked", "said"),
    [
        ("a", "b", "`name`: b, and a in the other"),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, "`dtype`: bfloat16, and float32"),
        ({"dtype": "float32"}, {"dtype": "float32", "epoch": 1}, "`epoch`: 1, and nothing"),
        (
            {"config": {"rope": {"theta": 1e4}}},
            {"config": {"rope": {"theta": 5e5}}},
            "`config.rope.theta`",
        ),
        ({"tokenizer": "ab"}, {"tokenizer": "cd"}, "`tokenizer`: cd, and ab"),
        ({"max_length": 512}, {"max_length": 1024}, "`max_length`: 1024, and 512"),
        ({"flag": 1}, {"flag": True}, "`flag`: true, and 1"),
        ({"flag": None}, {"flag": "nothing"}, "`flag`"),
    ],
)
def test_a_store_of_another_reference_is_refused_with_the_part_that_differs(
    tmp_path, stored, asked, said
):
    pairs, values = pairs_and_values()
    opened(tmp_path, stored).put(pairs, values)
    with pytest.raises(RefLogpsError, match="another reference") as refused:
        opened(tmp_path, asked)
    assert said in str(refused.value)
    assert same(opened(tmp_path, stored).get(pairs), values)


def test_a_soft_part_that_differs_warns_and_hits(tmp_path):
    pairs, values = pairs_and_values()
    sdpa, eager = (Fingerprint({"parameters": "ab"}, {"attention": a}) for a in ("sdpa", "eager"))
    opened(tmp_path, sdpa).put(pairs, values)
    with pytest.warns(UserWarning, match=r"`attention`: eager, and sdpa in the other"):
        store = opened(tmp_path, eager)
    assert same(store.get(pairs), values)
    store.put(more := random_pairs(3, seed=5), values_of(more))
    opened(tmp_path, Fingerprint({"parameters": "ab"}))  # unknown: nothing to say
    opened(tmp_path, sdpa)
    with pytest.warns(UserWarning, match="`attention`"):
        opened(tmp_path, eager)


@pytest.mark.parametrize(
    "name", ["beta", "learning_rate", "batch_size", "layout", "packing", "loss"]
)
def test_on_what_no_log_prob_depends_is_no_part_of_a_fingerprint(tmp_path, name):
    with pytest.raises(TypeError, match=f"`{name}` is no part of a fingerprint"):
        opened(tmp_path, {"model": "m", name: 0.1})


@pytest.mark.parametrize("fingerprint", [None, 3, {}, {"a": object()}, ["a"]])
def test_what_is_no_fingerprint_is_refused(tmp_path, fingerprint):
    with pytest.raises(TypeError):
        opened(tmp_path, fingerprint)


def test_the_order_of_parts_does_not_matter(tmp_path):
    pairs, values = pairs_and_values()
    opened(tmp_path, {"a": 1, "b": {"c": 2, "d": 3}}).put(pairs, values)
    assert same(opened(tmp_path, {"b": {"d": 3, "c": 2}, "a": 1}).get(pairs), values)


# The files


def test_the_first_release_is_read():
    """Keys, shards and manifest of version 1, which no test writes again."""
    pairs = PairDataset.from_ids([[1, 2], [], [3]], [[4], [5, 6], [7]], [[8, 9], [10], [2**31 - 1]])
    store = opened(GOLDEN / "reflogps-v1", {"parameters": "ab", "head": {"softcap": None}})
    plain = [[-1.5, -2.25], [-0.5, -4.0], [-1 / 3, -1e300]]
    assert store.get(pairs).tolist() == plain
    weights = {"chosen": [[0.5], [1, 1], [1]], "rejected": [[1, 0], [1], [1]]}
    weighted = [[-0.75, -1.0], *plain[1:]]
    assert store.get(pairs, token_weights=weights).tolist() == weighted
    assert (store.stats.rows, store.stats.shards) == (8, 2)


def test_weights_of_the_data_are_those_of_a_plan_and_both_are_a_product(tmp_path):
    ids = ([[1, 2], [3]], [[4, 5], [6]], [[7], [8, 9]])
    weights = {"chosen": [[0.5, 1], [3]], "rejected": [[4], [2, 0]]}
    plain = PairDataset.from_ids(*ids)
    weighted = PairDataset.from_ids(
        *ids, chosen_weights=weights["chosen"], rejected_weights=weights["rejected"]
    )
    store, values = opened(tmp_path), np.array([[-1.0, -2.0], [-3.0, -4.0]])
    store.put(weighted, values)
    assert store.missing(plain).tolist() == [0, 1]
    assert same(store.get(plain, token_weights=weights), values)
    again = weighted.select([1, 0])
    assert same(store.get(again), values[::-1])
    assert store.missing(weighted, token_weights=weights).tolist() == [0, 1]
    squared = {name: [[w * w for w in one] for one in lists] for name, lists in weights.items()}
    store.put(weighted, values - 1, token_weights=weights)
    assert same(store.get(plain, token_weights=squared), values - 1)


def test_anything_that_reads_parquet_reads_a_shard(tmp_path):
    pairs, values = pairs_and_values()
    opened(tmp_path).put(pairs, values)
    (path,) = tmp_path.glob("*.parquet")
    table = pq.read_table(path, page_checksum_verification=True)
    assert table.schema.names == ["key", "logp"]
    assert table.schema.field("key").type == pa.binary(16)
    assert set(table["logp"].to_pylist()) == set(values.ravel())
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    assert column.compression == "UNCOMPRESSED"


def test_a_row_takes_at_most_40_bytes(tmp_path):
    n = 20_000
    ids = np.arange(n)
    pairs = PairDataset.from_ids([[1]] * n, [[i, 1] for i in ids], [[i, 2] for i in ids])
    store = opened(tmp_path)
    store.put(pairs, -np.random.default_rng(0).random((n, 2)))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 40 * 2 * n
    assert store.stats.bytes / store.stats.rows < 25


def test_a_second_writer_s_rows_are_seen_without_reopening(tmp_path):
    pairs, values = pairs_and_values()
    reader = opened(tmp_path)
    assert len(reader.missing(pairs)) == 60
    opened(tmp_path).put(pairs, values)
    assert same(reader.get(pairs), values)
    assert reader.put(pairs, values) == 0


def test_a_folder_of_others_is_left_alone(tmp_path):
    pairs, values = pairs_and_values()
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RefLogpsError, match=r"a store of reference log-probs or an empty folder"):
        opened(tmp_path).put(pairs, values)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_saved_data_set_is_no_store_and_a_store_no_data_set(tmp_path):
    pairs, values = pairs_and_values()
    pairs.save(tmp_path / "pairs")
    with pytest.raises(RefLogpsError, match="expected the format"):
        opened(tmp_path / "pairs")
    opened(tmp_path / "store").put(pairs, values)
    from dpo_ext import DataError

    with pytest.raises(DataError, match="expected the format"):
        PairDataset.load(tmp_path / "store")
    with pytest.raises(DataError, match="a saved data set or an empty folder"):
        pairs.save(tmp_path / "store")
    assert same(opened(tmp_path / "store").get(pairs), values)


def test_a_file_in_place_of_the_folder_is_said_by_the_system(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        opened(tmp_path / "file")


def test_threads_read_and_write_at_once(tmp_path):
    pairs, values = pairs_and_values(400)
    store = opened(tmp_path)
    failed = []

    def work(k):
        try:
            for start in range(0, 400, 50):
                part = np.arange(start, start + 50)
                if k % 2:
                    store.put(pairs, values[part], index=part)
                store.missing(pairs)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert same(store.get(pairs), values)


@pytest.mark.parametrize("call", ["read", "add"])
def test_an_interrupt_while_shards_are_read_leaves_no_value_unset(tmp_path, monkeypatch, call):
    """Between a key and its value: both or none."""
    pairs, values = pairs_and_values()
    for start in range(0, 60, 20):
        opened(tmp_path).put(pairs[start : start + 20], values[start : start + 20])
    store = opened(tmp_path)
    count = []

    def interrupted(real):
        def work(*args):
            result = real(*args)
            count.append(1)
            if len(count) == 2:
                raise KeyboardInterrupt
            return result

        return work

    with monkeypatch.context() as patched:
        if call == "read":
            from dpo_ext.reflogps import shards

            patched.setattr(shards, "read", interrupted(shards.read))
        else:

            class Table:
                def __init__(self):
                    self.table = KeyTable()
                    self.add = interrupted(self.table.add)

                def __len__(self):
                    return len(self.table)

                def __getattr__(self, name):
                    return getattr(self.table, name)

            from dpo_ext import _core
            from dpo_ext._core import KeyTable

            patched.setattr(_core, "KeyTable", Table)
        with pytest.raises(KeyboardInterrupt):
            store.missing(pairs)
    assert same(store.get(pairs), values)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    import sys

    pairs, values = pairs_and_values()
    for name in [m for m in sys.modules if m.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"dpo_ext\[arrow\]"):
        opened(tmp_path / "s").put(pairs, values)
    assert not (tmp_path / "s").exists()
