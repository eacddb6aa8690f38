"""LD-DPO and WPO end to end: from logits to the loss, against the golden log-probs."""

import numpy as np
import places
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_ext import TensorError
from dpo_ext.testing import logits, score_tables
from dpo_ext.torch import ScoreTable, preference_loss, sequence_logps, token_scores
from dpo_ext.torch.losses.tokens import ld_table, wpo_averages

GOLDEN = np.load(places.GOLDEN / "golden_logps.npz")


def golden():
    labels = torch.tensor(GOLDEN["pad_labels"].astype(np.int64))
    values = torch.tensor(GOLDEN["pad_logits"])
    return values.reshape(-1, values.shape[-1]), ScoreTable.from_labels(labels)


@pytest.mark.parametrize("compact", [False, True])
def test_wpo_from_logits_is_the_golden_one(compact):
    values, table = golden()
    table = table.compact() if compact else table
    scores = token_scores(values, table, stats=("log_sum_sq",))
    aw, al = wpo_averages(scores, table)
    want = GOLDEN["seq_wpo_logweight"]
    np.testing.assert_allclose(aw, want[:4], atol=4e-6)
    np.testing.assert_allclose(al, want[4:], atol=4e-6)
    logps = sequence_logps(values, table)
    ref = torch.tensor(GOLDEN["seq_ref_logp"].reshape(2, 4).T, dtype=torch.float32)
    out = preference_loss(logps, ref, loss="wpo", aw=aw, al=al)
    margin = 0.1 * (
        (GOLDEN["seq_logp"] - GOLDEN["seq_ref_logp"])[:4]
        - (GOLDEN["seq_logp"] - GOLDEN["seq_ref_logp"])[4:]
    )
    loss = np.minimum(1, np.exp(want[:4] + want[4:])) * np.log1p(np.exp(-margin))
    np.testing.assert_allclose(out.per_pair, loss, atol=1e-5)


def test_ld_dpo_from_logits_weights_the_tail_alike_on_both_models():
    values, table = golden()
    alpha = 0.3
    weighted = ld_table(table, alpha)
    got = sequence_logps(values, weighted)
    tokens = GOLDEN["pad_tok_logp"]
    counts = GOLDEN["seq_count"]
    for pair in range(4):
        head = min(counts[pair], counts[pair + 4])
        for side, row in enumerate((pair, pair + 4)):
            scored = tokens[row][tokens[row] != 0]
            assert len(scored) == counts[row]
            want = scored[:head].sum() + alpha * scored[head:].sum()
            assert abs(got[pair, side].item() - want) <= 4e-6 * len(scored)
    assert torch.equal(weighted.lengths, table.lengths)
    one = sequence_logps(values, ld_table(table, 1.0))
    torch.testing.assert_close(one, sequence_logps(values, table))
    # the row of the table, given head and tail apart, is the same loss
    heads = sequence_logps(values, ld_table(table, 0.0))
    tails = sequence_logps(values, table) - heads
    zero = torch.zeros_like(heads)
    row = preference_loss(
        heads, zero, loss="ld_dpo", ld_alpha=alpha,
        tail_w=tails[:, 0], tail_l=tails[:, 1], ref_tail_w=0.0, ref_tail_l=0.0,
    )  # fmt: skip
    torch.testing.assert_close(row.per_pair, preference_loss(got, zero).per_pair)


@given(
    logits(min_rows=2).flatmap(lambda z: score_tables(*z.shape)), st.sampled_from([0.0, 0.25, 1.0])
)
def test_ld_weights_are_those_of_a_loop(table, alpha):
    got = ld_table(table, alpha).weights.tolist()
    offsets, lengths = table.seq_offsets.tolist(), table.lengths.reshape(-1).tolist()
    for s in range(table.n_sequences):
        head, place = min(lengths[s], lengths[s ^ 1]), 0
        for t in range(offsets[s], offsets[s + 1]):
            before = 1.0 if table.weights is None else table.weights[t].item()
            if table.targets[t] != -100:
                assert got[t] == before * (1.0 if place < head else alpha)
                place += 1


def test_bad_input_is_a_typed_error():
    values, table = golden()
    with pytest.raises(ValueError, match=r"`ld_alpha` must be in \[0, 1\], found 1.5"):
        ld_table(table, 1.5)
    with pytest.raises(ValueError, match="`scores` must have `log_sum_sq`"):
        wpo_averages(token_scores(values, table), table)
    lists = ScoreTable(logit_rows=[0], targets=[1], seq_offsets=[0, 1, 1, 1], group_size=3)
    with pytest.raises(TensorError, match="must be of pairs, found groups of 3"):
        ld_table(lists, 0.5)
