"""Saved single completions: what comes back, and what is refused."""

import json
import pickle
import random
import tempfile

import byte_tokenizer
import numpy as np
import pytest
import tiny
from pair_cases import small_pairs
from places import GOLDEN
from saved_folders import data_file, flips_seen, forge

from dpo_ext import DataError, PairDataset, UnpairedDataset

pa = pytest.importorskip("pyarrow")
hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, pytest.importorskip("hypothesis.strategies")

KNOWN = ("labels", "rows", "ref_logps", "ref_kl_logps", "kl_completions")


def examples(n=20, seed=0, **options):
    rng = random.Random(seed)
    lists = [
        [[rng.randrange(1000) for _ in range(rng.randint(1, 9))] for _ in range(n)]
        for _ in range(2)
    ]
    labels = [rng.random() < 0.5 for _ in range(n)]
    made = UnpairedDataset.from_ids(*lists, labels, pad_id=seed, vocab_size=1000, **options)
    made.columns = {"score": np.arange(n) / 4, "source": np.array(["a"] * n, object)}
    return made


def known(n=20):
    values = np.arange(n) / 7
    return examples(n, max_length=40).with_ref_logps(
        -values, kl=-2 * values, kl_completions=(np.arange(n) + 1) % n
    )


def same(a, b):
    names = ("prompt_ids", "completion_ids", "pad_id", "vocab_size", "max_length", "truncation")
    return (
        all(getattr(a, name) == getattr(b, name) for name in (*names, "report"))
        and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in KNOWN)
        and list(a.columns) == list(b.columns)
        and all(np.array_equal(values, b.columns[name]) for name, values in a.columns.items())
    )


def rows(n=30):
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen", "id": i}
        for i, row in enumerate(tiny.rows(n))
        for side in ("chosen", "rejected")
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer.tokenizer(tmp_path_factory.mktemp("bytes"))


ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)


@given(
    drawn=st.lists(st.tuples(ids, ids, st.booleans()), max_size=6),
    ref=st.sampled_from(["none", "ref", "kl"]),
    drops=st.booleans(),
    cut=st.sampled_from([None, 8, 4096]),
)
def test_what_is_saved_comes_back(drawn, ref, drops, cut):
    columns = ([row[i] for row in drawn] for i in range(3))
    made = UnpairedDataset.from_ids(*columns, pad_id=7, max_length=cut)
    n = len(made)
    if ref == "ref":
        made = made.with_ref_logps(np.arange(n) / 3)
    if ref == "kl":
        whose = np.arange(n)[::-1]
        made = made.with_ref_logps(np.arange(n) / 3, kl=np.arange(n) / 5, kl_completions=whose)
    if drops:
        made.rows = np.arange(n) * 2 + 1
    with tempfile.TemporaryDirectory() as name:
        made.save(name)
        for verify in (True, False):
            loaded = UnpairedDataset.load(name, verify=verify)
            assert same(loaded, made)
            assert isinstance(loaded, UnpairedDataset)


def test_batches_of_what_was_saved_are_the_same(tmp_path):
    made = known()
    made.save(tmp_path)
    options = {"layout": "padded", "examples_per_batch": 20, "shuffle": False}
    for a, b in zip(
        UnpairedDataset.load(tmp_path).with_ref_logps(made.ref_logps).plan(**options),
        made.with_ref_logps(made.ref_logps).plan(**options),
        strict=True,
    ):
        assert np.array_equal(a.input_ids, b.input_ids)
        assert np.array_equal(a.kl.input_ids, b.kl.input_ids)
        assert np.array_equal(a.ref_logps, b.ref_logps)


def test_how_long_completions_are_cut_is_saved(tmp_path, tokenizer):
    options = {"max_length": 40, "truncation": "keep_end"}
    made = UnpairedDataset.from_rows(rows(), tokenizer, **options)
    made.save(tmp_path)
    loaded = UnpairedDataset.load(tmp_path)
    assert (loaded.max_length, loaded.truncation) == (40, "keep_end")
    assert same(loaded, made)


def test_anything_that_reads_arrow_reads_it(tmp_path):
    made = known()
    made.save(tmp_path)
    table = pa.ipc.open_file(str(data_file(tmp_path))).read_all()
    table.validate(full=True)
    assert table.column_names == [
        *("prompt_ids", "completion_ids", "ref_logps", "ref_kl_logps", "kl_completion", "label"),
        *("score", "source"),
    ]
    assert table["completion_ids"].to_pylist() == made.completion_ids.tolist()
    assert table["label"].to_pylist() == made.labels.tolist()
    assert made.to_arrow().equals(table)


