"""Every loss from hidden states: the plan that `auto` picks, and the numbers of the two steps it stands for."""

import pytest
import torch
from loss_cases import BUILT_IN, COUPLED, batch_of, parameters_of

from dpo_ext.torch import (
    ScoreTable,
    ld_table,
    linear_preference_loss,
    linear_sequence_logps,
    linear_token_kl,
    linear_token_scores,
    pairwise,
    preference_loss,
    sequence_logps,
    tdpo_kls,
    token_kl,
    token_scores,
    wpo_averages,
)

PAIRS, H, V = 3, 5, 11


def world(dtype=torch.float64):
    """Hidden states, head and table of three pairs of 1 to 5 scored tokens."""
    generator = torch.Generator().manual_seed(4)
    lengths = [4, 2, 1, 5, 3, 3]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(offsets[-1])
    table = ScoreTable(
        logit_rows=torch.randperm(tokens, generator=generator),
        targets=torch.randint(0, V, (tokens,), generator=generator).int(),
        seq_offsets=offsets.int(),
    )
    hidden = torch.randn(tokens, H, generator=generator, dtype=dtype)
    weight = torch.randn(V, H, generator=generator, dtype=dtype)
    return hidden, weight, table


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves, retain_graph=True)


@pytest.mark.parametrize("name", BUILT_IN)
def test_auto_takes_the_pairwise_plan_for_losses_of_one_pair(name, monkeypatch):
    calls = []
    apply = pairwise._PairwiseHead.apply
    monkeypatch.setattr(
        pairwise._PairwiseHead, "apply", lambda *args: calls.append(1) or apply(*args)
    )
    hidden, weight, table = world()
    ref = batch_of(PAIRS, torch.float64)[1] / 8
    params = parameters_of(name)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    out = linear_preference_loss(*leaves, table, ref, loss=name, chunk_rows=6, **params)
    assert len(calls) == (name not in COUPLED)
    logps = linear_sequence_logps(*leaves, table, plan="recompute")
    want = preference_loss(logps, ref, loss=name, lengths=table.lengths, **params)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.per_pair, want.per_pair.detach(), rtol=1e-10, atol=1e-10)
    got = gradients(out.loss, *leaves)
    torch.testing.assert_close(got, gradients(want.loss, *leaves), rtol=1e-8, atol=1e-10)
    # a head without a gradient needs no third product, whatever the loss
    calls.clear()
    frozen = linear_preference_loss(hidden, weight.detach(), table, ref, loss=name, **params)
    assert not calls
    torch.testing.assert_close(gradients(frozen.loss, hidden)[0], got[0], rtol=1e-8, atol=1e-10)


def both_roads(hidden, weight, table):
    """Log-probs and token statistics from logits, and from hidden states without them."""
    logits = hidden @ weight.T
    return (
        (sequence_logps(logits, table), token_scores(logits, table, stats=("log_sum_sq",))),
        (
            linear_sequence_logps(hidden, weight, table),
            linear_token_scores(hidden, weight, table, stats=("log_sum_sq",)),
        ),
    )


def dense(hidden, weight, table):
    """The definition: a log-softmax, the tokens of each sequence in a list."""
    logp = torch.log_softmax(hidden @ weight.T, -1)[table.logit_rows]
    picked = logp.gather(1, table.targets.long()[:, None])[:, 0]
    sizes = (table.seq_offsets[1:] - table.seq_offsets[:-1]).tolist()
    return logp.split(sizes), picked.split(sizes)


def test_wpo_from_logits_and_from_hidden_states():
    hidden, weight, table = world()
    ref = batch_of(PAIRS, torch.float64)[1] / 8
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    rows, picked = dense(*leaves, table)
    average = torch.stack(
        [(t - (2 * z).exp().sum(1).log()).mean() for t, z in zip(picked, rows, strict=True)]
    ).detach()
    aw, al = average.reshape(PAIRS, 2).unbind(1)
    sums = torch.stack([t.sum() for t in picked]).reshape(PAIRS, 2)
    m = 0.1 * ((sums - ref)[:, 0] - (sums - ref)[:, 1])
    want = ((aw + al).exp().clamp(max=1) * torch.nn.functional.softplus(-m)).mean()
    for logps, scores in both_roads(*leaves, table):
        got_aw, got_al = wpo_averages(scores, table)
        out = preference_loss(logps, ref, loss="wpo", aw=got_aw, al=got_al)
        torch.testing.assert_close(out.loss, want, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(
            gradients(out.loss, *leaves), gradients(want, *leaves), rtol=1e-5, atol=1e-7
        )
    fused = linear_preference_loss(*leaves, table, ref, loss="wpo", aw=aw, al=al)
    torch.testing.assert_close(fused.loss, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_tdpo_from_logits_and_from_hidden_states(name):
    hidden, weight, table = world()
    ref_weight = weight + 0.3 * torch.randn(
        V, H, generator=torch.Generator().manual_seed(9), dtype=weight.dtype
    )
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    rows, picked = dense(*leaves, table)
    ref_rows, ref_picked = dense(hidden.detach(), ref_weight, table)
    kls = torch.stack(
        [(q.exp() * (q - p)).sum() for p, q in zip(rows, ref_rows, strict=True)]
    ).reshape(PAIRS, 2)
    sums, ref = (torch.stack([t.sum() for t in x]).reshape(PAIRS, 2) for x in (picked, ref_picked))
    kw, kl = kls.unbind(1)
    d = (sums - ref)[:, 0] - (sums - ref)[:, 1]
    gap = kl - kw if name == "tdpo1" else 0.5 * (kl - kw.detach())
    want = torch.nn.functional.softplus(-0.1 * (d - gap)).mean()
    with torch.no_grad():
        ref_logits = hidden @ ref_weight.T
    roads = (
        token_kl(hidden @ weight.T, ref_logits, table),
        linear_token_kl(hidden, weight, hidden.detach(), ref_weight, table),
    )
    for tokens in roads:
        kw, kl = tdpo_kls(tokens, table)
        kw = kw.detach() if name == "tdpo2" else kw
        logps = linear_sequence_logps(*leaves, table)
        out = preference_loss(logps, ref, loss=name, kw=kw, kl=kl)
        torch.testing.assert_close(out.loss, want, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(
            gradients(out.loss, *leaves), gradients(want, *leaves), rtol=1e-5, atol=1e-7
        )


def test_ld_dpo_and_token_weights_from_logits_and_from_hidden_states():
    hidden, weight, table = world()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    _, picked = dense(*leaves, table)
    alpha, sums = 0.3, []
    for i, tokens in enumerate(picked):
        head = min(len(tokens), len(picked[i ^ 1]))
        sums.append(tokens[:head].sum() + alpha * tokens[head:].sum())
    ref = batch_of(PAIRS, torch.float64)[1] / 8
    want = preference_loss(torch.stack(sums).reshape(PAIRS, 2), ref).loss
    weighted = ld_table(table, alpha)
    losses = [preference_loss(logps, ref).loss for logps, _ in both_roads(*leaves, weighted)]
    losses.append(linear_preference_loss(*leaves, weighted, ref, chunk_rows=6).loss)
    for loss in losses:
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(
            gradients(loss, *leaves), gradients(want, *leaves), rtol=1e-5, atol=1e-7
        )
