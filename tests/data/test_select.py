"""Parts of a data set are data sets: select, slices, filter, split, concat, to_arrow."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ext import PairDataset

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def rows(pairs):
    """Everything that is known of each pair, as plain values."""
    reference = [None] * len(pairs) if pairs.ref_logps is None else pairs.ref_logps.tolist()
    return [
        (*(pair[name].tolist() for name in IDS), ref, row, *(pair[name] for name in pairs.columns))
        for pair, ref, row in zip(pairs, reference, pairs.rows.tolist(), strict=True)
    ]


def made(prompts, *, reference=True, columns=True):
    n = len(prompts)
    chosen = [[100 + i] * (i % 4) for i in range(n)]
    rejected = [[200 + i, i] for i in range(n)]
    pairs = PairDataset.from_ids(prompts, chosen, rejected, pad_id=7, vocab_size=500)
    if reference:
        pairs = pairs.with_ref_logps(np.arange(2.0 * n).reshape(n, 2))
    if columns:
        pairs.columns = {
            "weight": np.arange(n) / 2,
            "source": np.array([f"s{i % 3}" for i in range(n)], object),
            "hard": np.arange(n) % 2 == 0,
        }
    return pairs


lists = st.lists(st.lists(st.integers(0, 99), max_size=3), min_size=0, max_size=8)


@given(lists, st.data())
def test_select_is_the_list_of_rows(prompts, data):
    pairs = made(prompts)
    n = len(pairs)
    index = data.draw(st.lists(st.integers(-n, n - 1), max_size=6) if n else st.just([]))
    expected = [rows(pairs)[i] for i in index]
    part = pairs.select(index)
    assert rows(part) == expected
    assert type(part) is PairDataset
    assert (part.pad_id, part.vocab_size) == (7, 500)
    assert (part.report.read, part.report.kept) == (len(index), len(index))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool)
    assert rows(pairs.select(mask)) == [
        row for row, keep in zip(rows(pairs), mask, strict=True) if keep
    ]


@given(lists, st.slices(8))
def test_a_slice_is_the_slice_of_rows(prompts, part):
    pairs = made(prompts)
    assert rows(pairs[part]) == rows(pairs)[part]
    assert isinstance(pairs[part], PairDataset)


def test_a_slice_of_step_one_shares_the_ids():
    pairs = made([[1], [2, 3], [4]])
    assert np.shares_memory(pairs[1:].prompt_ids.values, pairs.prompt_ids.values)


@pytest.mark.parametrize(
    ("indices", "error", "text"),
    [
        ([3], IndexError, "pair 3 is out of range for 3 pairs"),
        ([-4], IndexError, "pair -4"),
        ([0.5], TypeError, "whole numbers"),
        (["a"], TypeError, "whole numbers"),
        ([[0, 1]], TypeError, "one dimension"),
        (np.array([True]), IndexError, r"a mask must have the shape \(3,\)"),
    ],
)
def test_bad_indices_are_named(indices, error, text):
    with pytest.raises(error, match=text):
        made([[1], [2], [3]]).select(indices)


@given(lists, st.floats(0, 1), st.integers(0, 3))
def test_no_prompt_is_on_both_sides_of_a_split(prompts, fraction, seed):
    pairs = made(prompts)
    rest, held_out = pairs.split(fraction, seed=seed)
    assert sorted(map(str, rows(rest) + rows(held_out))) == sorted(map(str, rows(pairs)))
    one, other = (
        {tuple(ids) for ids in part.prompt_ids.tolist() if ids} for part in (rest, held_out)
    )
    assert not one & other
    again = pairs.split(fraction, seed=seed)
    assert [rows(part) for part in again] == [rows(rest), rows(held_out)]
    largest = max((prompts.count(prompt) if prompt else 1 for prompt in prompts), default=0)
    assert abs(len(held_out) - fraction * len(pairs)) <= largest / 2 + 1e-9


def test_a_split_without_prompts_takes_the_share_exactly_and_another_seed_takes_others():
    pairs = made([[1]] * 40)
    rest, held_out = pairs.split(0.25, by_prompt=False)
    assert (len(rest), len(held_out)) == (30, 10)
    assert rows(held_out) != rows(pairs.split(0.25, seed=1, by_prompt=False)[1])
    with pytest.raises(ValueError, match=r"`fraction` must be in \[0, 1\], found 1.5"):
        pairs.split(1.5)


@given(lists, lists, lists)
def test_concat_of_parts_is_the_whole(a, b, c):
    parts = [made(a), made(b), made(c)]
    whole = parts[0].concat(*parts[1:])
    starts = np.cumsum([0, *(len(part) for part in parts)])
    expected = []
    for part, start in zip(parts, starts, strict=False):
        expected += [(*row[:4], row[4] + start, *row[5:]) for row in rows(part)]
    assert rows(whole) == expected
    assert whole.report.read == whole.report.kept == len(a) + len(b) + len(c)


def test_concat_refuses_what_is_not_alike():
    pairs = made([[1], [2]])
    other_tokenizer = PairDataset.from_ids([[1]], [[2]], [[3]], pad_id=7)
    cases = [
        (other_tokenizer, "`vocab_size` differs, 500 and None"),
        (made([[1]], columns=False), "expected the columns"),
        (made([[1]], reference=False), "some pairs have reference log-probs and some have none"),
    ]
    for other, text in cases:
        with pytest.raises(ValueError, match=text):
            pairs.concat(other)
    other = made([[1]])
    other.columns["hard"] = np.array(["yes"], object)
    with pytest.raises(ValueError, match="column `hard` must be of one kind"):
        pairs.concat(other)


def test_filter_keeps_the_pairs_for_which_it_is_true():
    pairs = made([[1], [2], [3], [4]])
    assert rows(pairs.filter(lambda pair: pair["hard"])) == rows(pairs)[::2]


def test_parts_plan_save_load_and_pickle_as_data_sets_do(tmp_path):
    import pickle

    made([[1], [2, 3], [4], []]).save(tmp_path / "whole")
    pairs = PairDataset.load(tmp_path / "whole")
    part = pairs.select([2, 0])
    part.save(tmp_path / "part")
    assert (
        rows(PairDataset.load(tmp_path / "part"))
        == rows(part)
        == rows(pickle.loads(pickle.dumps(part)))
    )
    batch = part.plan(layout="padded", pairs_per_batch=2, shuffle=False)[0]
    assert batch.input_ids[:, 0].tolist() == [4, 1, 4, 1]
    assert batch.ref_logps.tolist() == [[4, 5], [0, 1]]


def test_to_arrow_has_the_columns_of_a_saved_data_set():
    table = made([[1], [2, 3]]).to_arrow()
    assert table.to_pylist() == [
        {
            "prompt_ids": [1], "chosen_ids": [], "rejected_ids": [200, 0], "weight": 0.0,
            "ref_chosen_logps": 0.0, "ref_rejected_logps": 1.0, "source": "s0", "hard": True,
        },
        {
            "prompt_ids": [2, 3], "chosen_ids": [101], "rejected_ids": [201, 1], "weight": 0.5,
            "ref_chosen_logps": 2.0, "ref_rejected_logps": 3.0, "source": "s1", "hard": False,
        },
    ]  # fmt: skip