def test_an_extra_column_under_a_name_of_ours_is_refused(tmp_path, tokenizer):
    marked = [{**row, "kto_tag": not row["label"]} for row in rows(4)]
    made = UnpairedDataset.from_rows(marked, tokenizer, label_key="kto_tag", columns=["label"])
    for way_out in (made.to_arrow, lambda: made.save(tmp_path / "saved")):
        with pytest.raises(DataError, match="`label`: a column of ours"):
            way_out()


# Kinds


def test_pairs_and_single_completions_are_refused_by_name_where_the_other_is_asked_for(tmp_path):
    small_pairs().save(tmp_path / "pairs")
    examples().save(tmp_path / "single")
    with pytest.raises(DataError, match=r"expected single completions, found pairs\n.*PairDataset"):
        UnpairedDataset.load(tmp_path / "pairs")
    with pytest.raises(DataError, match=r"expected pairs, found single completions\n.*Unpaired"):
        PairDataset.load(tmp_path / "single", verify=False)
    forge(tmp_path / "single", lambda m: m.update(kind="triples"))
    for kind in (PairDataset, UnpairedDataset):
        with pytest.raises(DataError, match="`kind`: unknown 'triples'"):
            kind.load(tmp_path / "single")


def test_one_kind_is_saved_over_the_other(tmp_path):
    small_pairs().save(tmp_path)
    examples().save(tmp_path)
    assert same(UnpairedDataset.load(tmp_path), examples())
    assert len(list(tmp_path.glob("*.arrow"))) == 1


def test_the_first_release_is_read_as_pairs():
    assert "kind" not in json.loads((GOLDEN / "pairs-v1" / "manifest.json").read_text())
    assert len(PairDataset.load(GOLDEN / "pairs-v1")) == 3
    with pytest.raises(DataError, match="expected single completions, found pairs"):
        UnpairedDataset.load(GOLDEN / "pairs-v1")


def test_the_first_saved_completions_are_read():
    """Written once by the first version that saves them, never rewritten."""
    loaded = UnpairedDataset.load(GOLDEN / "unpaired-v1")
    assert loaded.prompt_ids.tolist() == [[1, 2, 3], [4], [7]]
    assert loaded.completion_ids.tolist() == [[4], [5, 6], [8, 9, 10]]
    assert loaded.labels.tolist() == [True, False, True]
    assert loaded.ref_logps.tolist() == [-1.0, -2.5, -3.0]
    assert loaded.ref_kl_logps.tolist() == [-4.0, -5.0, -6.25]
    assert loaded.kl_completions.tolist() == [2, 0, 1]
    assert loaded.rows.tolist() == [0, 2, 3]
    assert (loaded.pad_id, loaded.vocab_size) == (15, 16)
    assert (loaded.max_length, loaded.truncation) == (6, "keep_start")


# Damage


def loads_or_refuses(path, made):
    """True if it was refused; what loads must be right."""
    try:
        loaded = UnpairedDataset.load(path)
    except DataError:
        return True
    assert same(loaded, made)
    return False


@pytest.mark.slow
def test_every_flipped_byte_is_seen(tmp_path):
    made = known(12)
    made.save(tmp_path)
    rng = random.Random(1)
    seen = flips_seen(
        data_file(tmp_path), lambda at: rng.randrange(8), lambda: loads_or_refuses(tmp_path, made)
    )
    assert all(seen)
    assert not loads_or_refuses(tmp_path, made)


@pytest.mark.slow
def test_every_flipped_byte_of_the_manifest_is_seen_or_changes_nothing(tmp_path):
    made = known(5)
    made.save(tmp_path)
    seen = flips_seen(
        tmp_path / "manifest.json", lambda at: at % 7, lambda: loads_or_refuses(tmp_path, made)
    )
    assert sum(seen) > 0.6 * len(seen), "what is left is white space"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["columns"].pop("label"), "expected `label`"),
        (lambda m: m["columns"].pop("completion_ids"), "expected `completion_ids`"),
        (lambda m: m["columns"].pop("kl_completion"), "both `ref_kl_logps` and `kl_completion`"),
        (lambda m: m["columns"]["label"].update(kind="int64"), "`label`"),
        (lambda m: m["columns"]["ref_logps"].update(kind="int64"), "`ref_logps`"),
        (lambda m: m.update(max_length=0), "`max_length`"),
        (lambda m: m.update(max_length="4"), "`max_length`"),
        (lambda m: m.update(truncation="cut"), "`truncation`: unknown 'cut'"),
        (lambda m: m.update(truncation=[]), "`truncation`: unknown"),
        (lambda m: m.update(kind=["pairs"]), "`kind`: unknown"),
        (lambda m: m["report"].update(kept=3), "`report`"),
    ],
)
def test_what_no_manifest_says_is_refused_by_name(tmp_path, change, message):
    known(6).save(tmp_path)
    forge(tmp_path, change)
    with pytest.raises(DataError, match=message):
        UnpairedDataset.load(tmp_path)


