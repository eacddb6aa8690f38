"""The head inside: every plan, chunk and option gives what float64 gives, and keeps no more than it says."""

import math

import numpy as np
import pytest
import reference
import torch
from compare import assert_no_worse
from linear_cases import CHUNKS, EXAMPLES, PLANS, oracle, random_head, run
from logps_cases import DTYPES, HOWS, IMPLS, LABELS, device_of, fields, name_of

from dpo_ext import TensorError
from dpo_ext.torch import (
    ScoreTable,
    linear_sequence_logps,
    linear_token_scores,
    sequence_logps,
    token_scores,
)


def ordinary(hidden, weight, table, bias=None, **how):
    """What users have today: logits of every row, then log_softmax in the dtype of the model."""
    z = torch.nn.functional.linear(hidden, weight, bias) * how.get("logit_scale", 1.0)
    if how.get("softcap"):
        z = how["softcap"] * torch.tanh(z / how["softcap"])
    log_p = torch.log_softmax(z / how.get("temperature", 1.0), -1)
    scored = table.targets != -100
    tokens = log_p[table.logit_rows[scored], table.targets[scored].long()]
    sequence = torch.repeat_interleave(
        torch.arange(table.n_sequences), table.seq_offsets.diff().long()
    )[scored]
    sums = torch.zeros(table.n_sequences, dtype=tokens.dtype).index_add(0, sequence, tokens)
    return sums.reshape(-1, table.group_size)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("how", HOWS, ids=name_of)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_float64_is_the_oracle(plan, how, with_bias, chunk_rows):
    for seed in range(4):
        hidden, weight, bias, table = random_head(seed, weights=seed % 2 == 0)
        bias = bias if with_bias else None
        g = torch.randn(table.n_groups, 2, dtype=torch.float64)
        value, dx, dw, db = run(hidden, weight, bias, table, g, plan, chunk_rows=chunk_rows, **how)
        truth = oracle(hidden, weight, bias, table, g, **how)
        np.testing.assert_allclose(value, truth[0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(dx, truth[1], rtol=1e-12, atol=1e-12)
        if plan == "frozen":
            assert dw is None
        else:
            np.testing.assert_allclose(dw, truth[2], rtol=1e-12, atol=1e-12)
            assert (db is None) is not with_bias
            if with_bias:
                np.testing.assert_allclose(db, truth[3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", PLANS)
def test_gradcheck_in_float64(plan):
    hidden, weight, bias, table = random_head(2, weights=True)
    inputs = [hidden.requires_grad_()]
    if plan == "recompute":
        inputs += [weight.requires_grad_(), bias.requires_grad_()]

    def score(x, w=weight, b=bias):
        return linear_sequence_logps(x, w, table, bias=b, plan=plan, chunk_rows=3, softcap=5.0)

    assert torch.autograd.gradcheck(score, inputs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_no_worse_than_the_ordinary_head(impl, plan, dtype, spread):
    """Slack: one rounding of what is given back; in float32 also of logits, by products that differ.

    A product of another shape rounds its logits differently, and an error of d in a logit moves dz
    by at most 2 d |g|.
    """
    for seed in range(EXAMPLES):
        hidden, weight, _, table = random_head(
            seed, H=8, V=33, dtype=dtype, spread=spread, longest=4
        )
        g = torch.randn(table.n_groups, 2, generator=torch.Generator().manual_seed(seed))
        ours = run(
            hidden, weight, None, table, g, plan, impl, chunk_rows=CHUNKS[seed % len(CHUNKS)]
        )
        base = run(hidden, weight, None, table, g, "recompute", score=ordinary)
        truth = oracle(hidden, weight, None, table, g)
        assert ours[0].dtype == torch.float32
        unit = {torch.float32: 2**-21, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        largest_logit = (
            float((hidden.double() @ weight.double().T).abs().max()) if len(hidden) else 0.0
        )
        moved = 0.0
        if dtype == torch.float32 and g.numel():
            moved = 2 * 2**-21 * largest_logit * float(g.abs().max() * weight.abs().max())
        for name, got, baseline, true in zip(
            ("value", "dX", "dW"), ours, base, truth, strict=False
        ):
            if got is None:
                continue
            assert got.dtype == (torch.float32 if name == "value" else dtype)
            slack = moved + unit * max(1.0, float(np.abs(true).max(initial=0.0)))
            assert_no_worse(got, baseline, true, slack)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_hidden_rows_that_are_not_scored_have_no_influence(impl, plan, poison):
    for static in (False, True):
        hidden = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(0))
        weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
        table = ScoreTable.from_labels(LABELS)
        table = table if static else table.compact()
        others = torch.ones(16, dtype=torch.bool)
        others[table.logit_rows[table.targets != -100]] = False
        poisoned = hidden.clone()
        poisoned.view(16, 6)[others] = poison
        g = torch.tensor([[1.0, -0.5], [0.25, 2.0]])
        one = run(hidden, weight, None, table, g, plan, impl, chunk_rows=3)
        other = run(poisoned, weight, None, table, g, plan, impl, chunk_rows=3)
        for a, b in zip(one, other, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        assert one[1].shape == hidden.shape
        assert not other[1].view(16, 6)[others].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_nan_row_stays_in_its_sequence(impl, plan):
    hidden = torch.randn(16, 6)
    hidden[0] = math.nan
    table = ScoreTable.from_labels(LABELS)
    value, dx, *_ = run(hidden, torch.randn(5, 6), None, table, torch.ones(2, 2), plan, impl)
    assert value.isnan().tolist() == [[True, False], [False, False]]
    assert dx[0].isnan().all()
    assert dx[1:].isfinite().all()
    weighted = ScoreTable(
        logit_rows=[0, 1], targets=[1, 2], seq_offsets=[0, 2, 2], weights=[0.0, 1.0]
    )
    value, dx, *_ = run(hidden, torch.randn(5, 6), None, weighted, torch.ones(1, 2), plan, impl)
    assert value.isfinite().all()
    assert dx.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_target_outside_the_vocabulary_is_refused_on_the_host_and_nan_on_a_gpu(impl, plan):
    table = ScoreTable(logit_rows=[0, 1, 2], targets=[0, 5, 4], seq_offsets=[0, 1, 3])
    given = torch.randn(4, 6), torch.randn(5, 6), None, table, torch.ones(1, 2), plan, impl
    if impl != "cuda":
        with pytest.raises(TensorError, match="below 5, the vocabulary of `hidden`, found 5 at to"):
            run(*given)
        return
    value, dx, *_ = run(*given)
    assert value.isnan().tolist() == [[False, True]]
    assert dx[[0, 2, 3]].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS)
def test_a_row_that_does_not_exist_is_nan_on_a_gpu(plan):
    table = ScoreTable(logit_rows=[0, 9, 2], targets=[0, 1, 4], seq_offsets=[0, 1, 3])
    value, dx, *_ = run(
        torch.randn(4, 6), torch.randn(5, 6), None, table, torch.ones(1, 2), plan, "cuda"
    )
    assert value.isnan().tolist() == [[False, True]]
    assert dx.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weight_gradient_is_added_in_float32_over_chunks(dtype):
    """64 chunks round as one does: once. Adding in bfloat16 is off by 0.5 to 1.6 percent."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(256, 8, generator=generator).to(dtype)
    weight = torch.randn(16, 8, generator=generator).to(dtype)
    table = ScoreTable(
        logit_rows=torch.arange(256),
        targets=torch.zeros(256, dtype=torch.int32),
        seq_offsets=torch.tensor([0, 128, 256], dtype=torch.int32),
    )
    g = torch.tensor([[1.0, 0.7]])
    truth = oracle(hidden, weight, None, table, g)[2]
    many = run(hidden, weight, None, table, g, "recompute", chunk_rows=4)[2].double().numpy()
    once = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert (np.abs(many - truth) / np.abs(truth)).max() < 2.5 * once


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("option", ["temperature", "softcap", "logit_scale", "bias"])
def test_every_option_moves_value_and_gradient(impl, plan, option):
    hidden, weight, bias, table = random_head(3, dtype=torch.float32)
    g = torch.ones(table.n_groups, 2)
    plain = run(hidden, weight, None, table, g, plan, impl)
    if option == "bias":
        other = run(hidden, weight, bias, table, g, plan, impl)
    else:
        other = run(hidden, weight, None, table, g, plan, impl, **{option: 1.5})
    assert (plain[0] - other[0]).abs().max() > 1e-2
    assert (plain[1] - other[1]).abs().max() > 1e-2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", PLANS)
def test_token_scores_are_those_of_the_logits(impl, plan):
    hidden, weight, bias, table = on_device(impl, *random_head(4, dtype=torch.float32))
    stats = ("entropy", "mean_logit", "log_sum_sq", "is_top1")
    got = linear_token_scores(
        hidden, weight, table, bias=bias, stats=stats, plan=plan, chunk_rows=2, impl=impl
    )
    logits = torch.addmm(bias, hidden, weight.t())
    expected = token_scores(logits, table, stats=stats, impl=impl)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    some = linear_token_scores(hidden, weight, table, stats=("entropy",), plan=plan, impl=impl)
    assert (some.mean_logit, some.is_top1) == (None, None)
    with pytest.raises(ValueError, match="`stats`"):
        linear_token_scores(hidden, weight, table, stats=("kl",))


def on_device(impl, *things):
    return [thing.to(device_of(impl)) for thing in things]


@pytest.mark.parametrize("impl", IMPLS)
def test_per_token_upstream_through_the_frozen_plan(impl):
    hidden, weight, _, table = random_head(5, dtype=torch.float32)
    g = torch.randn(table.n_tokens)
    g[table.targets == -100] = 0
    f = fields(table)
    truth = reference.linear_grads(
        hidden.numpy(), weight.numpy(), None, f["logit_rows"], f["targets"], g.numpy()
    )[0]
    for plan in PLANS:
        x, w, t = on_device(impl, hidden.clone(), weight, table)
        x.requires_grad_()
        logps = linear_token_scores(x, w, t, plan=plan, chunk_rows=2, impl=impl).logps
        logps.backward(g.to(x.device))
        np.testing.assert_allclose(x.grad.cpu(), truth, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_multiplies_in_its_dtype_and_gives_back_the_parameters_dtype(plan):
    hidden, weight, bias, table = random_head(7, dtype=torch.float32, H=16, V=33)
    g = torch.ones(table.n_groups, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(hidden, weight, bias, table, g, plan)
        double = run(hidden.double(), weight.double(), bias.double(), table, g, plan)
    half = [t.bfloat16() for t in (hidden, weight, bias)]
    by_hand = run(*half, table, g, plan)
    assert torch.equal(cast[0], by_hand[0])
    assert double[0].dtype == torch.float64
    for got, expected in zip(cast[1:], by_hand[1:], strict=True):
        if got is None:
            continue
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected.float(), rtol=2**-7, atol=2**-7)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a backbone under autocast, float32 weights
        mixed = linear_sequence_logps(half[0], weight, table, bias=bias, plan="recompute")
    assert torch.equal(mixed, by_hand[0])


@pytest.mark.parametrize("plan", PLANS)
def test_a_second_derivative_is_refused(plan):
    hidden, weight, _, table = random_head(8, dtype=torch.float32)
    x = hidden.requires_grad_()
    value = linear_sequence_logps(x, weight, table, plan=plan)
    (grad,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        (x.sum() + grad.pow(2).sum()).backward()


def test_tied_weights_get_both_gradients():
    weight = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 5, (4, 4))
    table = ScoreTable.from_labels(LABELS)
    logps = linear_sequence_logps(weight[ids].tanh(), weight, table)
    (grad,) = torch.autograd.grad(logps.sum(), weight)
    logps = sequence_logps(weight[ids].tanh() @ weight.T, table)
    (expected,) = torch.autograd.grad(logps.sum(), weight)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("R", [0, 3])
def test_nothing_to_score(plan, R):
    hidden = torch.randn(R, 6, requires_grad=True)
    weight = torch.randn(5, 6, requires_grad=plan == "recompute")
    for table in (
        ScoreTable(logit_rows=[], targets=[], seq_offsets=[0, 0, 0]),
        ScoreTable(logit_rows=[7, 8], targets=[-100, -100], seq_offsets=[0, 1, 2]),
    ):
        value = linear_sequence_logps(hidden, weight, table, plan=plan)
        assert value.tolist() == [[0.0, 0.0]]
        value.sum().backward()
        assert not hidden.grad.any()
        assert weight.grad is None or not weight.grad.any()


def test_wrong_arguments_are_refused():
    hidden, weight, bias, table = random_head(0, dtype=torch.float32)
    R = len(hidden)

    def score(h=hidden, w=weight, t=table, **options):
        return linear_sequence_logps(h, w, t, **options)

    trained = weight.clone().requires_grad_()
    for error, message, call in (
        (
            ValueError,
            "`plan` must be one of auto, frozen, recompute, found 'pairwise'\nhint",
            {"plan": "pairwise"},
        ),
        (ValueError, "`plan` must be one of", {"plan": "fast"}),
        (
            ValueError,
            "needs a weight, a bias and an adapter without gradient",
            {"plan": "frozen", "w": trained},
        ),
        (ValueError, "`chunk_rows` must be at least 1, found 0", {"chunk_rows": 0}),
        (TypeError, "`chunk_rows` must be an int", {"chunk_rows": 2.0}),
        (ValueError, "`temperature`", {"temperature": 0.0}),
        (ValueError, "`impl`", {"impl": "triton"}),
        (TensorError, r"`weight` must have shape \(V, 6\)", {"w": weight.t()}),
        (TensorError, r"`bias` must have shape \(9,\)", {"bias": bias[:3]}),
        (
            TensorError,
            "`weight` must be float32, as `hidden` is, found float64",
            {"w": weight.double()},
        ),
        (TensorError, r"`hidden` must have shape", {"h": hidden[None, None]}),
        (
            TensorError,
            "floating-point dtype, found int64",
            {"h": hidden.long(), "w": weight.long()},
        ),
        (TensorError, "`weight` must be on cpu, found meta", {"w": weight.to("meta")}),
        (TypeError, "`weight` must be a torch.Tensor", {"w": weight.numpy()}),
        (TypeError, "`table` must be a ScoreTable", {"t": LABELS}),
        (
            TensorError,
            f"must be below {R}, the rows of `hidden`",
            {"t": ScoreTable(logit_rows=[R], targets=[1], seq_offsets=[0, 1, 1])},
        ),
    ):
        with pytest.raises(error, match=message):
            score(**call)
