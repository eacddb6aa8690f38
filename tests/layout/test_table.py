"""The score table: what it refuses, how labels become one, what compaction keeps."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import reference
import torch

from dpo_ext import TensorError
from dpo_ext.torch import ScoreTable, linear_preference_loss, sequence_logps

GOOD = {
    "logit_rows": [4, 1, 7, 0],
    "targets": [3, 0, -100, 9],
    "seq_offsets": [0, 2, 2, 3, 4],
    "weights": [1.0, 0.5, 2.0, 0.0],
}


def tensors(**changes):
    dtypes = {"logit_rows": torch.int64, "targets": torch.int32, "seq_offsets": torch.int32}
    fields = {**GOOD, **changes}
    return {
        name: value
        if value is None or isinstance(value, torch.Tensor | np.ndarray | int)
        else torch.tensor(value, dtype=dtypes.get(name, torch.float32))
        for name, value in fields.items()
    }


def fields(table):
    names = ("logit_rows", "targets", "seq_offsets")
    return {name: getattr(table, name).tolist() for name in names}


def test_a_table_keeps_what_it_is_given():
    table = ScoreTable(**tensors())
    assert fields(table) == {name: GOOD[name] for name in fields(table)}
    assert (table.n_sequences, table.n_groups, table.n_tokens, table.group_size) == (4, 2, 4, 2)
    assert table.weights.tolist() == GOOD["weights"]
    assert table.host_offsets.tolist() == GOOD["seq_offsets"]
    assert table.lengths.tolist() == [[2, 0], [0, 1]]
    assert table.lengths.dtype == torch.int64


def test_numpy_arrays_are_taken_without_a_copy():
    rows = np.array([4, 1, 7, 0], dtype=np.int64)
    table = ScoreTable(**tensors(logit_rows=rows))
    rows[0] = 5
    assert table.logit_rows[0] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"logit_rows": torch.tensor([4, 1, 7, 0], dtype=torch.int32)},
            "`logit_rows` must be int64",
        ),
        ({"targets": torch.tensor([3, 0, -100, 9])}, "`targets` must be int32, found int64"),
        ({"targets": np.array([3, 0, -100, 9])}, "`targets` must be int32, found int64"),
        ({"seq_offsets": torch.tensor([0, 2, 2, 3, 4])}, "`seq_offsets` must be int32"),
        ({"weights": torch.ones(4, dtype=torch.float16)}, "`weights` must be float32"),
        ({"weights": torch.ones(4, dtype=torch.bool)}, "`weights` must be float32"),
        ({"targets": torch.zeros(2, 2, dtype=torch.int32)}, r"`targets` must have shape \(M,\)"),
        ({"logit_rows": [1, 2]}, r"`logit_rows` must have shape \(4,\)"),
        ({"weights": [1.0]}, r"`weights` must have shape \(4,\)"),
        ({"seq_offsets": torch.zeros((), dtype=torch.int32)}, r"`seq_offsets` must have shape"),
        ({"seq_offsets": torch.zeros(0, dtype=torch.int32)}, r"`seq_offsets` must have shape"),
        ({"seq_offsets": [1, 2, 2, 3, 4]}, "must go from 0 to 4"),
        ({"seq_offsets": [0, 2, 2, 3, 3]}, "must go from 0 to 4"),
        ({"seq_offsets": [0, 3, 2, 3, 4]}, "must not fall, found 3 then 2 at sequence 1"),
        ({"seq_offsets": [0, 2, 2, 4]}, "`group_size` must divide"),
        ({"targets": [3, -1, -100, 9]}, "found -1 at token 1"),
        ({"logit_rows": [4, -1, 7, 0]}, "found -1 at token 1"),
        ({"logit_rows": [4, 1, 7, 4]}, "found row 4 scored by tokens 0 and 3"),
        (
            {"weights": [1.0, float("nan"), 1.0, 1.0]},
            "`weights` must be finite, found nan at token 1",
        ),
        ({"logit_rows": torch.zeros(4, dtype=torch.int64, device="meta")}, "must be on cpu"),
    ],
)
def test_a_wrong_table_is_refused_by_name(changes, message):
    with pytest.raises(TensorError, match=message):
        ScoreTable(**tensors(**changes))


def test_wrong_kinds_of_arguments_are_refused():
    with pytest.raises(TypeError, match="`targets`"):
        ScoreTable(**tensors(targets=7))
    with pytest.raises(TypeError, match="`targets`"):
        ScoreTable(logit_rows=[0], targets=["a"], seq_offsets=[0, 1, 1])
    with pytest.raises(TypeError, match="`group_size`"):
        ScoreTable(**tensors(), group_size=2.0)
    with pytest.raises(ValueError, match="`group_size`"):
        ScoreTable(**tensors(), group_size=0)
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        ScoreTable.from_labels([[1, 2], [3, 4]])


def test_rows_of_tokens_that_are_not_scored_do_not_matter():
    table = ScoreTable(**tensors(logit_rows=[4, 1, -9, 0]))
    assert table.n_tokens == 4
    assert ScoreTable(**tensors(logit_rows=[4, 1, 4, 0])).n_tokens == 4


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_every_small_label_matrix_is_shifted_by_one_and_interleaved(dtype):
    """All labels of two rows up to T = 4 over a vocabulary of 3, every mask: 65536 pairs at once."""
    for T in range(5):
        both = list(itertools.product([-100, 0, 1, 2], repeat=2 * T))
        pairs = torch.tensor(both, dtype=dtype).reshape(len(both), 2, T)
        labels = pairs.transpose(0, 1).reshape(2 * len(both), T)  # chosen rows first
        expected = reference.table_from_labels(labels.tolist())
        table = ScoreTable.from_labels(labels)
        assert table.n_tokens == 2 * len(both) * max(T - 1, 0)
        scored = (table.targets != -100).numpy()
        assert (table.logit_rows.numpy()[scored] == expected["logit_rows"]).all()
        assert (table.targets.numpy()[scored] == expected["targets"]).all()
        assert (table.lengths.flatten().numpy() == np.diff(expected["seq_offsets"])).all()
        small = table.compact()
        for name, value in expected.items():
            assert (getattr(small, name).numpy() == value).all()
            assert getattr(small, name).numpy().dtype == value.dtype


def test_pairs_of_labels_interleave():
    labels = torch.arange(12).reshape(6, 2)  # three pairs, chosen rows 0..2
    table = ScoreTable.from_labels(labels)
    assert table.logit_rows.tolist() == [0, 6, 2, 8, 4, 10]
    assert table.targets.tolist() == [1, 7, 3, 9, 5, 11]
    assert table.seq_offsets.tolist() == list(range(7))


def test_no_pair_makes_an_empty_table():
    for table in (
        ScoreTable.from_labels(torch.zeros(0, 5, dtype=torch.int64)),
        ScoreTable(logit_rows=[], targets=[], seq_offsets=[0]),
    ):
        assert (table.n_groups, table.n_tokens, tuple(table.lengths.shape)) == (0, 0, (0, 2))
        assert table.compact().n_tokens == 0


@pytest.mark.parametrize("bad", [-1, -101, 2**31, 2**31 + 3, 2**63 - 1, -(2**63)])
def test_labels_that_are_no_token_are_refused_on_the_host(bad):
    with pytest.raises(TensorError, match=str(bad)):
        ScoreTable.from_labels(torch.tensor([[0, bad], [0, 1]]))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.int64), "even number of rows"),
        (torch.zeros(2, 4), "int64 or int32"),
        (torch.zeros(4, dtype=torch.int64), r"shape \(2N, T\)"),
    ],
)
def test_wrong_labels_are_refused(labels, message):
    with pytest.raises(TensorError, match=message):
        ScoreTable.from_labels(labels)


def test_labels_of_which_none_is_scored_warn():
    """A chat mask that hides the whole conversation; the first column is no target of any row."""
    labels = torch.full((4, 3), -100)
    labels[:, 0] = 7
    with pytest.warns(UserWarning, match="no token is scored: every label .* is -100"):
        table = ScoreTable.from_labels(labels)
    assert table.lengths.tolist() == [[0, 0], [0, 0]]
    labels[3, 2] = 5
    for quiet in (labels, labels[:, :1], labels[:0]):  # a warning would be an error here
        ScoreTable.from_labels(quiet)


def test_from_labels_never_looks_at_values_on_a_device():
    table = ScoreTable.from_labels(torch.zeros(4, 3, dtype=torch.int64, device="meta"))
    assert table.device.type == "meta"
    assert table.host_offsets.tolist() == [0, 2, 4, 6, 8]


def test_compact_drops_what_is_not_scored_and_keeps_weights():
    table = ScoreTable(**tensors()).compact()
    assert fields(table) == {
        "logit_rows": [4, 1, 0],
        "targets": [3, 0, 9],
        "seq_offsets": [0, 2, 2, 2, 3],
    }
    assert table.weights.tolist() == [1.0, 0.5, 0.0]
    assert table.host_offsets.tolist() == [0, 2, 2, 2, 3]
    assert table.targets.dtype == torch.int32
    assert table.seq_offsets.dtype == torch.int32
    assert fields(table.compact()) == fields(table)


def test_a_table_moves_and_pickles():
    table = ScoreTable(**tensors())
    assert table.to("cpu") is table
    moved = table.to("meta", non_blocking=True)
    assert moved.device.type == "meta"
    assert moved.host_offsets.tolist() == GOOD["seq_offsets"]
    again = pickle.loads(pickle.dumps(table))
    assert fields(again) == fields(table)
    assert again.weights.tolist() == table.weights.tolist()
    assert again.group_size == 2


def test_groups_of_three():
    table = ScoreTable(logit_rows=[0, 1], targets=[1, 2], seq_offsets=[0, 1, 1, 2], group_size=3)
    assert table.lengths.tolist() == [[1, 0, 1]]


def test_a_large_table_prints_one_line():
    assert repr(ScoreTable.from_labels(torch.zeros(2, 100, dtype=torch.int64))).count("\n") == 0
    assert "sequence 1 (group 0): empty" in repr(ScoreTable(**tensors()))


@pytest.mark.gpu
def test_a_table_on_a_gpu():
    labels = torch.tensor([[-100, 5, 6], [-100, 7, -100]])
    torch.cuda.set_sync_debug_mode("error")
    try:
        table = ScoreTable.from_labels(labels.pin_memory().to("cuda", non_blocking=True))
        _ = table.lengths
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert fields(table.compact().to("cpu")) == fields(ScoreTable.from_labels(labels).compact())
    pinned = ScoreTable.from_labels(labels).pin_memory()
    assert pinned.targets.is_pinned()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group_size": 3}, TensorError, "that 3 divides, found 4"),
        ({"group_size": 0}, ValueError, "`group_size` must be at least 1"),
        ({"group_size": True}, TypeError, "`group_size` must be an int, found bool"),
        ({"shift": 1}, TypeError, "`shift` must be a bool, found int"),
        ({"weights": [[1.0]]}, TypeError, r"`weights` must be a torch.Tensor, found list"),
        ({"weights": torch.ones(4, 2)}, TensorError, r"shape \(4, 3\), as .*, found \(4, 2\)"),
        ({"weights": torch.ones(4, 3).long()}, TensorError, r"found int64 .*\nhint: .*bool\(\)"),
        (
            {"weights": torch.ones(4, 3, device="meta")},
            TensorError,
            "must be on cpu, .* found meta",
        ),
    ],
)
def test_wrong_options_of_labels_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        ScoreTable.from_labels(torch.ones(4, 3, dtype=torch.int64), **options)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_a_weight_that_is_not_finite_is_named_by_its_place_unless_its_label_is_ignored(
    group_size, shift
):
    labels, weights = torch.ones(4, 3, dtype=torch.int64), torch.ones(4, 3)
    weights[2, 1] = torch.inf
    with pytest.raises(TensorError, match="finite, found inf at row 2, column 1"):
        ScoreTable.from_labels(labels, weights=weights, group_size=group_size, shift=shift)
    labels[2, 1] = -100
    table = ScoreTable.from_labels(labels, weights=weights, group_size=group_size, shift=shift)
    assert table.weights.isfinite().all()


def test_an_odd_number_of_rows_is_told_of_single_completions():
    with pytest.raises(TensorError, match=r"even number of rows.*\nhint: .*group_size=1"):
        ScoreTable.from_labels(torch.zeros(3, 4, dtype=torch.int64))
    assert ScoreTable.from_labels(torch.zeros(3, 4, dtype=torch.int64), group_size=1).n_groups == 3


def test_labels_without_shift_warn_of_every_column():
    labels = torch.full((2, 3), -100)
    with pytest.warns(UserWarning, match="every label is -100"):
        ScoreTable.from_labels(labels, shift=False)
    labels[0, 0] = 5
    ScoreTable.from_labels(labels, shift=False)  # a warning would be an error here


def test_the_labels_and_weights_may_be_written_over_later():
    labels, weights = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)
    table = ScoreTable.from_labels(labels, weights=weights, shift=False)
    labels.fill_(-5), weights.fill_(torch.nan)
    assert set(table.targets.tolist()) == {1}
    assert set(table.weights.tolist()) == {1.0}


def scored(table):
    return sequence_logps(torch.zeros(8, 11), table)


def test_a_table_of_an_earlier_version_still_unpickles():
    table = ScoreTable(**tensors())
    state = {name: getattr(table, name) for name in (*GOOD, "host_offsets", "group_size")}
    old = ScoreTable.__new__(ScoreTable)
    old.__setstate__((None, state))
    assert old.shape is None
    assert scored(old).tolist() == scored(table).tolist()
    assert copy.deepcopy(table).weights.tolist() == GOOD["weights"]


CHANGES = {
    "a target": (lambda t: t.targets.__setitem__(0, -7), "found -7 at token 0"),
    "a row": (lambda t: t.logit_rows.__setitem__(0, -7), "found -7 at token 0"),
    "a row twice": (lambda t: t.logit_rows.__setitem__(0, 1), "found row 1 scored by tokens 0 and"),
    "a weight": (lambda t: t.weights.__setitem__(0, torch.nan), "`weights` must be finite"),
    "the offsets": (lambda t: t.seq_offsets.__setitem__(1, 9), "`seq_offsets` must not fall"),
    "other targets": (lambda t: setattr(t, "targets", t.targets[:2]), r"must have shape \(2,\)"),
    "other dtypes": (lambda t: setattr(t, "targets", t.targets.long()), "`targets` must be int32"),
    "another device": (lambda t: setattr(t, "weights", t.weights.to("meta")), "must be on cpu"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_table_that_was_changed_is_compared_again(what):
    change, message = CHANGES[what]
    table = ScoreTable(**tensors())
    scored(table)
    change(table)
    for _ in range(2):  # a table that failed does not pass the second time
        with pytest.raises(TensorError, match=message):
            scored(table)


@pytest.mark.parametrize("what", ["other targets", "another device", "other dtypes"])
def test_a_table_that_failed_never_passes_for_the_one_before(what):
    """A new tensor may stand at the address of one that is gone."""
    change, message = CHANGES[what]
    for _ in range(300):
        table = ScoreTable(**tensors())
        scored(table)
        change(table)
        for _ in range(3):
            with pytest.raises(TensorError, match=message):
                scored(table)


def test_a_change_that_leaves_a_table_is_taken():
    table = ScoreTable(**tensors())
    scored(table)
    table.seq_offsets[1:3] = torch.tensor([1, 1], dtype=torch.int32)
    table.weights[3] = 2.0
    again = ScoreTable(**tensors(seq_offsets=[0, 1, 1, 3, 4], weights=[1.0, 0.5, 2.0, 2.0]))
    assert torch.equal(scored(table), scored(again))
    assert table.host_offsets.tolist() == again.host_offsets.tolist()
    made = ScoreTable.from_labels(torch.ones(2, 4, dtype=torch.int64))  # the host has a copy
    made.seq_offsets[1] = 1
    sequence_logps(torch.zeros(2, 4, 5), made)
    assert made.host_offsets.tolist() == [0, 1, 6]


def test_the_tensor_that_a_table_was_made_of_is_the_tables():
    parts = tensors()
    table = ScoreTable(**parts)
    parts["targets"][0] = -7
    with pytest.raises(TensorError, match="found -7"):
        scored(table)


def test_tensors_that_count_no_writes_still_make_a_table():
    with torch.inference_mode():
        table = ScoreTable.from_labels(torch.ones(2, 3, dtype=torch.int64))
        parts = tensors()
    assert sequence_logps(torch.zeros(2, 3, 5), table).shape == (1, 2)
    assert scored(ScoreTable(**parts)).shape == (2, 2)


@pytest.mark.gpu
def test_changed_offsets_on_a_gpu_are_found_where_the_host_needs_them():
    table = ScoreTable.from_labels(torch.ones(2, 3, dtype=torch.int64)).to("cuda")
    hidden, weight = torch.zeros(2, 3, 4, device="cuda"), torch.zeros(5, 4, device="cuda")
    table.seq_offsets[1] = 1
    assert sequence_logps(torch.zeros(2, 3, 5, device="cuda"), table).isfinite().all()
    ref = torch.zeros(1, 2, device="cuda")
    with pytest.raises(TensorError, match="`seq_offsets` was changed after"):
        linear_preference_loss(hidden, weight.requires_grad_(), table, ref)