def test_a_completion_of_no_example_is_refused(tmp_path):
    made = known(6)
    made.kl_completions = np.array([1, 2, 3, 4, 5, 6])
    made.save(tmp_path)
    with pytest.raises(DataError, match=r"`kl_completion`: expected numbers of examples, below 6"):
        UnpairedDataset.load(tmp_path, verify=False)


# Workers


def test_a_pickle_names_the_file_instead_of_carrying_the_ids(tmp_path):
    made = examples(5000)
    made.save(tmp_path)
    loaded = UnpairedDataset.load(tmp_path)
    text = pickle.dumps(loaded)
    own = sum(values.nbytes for values in (made.rows, made.labels, made.columns["score"]))
    assert len(text) < own + 5000 * 3 + 4000, "no ids in it"
    again = pickle.loads(text)
    assert same(again, loaded)
    assert not again.completion_ids.values.flags.writeable
    changed = UnpairedDataset.load(tmp_path)
    changed.completion_ids = changed.prompt_ids
    assert same(pickle.loads(pickle.dumps(changed)), changed)
    examples(4000, 1).save(tmp_path)
    with pytest.raises(DataError, match="replaced"):
        pickle.loads(text)


def test_what_is_selected_of_a_mapped_one_is_in_memory(tmp_path):
    examples().save(tmp_path)
    loaded = UnpairedDataset.load(tmp_path)
    part = loaded.select([3, 1])
    assert type(part) is UnpairedDataset
    assert same(part, examples().select([3, 1]))
    assert type(loaded[2:5]) is UnpairedDataset


# The cache


def test_a_cache_holds_what_files_give(tmp_path, tokenizer, monkeypatch):
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows())
    options = {"columns": ["id"], "max_length": 60, "on_bad": "skip"}
    at_once = UnpairedDataset.from_files(file, tokenizer, **options)
    first = UnpairedDataset.from_files(file, tokenizer, cache_dir=tmp_path / "cache", **options)
    monkeypatch.setattr("dpo_ext.data.cache.encode_into", None)
    again = UnpairedDataset.from_files(file, tokenizer, cache_dir=tmp_path / "cache", **options)
    for cached in (first, again):
        assert same(cached, at_once)
        assert not cached.prompt_ids.values.flags.writeable
    assert at_once.columns["id"][3] == 1


def test_a_cache_of_many_small_parts_is_that_of_one(tmp_path, tokenizer, monkeypatch):
    import dpo_ext.data.encode as encoding

    bad = [{"prompt": "a", "completion": " b", "label": -1}, {"prompt": 3}]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", [*rows(9), *bad, *rows(7)])
    expected = UnpairedDataset.from_files(file, tokenizer, on_bad="skip")
    parts = encoding.parts
    monkeypatch.setattr("dpo_ext.data.encode.parts", lambda job: parts(job, pairs=3))
    found = UnpairedDataset.from_files(file, tokenizer, on_bad="skip", cache_dir=tmp_path / "c")
    assert same(found, expected)
    assert found.report.dropped == {"wrong_type": 1, "missing_field": 1}
    assert found.rows[-1] == 33


def test_pairs_and_single_completions_of_one_file_have_caches_of_their_own(tmp_path, tokenizer):
    both = [{**row, "completion": row["chosen"], "label": 1} for row in tiny.rows(8)]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", both)
    for _ in range(2):
        pairs = PairDataset.from_files(file, tokenizer, cache_dir=tmp_path / "cache")
        single = UnpairedDataset.from_files(file, tokenizer, cache_dir=tmp_path / "cache")
        assert pairs.chosen_ids == single.completion_ids
        assert single.labels.all()


def test_a_cache_of_no_example_is_refused_with_the_keys_of_completions(tmp_path, tokenizer):
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(3))
    with pytest.raises(DataError, match=r"no row .* gives an example[\s\S]*completion_key"):
        UnpairedDataset.from_files(file, tokenizer, on_bad="skip", cache_dir=tmp_path / "cache")
    pairless = tiny.write_jsonl(tmp_path / "other.jsonl", [{"prompt": "a", "label": 1}])
    with pytest.raises(DataError) as caught:
        UnpairedDataset.from_files(pairless, tokenizer, cache_dir=tmp_path / "cache")
    assert any("from_pairs" in note for note in caught.value.__notes__)
