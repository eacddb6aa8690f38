"""One number is one number: Python's, NumPy's, a tensor's without dimensions; a bool is none."""

import numpy as np
import pytest
import torch

from dpo_ext.preference import bt_fit, implied_reward, reward_loss
from dpo_ext.torch import (
    ScoreTable,
    ld_table,
    linear_preference_loss,
    list_loss,
    preference_loss,
    sequence_logps,
    unpaired_loss,
)

FORMS = {
    "float": float,
    "float32": np.float32,
    "float64": np.float64,
    "array": np.array,
    "tensor": torch.tensor,
    "float64 tensor": lambda x: torch.tensor(x, dtype=torch.float64),
}
BOOLS = [True, np.True_, np.array(True), torch.tensor(True)]
X, REF = torch.tensor([[-1.0, -2.0], [-3.0, -2.5]]), torch.tensor([[-1.5, -1.5], [-2.0, -2.0]])
LENGTHS = torch.tensor([[2, 3], [4, 3]])
TABLE = ScoreTable(logit_rows=[0, 1, 2, 3], targets=[1, 2, 0, 1], seq_offsets=[0, 1, 2, 3, 4])
LOGITS, HEAD = torch.randn(4, 3), torch.randn(3, 5)
HIDDEN = torch.randn(4, 5)

CALLS = {
    "beta": lambda v: preference_loss(X, REF, beta=v).loss,
    "beta of a coupled loss": lambda v: preference_loss(X, REF, loss="aot_paired", beta=v).loss,
    "margin": lambda v: preference_loss(X, REF, margin=v).loss,
    "gamma": lambda v: preference_loss(X, loss="simpo", gamma=v, lengths=LENGTHS).loss,
    "weight": lambda v: preference_loss(X, REF, weight=v).loss,
    "num_pairs": lambda v: preference_loss(X, REF, num_pairs=v).loss,
    "loss_weights": lambda v: preference_loss(X, REF, loss=["dpo"], loss_weights=[v]).loss,
    "rpo_alpha": lambda v: (
        preference_loss(
            X, REF, loss="sigmoid", compat="trl-0.28", rpo_alpha=v, lengths=LENGTHS
        ).loss
    ),
    "z": lambda v: unpaired_loss(X[:, 0], REF[:, 0], torch.tensor([0, 1]), z=v).loss,
    "num_examples": lambda v: (
        unpaired_loss(X[:, 0], REF[:, 0], torch.tensor([0, 1]), z=0.0, num_examples=v).loss
    ),
    "num_lists": lambda v: list_loss(X, REF, num_lists=v).loss,
    "temperature": lambda v: sequence_logps(LOGITS, TABLE, temperature=v),
    "softcap": lambda v: sequence_logps(LOGITS, TABLE, softcap=v),
    "logit_scale": lambda v: sequence_logps(LOGITS, TABLE, logit_scale=v),
    "head": lambda v: (
        linear_preference_loss(HIDDEN, HEAD, TABLE, REF, beta=v, num_pairs=v, pair_weight=v).loss
    ),
    "ld_alpha": lambda v: ld_table(TABLE, v).weights,
    "center": lambda v: reward_loss(X[:, 0], X[:, 1], center=v),
    "reward margin": lambda v: reward_loss(X[:, 0], X[:, 1], margin=v),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_form_of_a_number_is_that_number(call):
    want = call(0.5)
    for make in FORMS.values():
        torch.testing.assert_close(call(make(0.5)), want, rtol=0, atol=0)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_bool_is_no_number(call):
    for value in BOOLS:
        with pytest.raises(TypeError, match="must be"):
            call(value)


def test_a_bool_among_the_numbers_of_pairs_is_none():
    for value in ([True, False], np.array([True, False]), torch.tensor([True, False])):
        with pytest.raises(TypeError, match="`beta` must be"):
            preference_loss(X, REF, beta=value)
    with pytest.raises(TypeError, match="found bool"):
        implied_reward(X, REF, True)


@pytest.mark.parametrize("make", [int, np.int32, np.int64, np.array, torch.tensor])
def test_whole_numbers_in_every_form(make):
    w = HEAD.clone().requires_grad_()
    want = linear_preference_loss(HIDDEN, w, TABLE, REF).loss
    for name in ("chunk_rows", "chunk_pairs"):
        got = linear_preference_loss(HIDDEN, w, TABLE, REF, **{name: make(1)}).loss
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["chunk_rows", "chunk_pairs"])
def test_sizes_of_chunks_are_whole_and_positive(name):
    w = HEAD.clone().requires_grad_()
    for value, error in ((True, TypeError), (1.5, TypeError), ("2", TypeError), (0, ValueError)):
        with pytest.raises(error, match=f"`{name}` must be"):
            linear_preference_loss(HIDDEN, w, TABLE, REF, **{name: value})


def test_a_symmetric_matrix_of_wins_is_warned_of():
    with pytest.warns(UserWarning, match="`wins` is symmetric: .* all strengths are equal"):
        fit = bt_fit([[0, 3, 2], [3, 0, 1], [2, 1, 0]])
    np.testing.assert_allclose(fit.strengths, 1.0)
    np.testing.assert_allclose(bt_fit([[0, 2], [2, 0]]).strengths, 1.0)  # a score of 2 to 2
