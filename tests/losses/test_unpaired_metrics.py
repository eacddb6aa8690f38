"""The metrics of `unpaired_loss`: TRL's keys, one class or two, one rank or several."""

import math

import pytest
import torch

from dpo_ext.errors import TensorError
from dpo_ext.torch import ScoreTable, TokenScores, UnpairedLoss, unpaired_loss

LOGPS = torch.tensor([-3.0, -5.0, -8.0, -1.0], dtype=torch.float64)
REF = torch.tensor([-4.0, -4.0, -6.0, -3.0], dtype=torch.float64)
LABELS = torch.tensor([True, False, True, False])


def test_the_keys_and_numbers_are_trls():
    out = unpaired_loss(LOGPS, REF, LABELS, z=0.5, beta=0.2)
    assert isinstance(out, UnpairedLoss)
    found = {name: value.item() for name, value in out.metrics.items()}
    assert found == pytest.approx(
        {
            "kl": 0.5,
            "rewards/chosen": 0.2 * (1 - 2) / 2,
            "logps/chosen": -5.5,
            "rewards/rejected": 0.2 * (-1 + 2) / 2,
            "logps/rejected": -3.0,
            "rewards/margins": -0.2,
        }
    )
    assert not any(value.requires_grad for value in out.metrics.values())


@pytest.mark.parametrize("label", [True, False])
def test_one_class_alone_has_its_own_keys(label):
    out = unpaired_loss(LOGPS, REF, torch.full((4,), label), z=0.0)
    side = "chosen" if label else "rejected"
    assert set(out.metrics) == {"kl", f"rewards/{side}", f"logps/{side}"}
    a = 0.1 * (LOGPS - REF)
    expected = torch.sigmoid(-a if label else a).mean()
    assert out.loss.item() == pytest.approx(expected.item())


def test_no_example_has_no_key():
    out = unpaired_loss(LOGPS[:0], REF[:0], LABELS[:0], z=0.0)
    assert set(out.metrics) == {"kl"}
    assert out.loss.item() == 0.0


def test_a_loss_without_a_kl_term_has_none():
    out = unpaired_loss(LOGPS, REF, LABELS, loss="apo_zero_unpaired")
    assert "kl" not in out.metrics
    assert out.z is None
    bco = unpaired_loss(LOGPS, REF, LABELS, loss="bco", delta=0.1)
    assert "kl" not in bco.metrics


def test_an_infinite_side_leaves_the_other_alone():
    logps = LOGPS.clone()
    logps[0] = -math.inf
    metrics = unpaired_loss(logps, REF, LABELS, z=0.0).metrics
    assert metrics["logps/rejected"].item() == -3.0
    assert metrics["logps/chosen"].item() == -math.inf


def test_buffers_that_are_filled_again_change_nothing():
    logps, labels = LOGPS.clone(), LABELS.clone()
    out = unpaired_loss(logps, REF, labels, z=0.0)
    wanted = {name: value.item() for name, value in out.metrics.items()}
    logps.fill_(0)
    labels.logical_not_()
    assert {name: value.item() for name, value in out.metrics.items()} == wanted


def scores_and_table():
    table = ScoreTable(
        logit_rows=[0, 1, 2, 3, 4, 5],
        targets=[1] * 6,
        seq_offsets=[0, 1, 3, 3, 6],
        group_size=1,
    )
    columns = {"mean_logit": [1.0, 2, 3, 4, 5, 6], "entropy": [0.5, 1, 1, 2, 2, 2]}
    stats = {name: torch.tensor(values) for name, values in columns.items()}
    return TokenScores(torch.zeros(6), **stats), table


def test_tokens_are_counted_by_side():
    scores, table = scores_and_table()
    out = unpaired_loss(LOGPS, REF, LABELS, z=0.0)
    metrics = out.metrics_over(scores=scores, table=table)
    assert metrics["logits/chosen"].item() == 1.0
    assert metrics["logits/rejected"].item() == (2 + 3 + 4 + 5 + 6) / 5
    assert metrics["entropy"].item() == pytest.approx(8.5 / 6)
    assert metrics["rewards/margins"] == out.metrics["rewards/margins"]


def test_scores_need_their_table_and_their_stats():
    scores, table = scores_and_table()
    out = unpaired_loss(LOGPS, REF, LABELS, z=0.0)
    with pytest.raises(ValueError, match="`scores` and `table` must both be given"):
        out.metrics_over(scores=scores)
    with pytest.raises(TensorError, match="`scores` must have `entropy` and `mean_logit`"):
        out.metrics_over(scores=TokenScores(torch.zeros(6)), table=table)
