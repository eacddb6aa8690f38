"""A pair, example or list of weight 0 is not read: neither value nor gradient depends on what it holds."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from dpo_ext import TensorError
from dpo_ext.preference import reward_loss
from dpo_ext.torch import (
    ScoreTable,
    linear_preference_loss,
    linear_sequence_logps,
    list_loss,
    preference_loss,
    register_loss,
    unpaired_loss,
)
from dpo_ext.torch.losses.registry import LOSSES

BAD = [math.nan, math.inf, -math.inf]
W = torch.tensor([0.0, 1.0, 2.0])


def own(logps, ref_logps):
    return -logsigmoid((logps - ref_logps)[:, 0] - (logps - ref_logps)[:, 1])


def logarithmic(logps, ref_logps):
    """A derivative that is infinite at 0, where the first pair may well be."""
    return -(1 - logps.exp()).log().sum(1)


@pytest.fixture
def registered():
    register_loss("weight_zero_own", own)
    yield "weight_zero_own"
    del LOSSES["weight_zero_own"]


def pairs(x, ref, loss):
    return preference_loss(x, ref, loss=loss, weight=W, lengths=torch.full((3, 2), 4)).loss


CALLS = {
    "dpo": lambda x, ref: pairs(x, ref, "dpo"),
    "orpo": lambda x, ref: pairs(x, ref, "orpo"),
    "a list of losses": lambda x, ref: pairs(x, ref, ["dpo", "sft"]),
    "a callable": lambda x, ref: preference_loss(x, ref, loss=own, weight=W).loss,
    "a callable in a list": lambda x, ref: preference_loss(x, ref, loss=[own, "dpo"], weight=W).loss,
    "list_loss": lambda x, ref: list_loss(x, ref, weight=W).loss,
    "kto": lambda x, ref: unpaired_loss(x[:, 0], ref[:, 0], W > 1, z=0.0, weight=W).loss,
    "bco": lambda x, ref: unpaired_loss(x[:, 0], ref[:, 0], W > 1, loss="bco", delta=0.0, weight=W).loss,
    "reward_loss": lambda x, ref: reward_loss(x[:, 0], x[:, 1], weight=W, center=0.1),
}  # fmt: skip


def of(call, first, ref_first=-1.0):
    x = torch.tensor([[first, -1.0], [-1.0, -2.0], [-2.0, -1.5]], requires_grad=True)
    ref = torch.tensor([[ref_first, -1.0], [-1.5, -1.5], [-1.0, -2.0]])
    loss = call(x, ref)
    loss.backward()
    return loss.item(), x.grad


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_has_weight_0_reaches_neither_loss_nor_gradient(call, bad):
    loss, grad = of(call, -1.0)
    for got_loss, got in (of(call, bad), of(call, -1.0, ref_first=bad)):
        assert got_loss == loss
        assert torch.equal(got, grad)
        assert not got[0].any()
        assert got[1].any()


@pytest.mark.parametrize("bad", BAD)
def test_registered_losses_too(registered, bad):
    def call(x, ref):
        return preference_loss(x, ref, loss=registered, weight=W).loss

    assert torch.equal(of(call, bad)[1], of(call, -1.0)[1])


def test_an_infinite_derivative_of_weight_0_is_0():
    def call(x, ref):
        return preference_loss(x, ref, loss=logarithmic, weight=W).loss

    _, grad = of(call, 0.0)
    assert not grad[0].any()
    assert grad.isfinite().all()


def test_a_callable_with_weights_can_still_be_differentiated_twice():
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    ref, weight = torch.zeros(3, 2, dtype=torch.float64), W.double()
    assert torch.autograd.gradgradcheck(
        lambda x: preference_loss(x, ref, loss=own, weight=weight).loss, x
    )


def test_a_loss_of_factor_0_is_not_computed():
    def explodes(logps, ref_logps):
        return logps[:, 0] * math.nan

    x, ref = torch.tensor([[-1.0, -2.0]]), torch.zeros(1, 2)
    out = preference_loss(x, ref, loss=["dpo", explodes], loss_weights=[1.0, 0.0])
    assert out.loss == preference_loss(x, ref).loss


@pytest.mark.parametrize("plan", ["pairwise", "recompute", "frozen"])
def test_hidden_states_of_weight_0_reach_no_weight(plan):
    hidden = torch.randn(6, 4)
    table = ScoreTable(logit_rows=range(6), targets=[1, 2, 3, 4, 0, 1], seq_offsets=[0, 1, 3, 4, 6])
    ref, weight = torch.full((2, 2), -3.0), torch.randn(5, 4)
    grads = []
    for first in (0.5, math.nan):
        x, w = hidden.clone(), weight.clone()
        x[0] = first
        x.requires_grad_()
        if plan != "frozen":
            w.requires_grad_()
        out = linear_preference_loss(
            x, w, table, ref, plan=plan, pair_weight=torch.tensor([0.0, 1.0])
        )
        out.loss.backward()
        assert not x.grad[:3].any()
        grads.append((out.loss.item(), x.grad, w.grad))
    (loss, dx, dw), (other, dx_nan, dw_nan) = grads
    assert loss == other
    assert torch.equal(dx, dx_nan)
    assert dw is None or torch.equal(dw, dw_nan)


def test_token_weights_of_0_reach_no_weight():
    x = torch.randn(2, 4)
    x[0] = math.nan
    w = torch.randn(5, 4, requires_grad=True)
    table = ScoreTable(logit_rows=[0, 1], targets=[1, 2], seq_offsets=[0, 1, 2], weights=[0.0, 1.0])
    linear_sequence_logps(x, w, table).sum().backward()
    assert w.grad.isfinite().all()


def test_orpo_refuses_an_empty_completion():
    x, lengths = torch.tensor([[-1.0, -2.0], [-1.0, 0.0]]), torch.tensor([[2, 3], [2, 0]])
    with pytest.raises(TensorError, match=r"pair 1: loss 'orpo' needs a scored token .* rejected"):
        preference_loss(x, loss="orpo", lengths=lengths)
    out = preference_loss(x, loss="orpo", lengths=lengths, weight=torch.tensor([1.0, 0.0]))
    assert out.loss.isfinite()


def test_metrics_are_those_of_the_step():
    x, ref = torch.tensor([[-5.0, -6.0]]), torch.tensor([[-5.5, -5.5]])
    beta = torch.tensor([0.2])
    out = preference_loss(x, ref, beta=beta)
    at_once = {k: v.clone() for k, v in out.metrics.items()}
    rewards, logps = out.chosen_rewards.clone(), out.logps.clone()
    for buffer in (x, ref, beta):
        buffer.fill_(-50.0)
    assert out.metrics == at_once
    assert torch.equal(out.chosen_rewards, rewards)
    assert torch.equal(out.logps, logps)


def test_metrics_of_a_head_are_those_of_the_step():
    ref = torch.full((1, 2), -2.0)
    table = ScoreTable(logit_rows=[0, 1], targets=[1, 2], seq_offsets=[0, 1, 2])
    w = torch.randn(5, 4, requires_grad=True)
    for plan in ("pairwise", "recompute"):
        out = linear_preference_loss(torch.randn(2, 4), w, table, ref, plan=plan)
        at_once = {k: v.clone() for k, v in out.metrics.items()}
        ref.fill_(-50.0)
        assert out.metrics == at_once
        ref.fill_(-2.0)
