"""Gradients made in the forward pass know their size: float16 loses no more than autograd's own float16 does."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from dpo_ext.torch import ScoreTable, linear_preference_loss
from dpo_ext.torch.logps.products import room

H, L = 32, 6
SLACK = 2.0  # times torch's own error, measured beside it


def problem(V, N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    M = 2 * N * L
    hidden = torch.randn(M, H, generator=generator).half()
    weight = (torch.randn(V, H, generator=generator) / math.sqrt(H)).half()
    targets = torch.randint(0, V, (M,), generator=generator, dtype=torch.int32)
    offsets = torch.arange(0, M + 1, L, dtype=torch.int32)
    return (
        hidden,
        weight,
        ScoreTable(logit_rows=torch.arange(M), targets=targets, seq_offsets=offsets),
    )


def plain(x, w, table, ref, dtype, beta, count, factor):
    z = (x @ w.T).to(dtype)
    scores = torch.log_softmax(z, -1)[torch.arange(len(x)), table.targets.long()]
    logps = scores.view(-1, L).sum(1).view(-1, 2)
    c, r = (logps - (logps.detach() if ref is None else ref.to(dtype))).unbind(1)
    return logps, -(factor.to(dtype) * logsigmoid(beta * (c - r))).sum() / count


def compared(V=2048, N=2, scale=2.0**14, beta=0.1, count=None, margin=0.0, factor=None, **head):
    """Relative errors ``(ours, torch's)`` of dX and dW against float64, at one loss scale."""
    hidden, weight, table = problem(V, N)
    count = N if count is None else count
    factor = torch.ones(N) if factor is None else torch.tensor(factor)
    margins = torch.as_tensor(margin, dtype=torch.float64).expand(N)

    def leaves(dtype):
        return [t.to(dtype).clone().requires_grad_() for t in (hidden, weight)]

    leaf = leaves(torch.float64)
    ref = plain(*leaf, table, None, torch.float64, beta, count, factor)[0].detach()
    ref[:, 0] -= margins / beta
    case = (beta, count, factor)
    truth = torch.autograd.grad(plain(*leaf, table, ref, torch.float64, *case)[1], leaf)
    leaf = leaves(torch.float16)
    theirs = torch.autograd.grad(scale * plain(*leaf, table, ref, torch.float32, *case)[1], leaf)
    leaf = leaves(torch.float16)
    out = linear_preference_loss(
        *leaf, table, ref.float(), beta=beta, num_pairs=float(count), pair_weight=factor, **head
    )
    assert out.plan == "pairwise"
    ours = torch.autograd.grad(scale * out.loss, leaf)
    return [
        tuple(float((g.double() / scale - t).norm() / t.norm()) for g in (a, b))
        for a, b, t in zip(ours, theirs, truth, strict=True)
    ]


CASES = {
    "step 0": {},
    "1024 pairs in the step": {"count": 1024},
    "65536 pairs in the step": {"count": 65536},
    "margin 8": {"margin": 8.0},
    "margin -8": {"margin": -8.0},
    "a decided pair before an open one": {"margin": [12.0, 0.0], "chunk_rows": 2 * L},
    "an open pair before a decided one": {"margin": [0.0, 12.0], "chunk_rows": 2 * L},
    "a pair longer than a chunk": {"chunk_rows": 5, "count": 512},
    "small weights": {"factor": [1e-4, 3e-4]},
    "large weights": {"factor": [2e3, 1e3], "scale": 2.0**6},
    "beta 0.001": {"beta": 0.001},
    "beta 2": {"beta": 2.0},
    "a loss scale of 1": {"scale": 1.0, "beta": 2.0},
    "a loss scale of 2^20": {"scale": 2.0**20, "count": 4096},
    "V = 1025": {"V": 1025, "count": 256},
    "V = 32000": {"V": 32000, "count": 256},
    "one chunk a pair": {"chunk_pairs": 1, "count": 256},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_float16_is_as_exact_as_torch_with_the_same_loss_scale(case):
    for ours, theirs in compared(**case):
        assert ours <= SLACK * theirs


def test_a_chunk_of_weight_0_hides_nothing_of_the_next():
    for ours, theirs in compared(factor=[0.0, 1.0], chunk_pairs=1, count=1024):
        assert ours <= SLACK * theirs


def test_frozen_weights_keep_small_probabilities():
    """E of a row is made of p as small as 1/V: below 2^-14 float16 holds fewer digits."""
    hidden, weight, table = problem(32000, 2)
    ref = torch.zeros(2, 2)
    truth = hidden.double().requires_grad_()
    plain(truth, weight.double(), table, ref, torch.float64, 0.1, 2, torch.ones(2))[1].backward()
    x = hidden.clone().requires_grad_()
    out = linear_preference_loss(x, weight, table, ref)
    assert out.plan == "frozen"
    (out.loss * 2.0**12).backward()
    error = (x.grad.double() / 2.0**12 - truth.grad).norm() / truth.grad.norm()
    y = hidden.clone().requires_grad_()
    loss = plain(y, weight, table, ref, torch.float32, 0.1, 2, torch.ones(2))[1]
    (loss * 2.0**12).backward()
    assert error <= SLACK * (y.grad.double() / 2.0**12 - truth.grad).norm() / truth.grad.norm()


def test_room_takes_the_largest_to_the_top_of_float16():
    sizes = torch.tensor([1e-24, 1e-10, 0.1, 1.0, 65503.0, 65504.0, 65505.0, 1e30])
    for slope in (0.01, 1.0, 30.0):
        top = sizes * slope * room(sizes, slope)
        assert (top <= 65504).all()
        assert (top > 32750).all()
    assert room(torch.tensor(0.0), 1.0) == 2.0**105


def test_a_nan_pair_leaves_the_scale_of_the_others():
    hidden, weight, table = problem(257, 2)
    ref = torch.tensor([[0.0, 0.0], [-1.0, -2.0]])
    x = hidden.clone().requires_grad_()
    x.data[0] = math.nan
    w = weight.clone().requires_grad_()
    factor = torch.tensor([0.0, 1.0])
    out = linear_preference_loss(x, w, table, ref, pair_weight=factor, num_pairs=512)
    assert out.loss.isfinite()
    out.loss.mul(2.0**14).backward()
    assert w.grad.isfinite().all()
    assert not x.grad[: 2 * L].any()
    assert x.grad[2 * L :].abs().sum(1).all()


@pytest.mark.parametrize("plan", ["pairwise", "recompute", "frozen"])
def test_a_term_beside_the_loss_gets_its_gradient(plan):
    hidden, weight, table = (t.double() if hasattr(t, "double") else t for t in problem(50, 3))
    ref = torch.full((3, 2), -20.0, dtype=torch.float64)
    beside = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2)
    grads = []
    for two_steps in (False, True):
        x, w = hidden.clone().requires_grad_(), weight.clone()
        leaves = [x] if plan == "frozen" else [x, w.requires_grad_()]
        how = {"plan": "recompute" if two_steps and plan != "frozen" else plan}
        out = linear_preference_loss(x, w, table, ref, chunk_rows=2 * L, **how)
        assert not out.logps.requires_grad
        total = 2.0 * out.loss + (beside * out.differentiable_logps).sum()
        grads.append(torch.autograd.grad(total, leaves, retain_graph=True))
        alone = torch.autograd.grad((beside * out.differentiable_logps).sum(), leaves)
        assert all(g.abs().sum() > 0 for g in alone)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
