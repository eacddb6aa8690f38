"""A table knows its tensor: logits and hidden states of another shape, and ids of no column, are refused."""

import pickle

import numpy as np
import pytest
import torch
from logps_cases import DTYPES, device_of

from dpo_ext import PairDataset, TensorError
from dpo_ext.torch import (
    ScoreTable,
    linear_preference_loss,
    linear_sequence_logps,
    linear_token_kl,
    linear_token_scores,
    sequence_logps,
    token_kl,
    token_scores,
)
from dpo_ext.torch.parallel import (
    context_parallel_sequence_logps,
    context_parallel_table,
    vocab_parallel_sequence_logps,
)

ROWS, T, H, V = 4, 6, 3, 7
DEVICES = ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)]


def labels_of(rows=ROWS, columns=T, seed=0):
    labels = torch.randint(0, V, (rows, columns), generator=torch.Generator().manual_seed(seed))
    labels[:, 0] = -100
    return labels


def truth(logits, labels, *, shift=True, weights=None):
    """(rows,) float64 by the definition."""
    z = logits.double()
    w = torch.ones(labels.shape).double() if weights is None else weights.double()
    if shift:
        z, labels, w = z[:, :-1], labels[:, 1:], w[:, 1:]
    picked = torch.log_softmax(z, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where((labels >= 0) & (w != 0), picked * w, 0.0).sum(1)


def pairs_of(values):
    return values.reshape(2, -1).T


# What each function is given as its large tensor: name, last size, call.
CALLS = {
    "sequence_logps": ("logits", V, sequence_logps),
    "token_scores": ("logits", V, lambda x, t: token_scores(x, t).logps),
    "linear_sequence_logps": (
        "hidden",
        H,
        lambda x, t: linear_sequence_logps(x, x.new_ones(V, H), t),
    ),
    "linear_token_scores": (
        "hidden",
        H,
        lambda x, t: linear_token_scores(x, x.new_ones(V, H), t).logps,
    ),
    "pairwise": (
        "hidden",
        H,
        lambda x, t: (
            linear_preference_loss(x, x.new_ones(V, H).requires_grad_(), t, x.new_zeros(2, 2)).loss
        ),
    ),
    "linear_preference_loss": (
        "hidden",
        H,
        lambda x, t: linear_preference_loss(x, x.new_ones(V, H), t, x.new_zeros(2, 2)).loss,
    ),
    "token_kl": ("logits", V, lambda x, t: token_kl(x, x, t)),
    "linear_token_kl": (
        "hidden",
        H,
        lambda x, t: linear_token_kl(x, x.new_ones(V, H), x, x.new_ones(V, H), t),
    ),
    "vocab_parallel": (
        "logits",
        V,
        lambda x, t: vocab_parallel_sequence_logps(x, t, vocab_start=0),
    ),
    "context_parallel": ("logits", V, context_parallel_sequence_logps),
}
ANOTHER = {
    "columns before the text": ((ROWS, T + 2), r"4, 8, \d\): 2 columns more\nhint: virtual tokens"),
    "one column fewer": ((ROWS, T - 1), r"1 columns fewer\nhint: .*logits_to_keep"),
    "more rows": ((ROWS + 2, T), r"\(6, 6, \d\)\nhint: build the table from the labels"),
    "fewer rows": ((ROWS - 2, T), r"found \(2, 6, \d\)"),
    "rows and columns exchanged": ((T, ROWS), r"found \(6, 4, \d\)"),
    "flat, more": (
        (ROWS * (T + 2),),
        r"found \(32, \d\): 2 columns more\nhint: .*\.reshape\(4, 8, -1\)",
    ),
    "flat, fewer": ((ROWS * T - 1,), r"4 x 6 rows as the table has, found \(23, \d\)"),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("wrong", ANOTHER)
@pytest.mark.parametrize("name", CALLS)
def test_every_function_refuses_every_other_shape(name, wrong, device):
    """Before any process group is asked for, and on a GPU without waiting for it."""
    called, last, call = CALLS[name]
    shape, said = ANOTHER[wrong]
    table = ScoreTable.from_labels(labels_of().to(device))
    x = torch.zeros(*shape, last, device=device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(TensorError, match=rf"(?s)`{called}` must have shape .*{said}"):
            call(x, table)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("made", ["labels", "compact", "pickled", "copied", "reweighted"])
def test_the_shape_itself_and_its_rows_flattened_are_right(made, dtype):
    labels = labels_of()
    table = {
        "labels": lambda t: t,
        "compact": ScoreTable.compact,
        "pickled": lambda t: pickle.loads(pickle.dumps(t)),
        "copied": lambda t: t.to("cpu"),
        "reweighted": lambda t: t.with_weights(torch.ones(t.n_tokens)),
    }[made](ScoreTable.from_labels(labels))
    assert table.shape == (ROWS, T)
    logits = torch.randn(ROWS, T, V).to(dtype)
    want = pairs_of(truth(logits, labels))
    for given in (logits, logits.flatten(0, 1), logits.mT.contiguous().mT):
        torch.testing.assert_close(sequence_logps(given, table).double(), want, rtol=0, atol=1e-5)
    with pytest.raises(TensorError, match="1 columns fewer"):
        sequence_logps(logits[:, 1:], table)


def test_moving_a_table_keeps_its_shape():
    table = ScoreTable.from_labels(labels_of())
    assert table.to("meta").shape == (ROWS, T)
    assert table.without_zero_weights().shape == (ROWS, T)
    assert (
        table.with_rows(table.logit_rows, table.targets).shape is None
    )  # rows of what, only the caller knows


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("options", [{"pairs_per_batch": 3}, {"tokens_per_batch": 64}])
def test_batches_of_every_layout_know_their_rows(layout, options):
    rng = np.random.default_rng(0)
    ids = [[rng.integers(1, V, rng.integers(1, 6)).tolist() for _ in range(9)] for _ in range(3)]
    pairs = PairDataset.from_ids(*ids, pad_id=0, vocab_size=V)
    if layout != "padded" and "tokens_per_batch" in options:
        options = {**options, "bin_length": 32}
    for batch in pairs.plan(layout=layout, **options):
        for held in (batch, batch.to("cpu"), pickle.loads(pickle.dumps(batch))):
            assert held.table.shape == tuple(batch.input_ids.shape)
        shape = tuple(batch.input_ids.shape)
        assert sequence_logps(torch.zeros(*shape, V), batch.table).shape == (batch.n_pairs, 2)
        for wrong in ((shape[0], shape[1] + 1), (shape[0] + 1, shape[1])):
            with pytest.raises(TensorError, match="as the table's labels or batch have"):
                sequence_logps(torch.zeros(*wrong, V), batch.table)


def test_a_table_by_hand_takes_whatever_has_its_rows_or_the_shape_that_it_is_given():
    parts = {"logit_rows": [0, 5], "targets": [1, 2], "seq_offsets": [0, 1, 2]}
    free = ScoreTable(**parts)
    assert free.shape is None
    for shape in ((6,), (2, 3), (3, 2), (1, 9)):
        assert sequence_logps(torch.zeros(*shape, V), free).shape == (1, 2)
    tied = ScoreTable(**parts, shape=(2, 3))
    assert sequence_logps(torch.zeros(2, 3, V), tied).shape == (1, 2)
    with pytest.raises(TensorError, match=r"\(2, 3, V\), as the table's .*, found \(3, 2, 7\)"):
        sequence_logps(torch.zeros(3, 2, V), tied)
    rows = ScoreTable(**parts, shape=(6,))
    for shape in ((6,), (2, 3), (3, 2)):
        assert sequence_logps(torch.zeros(*shape, V), rows).shape == (1, 2)
    with pytest.raises(
        TensorError, match=r"must have 6 rows, as the table has, found 9 in \(1, 9, 7\)"
    ):
        sequence_logps(torch.zeros(1, 9, V), rows)
    with pytest.raises(
        TensorError, match=r"below 5, the rows of `shape` \(5,\), found 5 at token 1"
    ):
        ScoreTable(**parts, shape=(5,))
    for bad, error in (
        ((2, 3, 4), ValueError),
        ((), ValueError),
        ((-1, 2), ValueError),
        ("ab", TypeError),
        ((2.0, 3), TypeError),
        ((True, 3), TypeError),
    ):
        with pytest.raises(error, match="`shape` must be"):
            ScoreTable(**parts, shape=bad)


def test_a_part_of_the_context_knows_how_many_rows_it_has():
    labels = labels_of()
    table = ScoreTable.from_labels(labels)
    logits = torch.randn(ROWS, T, V)
    rows = torch.arange(ROWS * T).reshape(ROWS, T)
    parts = [(rows[:, :2], logits[:, :2]), (rows[:, 2:], logits[:, 2:])]
    total = 0
    for mine, local in parts:
        part = context_parallel_table(table, mine.reshape(-1))
        total = total + sequence_logps(local, part) + 0 * sequence_logps(local.flatten(0, 1), part)
        with pytest.raises(TensorError, match=r"must have \d+ rows, as the table has"):
            sequence_logps(logits, part)
    torch.testing.assert_close(total.double(), pairs_of(truth(logits, labels)), rtol=0, atol=1e-5)


def test_the_reference_of_a_divergence_is_held_to_the_table_too():
    table = ScoreTable.from_labels(labels_of())
    x, w = torch.zeros(ROWS, T, H), torch.zeros(V, H)
    with pytest.raises(TensorError, match=r"`ref_hidden` must have shape .* 1 columns more"):
        linear_token_kl(x, w, torch.zeros(ROWS, T + 1, H), w, table)
    with pytest.raises(TensorError, match="`ref_logits` must have shape"):
        token_kl(x, torch.zeros(T, ROWS, H), table)


def test_rows_without_a_column_are_no_exception():
    table = ScoreTable.from_labels(torch.zeros(2, 0, dtype=torch.int64))
    assert sequence_logps(torch.zeros(2, 0, V), table).tolist() == [[0.0, 0.0]]
    with pytest.raises(TensorError, match="3 columns more"):
        sequence_logps(torch.zeros(2, 3, V), table)
    empty = ScoreTable.from_labels(torch.zeros(0, 5, dtype=torch.int64))
    assert sequence_logps(torch.zeros(0, 5, V), empty).shape == (0, 2)
    with pytest.raises(TensorError, match=r"found \(3, 7\)"):
        sequence_logps(torch.zeros(3, V), empty)


READS = [name for name in CALLS if "kl" not in name and "parallel" not in name]


@pytest.mark.parametrize("name", READS)
def test_an_id_beyond_the_vocabulary_is_named_with_its_row(name):
    called, last, call = CALLS[name]
    labels = labels_of().clamp(max=V - 1)
    labels[3, 4] = V  # predicted by row 3, column 3
    said = f"below 7, the vocabulary of `{called}`, found 7 at token .*, row 21 .row 3, column 3.\nhint"
    with pytest.raises(TensorError, match=f"(?s){said}"):
        call(torch.zeros(ROWS, T, last), ScoreTable.from_labels(labels))
    labels[3, 4] = V - 1
    assert call(torch.zeros(ROWS, T, last), ScoreTable.from_labels(labels)).isfinite().all()


@pytest.mark.parametrize("name", ["sequence_logps", "linear_sequence_logps", "pairwise"])
def test_an_id_of_weight_zero_may_be_of_any_vocabulary(name):
    _, last, call = CALLS[name]
    labels, weights = labels_of(), torch.ones(ROWS, T)
    labels[3, 4], weights[3, 4] = V + 5, 0.0
    table = ScoreTable.from_labels(labels, weights=weights)
    assert call(torch.zeros(ROWS, T, last), table).isfinite().all()


def test_a_divergence_reads_no_target():
    table = ScoreTable(logit_rows=[0], targets=[99], seq_offsets=[0, 1], group_size=1)
    assert token_kl(torch.zeros(1, V), torch.zeros(1, V), table).tolist() == [0.0]


@pytest.mark.parametrize("impl", ["torch", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_single_completions_are_scored_row_by_row(rows, impl):
    labels = labels_of(rows, seed=rows)
    logits = torch.randn(rows, T, V)
    table = ScoreTable.from_labels(labels, group_size=1)
    where = device_of(impl)
    got = sequence_logps(logits.to(where), table.to(where), impl=impl).cpu()
    assert got.shape == (rows, 1)
    torch.testing.assert_close(got[:, 0].double(), truth(logits, labels), rtol=0, atol=1e-5)


def test_groups_of_three_take_a_row_of_each_third():
    labels, logits = labels_of(6), torch.randn(6, T, V)
    got = sequence_logps(logits, ScoreTable.from_labels(labels, group_size=3))
    want = truth(logits, labels).reshape(3, 2).T
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("group_size", [1, 2])
def test_labels_of_an_encoder_decoder_stand_where_they_are_predicted(group_size):
    labels, logits = labels_of(), torch.randn(ROWS, T, V)
    labels[:, 0] = torch.arange(ROWS)  # the first column is a target
    table = ScoreTable.from_labels(labels, shift=False, group_size=group_size)
    assert table.shape == (ROWS, T)
    want = truth(logits, labels, shift=False).reshape(group_size, -1).T
    torch.testing.assert_close(sequence_logps(logits, table).double(), want, rtol=0, atol=1e-5)


def test_logits_that_are_shifted_already_fit_labels_that_are():
    labels, logits = labels_of(), torch.randn(ROWS, T, V)
    table = ScoreTable.from_labels(labels[:, 1:], shift=False)
    want = sequence_logps(logits, ScoreTable.from_labels(labels))
    assert torch.equal(sequence_logps(logits[:, :-1], table), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("shift", [True, False])
def test_weights_beside_labels_are_factors_of_their_log_probs(shift, dtype):
    labels, logits = labels_of(), torch.randn(ROWS, T, V)
    weights = torch.randint(-1, 3, (ROWS, T), generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[2, 3] = torch.nan  # predicts column 4 (3 unless shifted), of weight 0
    weights[2, 4 if shift else 3] = 0
    table = ScoreTable.from_labels(labels, weights=weights, shift=shift)
    assert table.weights.dtype == torch.float32
    want = pairs_of(truth(logits, labels, shift=shift, weights=weights))
    assert want.isfinite().all()
    for given in (table, table.compact()):
        leaf = logits.clone().requires_grad_()
        got = sequence_logps(leaf, given)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
        got.sum().backward()
        assert not leaf.grad[2, 3].any()
