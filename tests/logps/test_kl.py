"""`token_kl`, `linear_token_kl`: against float64 by definition, gradients by gradcheck, TDPO end to end."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from compare import assert_no_worse  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from dpo_ext import TensorError  # noqa: E402
from dpo_ext.torch import (  # noqa: E402
    ScoreTable,
    linear_token_kl,
    preference_loss,
    sequence_logps,
    tdpo_kls,
    token_kl,
)

DIRECTIONS = ("ref_policy", "policy_ref")


def table_of(R, seed=0, ignored=0):
    """A table over rows 0..R-1 in another order, two sequences, some tokens not scored."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 3, R).astype(np.int32)
    targets[:ignored] = -100
    return ScoreTable(
        logit_rows=rng.permutation(R),
        targets=targets,
        seq_offsets=np.array([0, R // 2, R], np.int32),
    )


def by_definition(z, ref_z, table, direction, scale=1.0, softcap=None, temperature=1.0):
    """float64, straight from the definition."""

    def log_softmax(x):
        y = scale * x.double()
        y = softcap * torch.tanh(y / softcap) if softcap else y
        return torch.log_softmax(y / temperature, -1)[table.logit_rows]

    p, q = log_softmax(z), log_softmax(ref_z)
    one, other = (q, p) if direction == "ref_policy" else (p, q)
    kl = (one.exp() * (one - other)).sum(-1)
    return torch.where(table.targets != -100, kl, 0.0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "softcap": 5.0, "logit_scale": 1.5}])
def test_values_and_gradients_are_no_worse_than_torchs(direction, dtype, how):
    torch.manual_seed(0)
    z, ref_z = (3 * torch.randn(12, 257)).to(dtype), (3 * torch.randn(12, 257)).to(dtype)
    table, g = table_of(12, ignored=3), torch.randn(12)
    named = {
        "scale": how.get("logit_scale", 1.0),
        "softcap": how.get("softcap"),
        "temperature": how.get("temperature", 1.0),
    }
    exact = z.double().requires_grad_()
    want = by_definition(exact, ref_z, table, direction, **named)
    (want_grad,) = torch.autograd.grad((want * g).sum(), exact)
    leaf = z.clone().requires_grad_()
    got = token_kl(leaf, ref_z, table, direction=direction, chunk_rows=5, **how)
    (got_grad,) = torch.autograd.grad((got * g).sum(), leaf)
    assert got.dtype == torch.float32
    assert got_grad.dtype == dtype
    assert torch.equal(got[table.targets == -100], torch.zeros(3))
    # The baseline computes the same from float32 copies, and rounds its gradient to the dtype.
    same = z.float().requires_grad_()
    kind = torch.nn.functional.kl_div

    def transformed(x):
        y = named["scale"] * x
        y = named["softcap"] * torch.tanh(y / named["softcap"]) if named["softcap"] else y
        return torch.log_softmax(y / named["temperature"], -1)[table.logit_rows]

    p, q = transformed(same), transformed(ref_z.float())
    left, right = (q, p) if direction == "ref_policy" else (p, q)
    base = kind(right, left, reduction="none", log_target=True).sum(-1)
    base = torch.where(table.targets != -100, base, 0.0)
    (base_grad,) = torch.autograd.grad((base * g).sum(), same)
    assert_no_worse(got, base, want, slack=1e-6)
    assert_no_worse(got_grad, base_grad.to(dtype), want_grad, slack=1e-6)


@given(seed=st.integers(0, 10**6), R=st.integers(1, 6), V=st.integers(1, 9), C=st.integers(1, 7))
def test_chunks_do_not_change_the_bits(seed, R, V, C):
    torch.manual_seed(seed)
    z, ref_z, table = torch.randn(R, V), torch.randn(R, V), table_of(R, seed)
    for direction in DIRECTIONS:
        whole = token_kl(z, ref_z, table, direction=direction)
        assert torch.equal(token_kl(z, ref_z, table, direction=direction, chunk_rows=C), whole)
        assert (whole >= -1e-7).all()
        assert token_kl(z, z + 3.0, table, direction=direction).abs().max() <= 2e-7


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_pass_gradcheck(direction, softcap):
    torch.manual_seed(1)
    table, make = table_of(5, ignored=1), {"dtype": torch.float64}
    z, ref_z = torch.randn(5, 4, **make, requires_grad=True), torch.randn(5, 4, **make)
    options = {"direction": direction, "softcap": softcap, "temperature": 0.8, "chunk_rows": 2}
    assert torch.autograd.gradcheck(lambda x: token_kl(x, ref_z, table, **options), z)
    x, w, b = (torch.randn(*s, **make, requires_grad=True) for s in ((5, 3), (4, 3), (4,)))
    ref = torch.randn(5, 2, **make), torch.randn(4, 2, **make)

    def linear(x, w, b):
        return linear_token_kl(x, w, *ref, table, bias=b, **options)

    assert torch.autograd.gradcheck(linear, (x, w, b))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_linear_form_is_that_of_its_logits(direction, dtype):
    torch.manual_seed(2)
    table, g = table_of(10, ignored=2), torch.randn(10)
    x, w, b = (torch.randn(*s).to(dtype).requires_grad_() for s in ((2, 5, 16), (31, 16), (31,)))
    rx, rw, rb = (torch.randn(*s).to(dtype) for s in ((2, 5, 8), (31, 8), (31,)))
    options = {"direction": direction}
    got = linear_token_kl(x, w, rx, rw, table, bias=b, ref_bias=rb, chunk_rows=3, **options)
    z, ref_z = (torch.nn.functional.linear(*t) for t in ((x, w, b), (rx, rw, rb)))
    want = token_kl(z, ref_z, table, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 0.2)
    if dtype == torch.float32:
        grads = [torch.autograd.grad((v * g).sum(), (x, w, b)) for v in (got, want)]
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_rows_that_are_not_scored_have_no_influence():
    table = ScoreTable(logit_rows=[0, 1], targets=[0, -100], seq_offsets=[0, 1, 2])
    z = torch.tensor([[1.0, 0.0], [torch.nan, torch.inf]], requires_grad=True)
    kl = token_kl(z, torch.zeros(2, 2), table)
    kl.sum().backward()
    assert kl[1] == 0
    assert torch.isfinite(kl[0])
    assert torch.equal(z.grad[1], torch.zeros(2))
    x = torch.tensor([[1.0], [torch.nan]], requires_grad=True)
    linear_token_kl(x, torch.ones(2, 1), x, torch.zeros(2, 1), table).sum().backward()
    assert torch.equal(x.grad[1], torch.zeros(1))


def test_impossible_tokens_follow_the_definition():
    """0 log 0 = 0; a token that only the left side believes in costs infinity."""
    table = ScoreTable(logit_rows=[0], targets=[0], seq_offsets=[0, 1], group_size=1)
    sure, even = torch.tensor([[0.0, -torch.inf]]), torch.zeros(1, 2)
    assert token_kl(even, sure, table).item() == pytest.approx(np.log(2))
    assert token_kl(sure, even, table, direction="policy_ref").item() == pytest.approx(np.log(2))
    assert token_kl(sure, even, table).item() == np.inf
    assert token_kl(sure, sure, table).item() == 0.0


def test_second_derivatives_are_refused():
    z = torch.randn(2, 3, requires_grad=True)
    table = ScoreTable(logit_rows=[0, 1], targets=[0, 1], seq_offsets=[0, 1, 2])
    (grad,) = torch.autograd.grad(token_kl(z, torch.zeros(2, 3), table).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


@pytest.mark.parametrize("loss", ["tdpo1", "tdpo2"])
def test_tdpo_from_logits_is_its_formula(loss):
    torch.manual_seed(3)
    labels = torch.randint(0, 7, (4, 6))
    labels[:, :2] = -100
    table = ScoreTable.from_labels(labels)
    z, ref_z = (
        torch.randn(4, 6, 7, dtype=torch.float64, requires_grad=True),
        torch.randn(4, 6, 7).double(),
    )
    kw, kl = tdpo_kls(token_kl(z, ref_z, table), table)
    logps, ref_logps = sequence_logps(z, table), sequence_logps(ref_z, table)
    extra = {"alpha": 0.5} if loss == "tdpo2" else {}
    kw = kw.detach() if loss == "tdpo2" else kw
    out = preference_loss(logps, ref_logps, loss=loss, beta=0.3, kw=kw, kl=kl, **extra)

    p, q = torch.log_softmax(z, -1)[:, :-1], torch.log_softmax(ref_z, -1)[:, :-1]
    mask = labels[:, 1:] != -100
    spent = ((q.exp() * (q - p)).sum(-1) * mask).sum(-1)
    ratio = ((p - q).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * mask).sum(-1)
    margin, gap = (
        ratio[:2] - ratio[2:],
        spent[2:] - (spent[:2] if loss == "tdpo1" else spent[:2].detach()),
    )
    want = -torch.nn.functional.logsigmoid(0.3 * (margin - extra.get("alpha", 1.0) * gap)).mean()
    torch.testing.assert_close(out.loss, want)
    grads = [torch.autograd.grad(v, z, retain_graph=True)[0] for v in (out.loss, want)]
    torch.testing.assert_close(*grads)


def test_wrong_arguments_are_named():
    table = ScoreTable(logit_rows=[0], targets=[0], seq_offsets=[0, 1], group_size=1)
    z = torch.zeros(1, 3)
    cases = [
        (lambda: token_kl(z, z, table, direction="both"), ValueError, "`direction` must be one of"),
        (
            lambda: token_kl(z, torch.zeros(1, 4), table),
            TensorError,
            r"`ref_logits` must have shape \(1, 3\)",
        ),
        (lambda: token_kl(z.long(), z, table), TensorError, "`logits` must be floating-point"),
        (lambda: token_kl(z, [0.0], table), TypeError, "`ref_logits` must be a torch.Tensor"),
        (lambda: token_kl(z[:0], z[:0], table), TensorError, "`logit_rows` must be below 0"),
        (
            lambda: token_kl(z, z, table, chunk_rows=0),
            ValueError,
            "`chunk_rows` must be at least 1",
        ),
        (
            lambda: linear_token_kl(z, z, z, torch.zeros(2, 3), table),
            TensorError,
            "`ref_weight` must have",
        ),
        (lambda: tdpo_kls(z[0], table), TensorError, "`table` must be of pairs"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()
    empty = ScoreTable(logit_rows=[], targets=[], seq_offsets=[0, 0, 0])
    assert token_kl(z, z, empty).shape == (0,)
