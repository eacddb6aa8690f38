"""`exact_target`: the logit of the target is not rounded to the dtype of the product."""

import numpy as np
import pytest
import reference
import torch
from linear_cases import PLANS, oracle, random_head, run
from logps_cases import DTYPES, HOWS, IMPLS, device_of, fields, name_of

from dpo_ext import TensorError
from dpo_ext.torch import (
    ScoreTable,
    linear_preference_loss,
    linear_sequence_logps,
    linear_token_scores,
    preference_loss,
)

HALF = [torch.bfloat16, torch.float16]


def large_head(seed, dtype, M=64, H=256, V=512, logit=30.0, apart=0.3):
    """Hidden states and a head whose logits all lie near ``logit``, a nat apart."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(H, generator=generator)
    weight = apart * torch.randn(V, H, generator=generator) + common
    hidden = 0.05 * torch.randn(M, H, generator=generator) + common * (logit / common.dot(common))
    table = ScoreTable(
        logit_rows=torch.arange(M),
        targets=torch.randint(0, V, (M,), generator=generator, dtype=torch.int32),
        seq_offsets=torch.arange(0, M + 1, M // 4, dtype=torch.int32),
    )
    return hidden.to(dtype), weight.to(dtype), table


def unrounded(hidden, weight, table):
    """float64 log-probs (M,) of the product that nothing rounds."""
    z = hidden.double() @ weight.double().T
    f = fields(table)
    return reference.token_stats(z.numpy(), f["logit_rows"], f["targets"])["logp"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("logit", [4.0, 12.0, 30.0])
def test_log_probs_lose_what_rounding_the_target_costs(impl, plan, dtype, logit):
    where = device_of(impl)
    for seed in range(4):
        hidden, weight, table = large_head(seed, dtype, logit=logit)
        truth = unrounded(hidden, weight, table)
        errors = []
        for exact in (False, True):
            x, w, t = hidden.to(where).requires_grad_(), weight.to(where), table.to(where)
            options = {"plan": plan, "impl": impl, "chunk_rows": 24, "exact_target": exact}
            logps = linear_token_scores(x, w, t, **options).logps.detach().cpu()
            assert (logps <= 0).all()
            errors.append(np.abs(logps.double().numpy() - truth))
        assert errors[0].max() > logit * torch.finfo(dtype).eps / 8  # half a unit of [16, 32) at 30
        assert errors[1].mean() < 0.3 * errors[0].mean()  # the roundings of the others average out


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("how", HOWS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_row_with_that_logit(impl, plan, how, dtype):
    """float64 autograd through the rounded row with the exact logit in the target's place."""
    for seed in range(6):
        hidden, weight, bias, table = random_head(
            seed, H=8, V=33, dtype=dtype, spread=3.0, weights=True
        )
        g = torch.randn(table.n_groups, 2, generator=torch.Generator().manual_seed(seed))
        got = run(
            hidden, weight, bias, table, g, plan, impl, exact_target=True, chunk_rows=3, **how
        )
        if not table.n_tokens:
            continue
        f = fields(table)
        rounded = torch.addmm(bias, hidden, weight.t()).double()
        exact = hidden.double() @ weight.double().T + bias.double()
        z = rounded.clone()
        scored = f["targets"] >= 0
        at = f["logit_rows"][scored], f["targets"][scored]
        z[at] = exact[at]
        g_tokens = reference.token_upstream(g.double().numpy(), f["weights"], f["seq_offsets"])
        dz = reference.logits_grad(z.numpy(), f["logit_rows"], f["targets"], g_tokens, **how)
        truth = (
            reference.sequence_logps(z.numpy(), f, **how),
            dz @ weight.double().numpy(),
            dz.T @ hidden.double().numpy(),
            dz.sum(0),
        )
        unit = {torch.float32: 2**-19, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
        for name, a, b in zip(("value", "dX", "dW", "db"), got, truth, strict=True):
            if a is None:
                continue
            slack = (2**-18 if name == "value" else unit) * max(1.0, np.abs(b).max(initial=0.0))
            assert np.abs(a.double().numpy() - b).max(initial=0.0) <= slack, (name, seed)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", PLANS)
def test_gradients_follow_a_logit_that_rounding_moves_far(impl, plan):
    """Logits near 200 are whole numbers in bfloat16: the target's exact one moves the gradient."""
    hidden, weight, table = large_head(0, torch.bfloat16, M=16, H=64, V=7, logit=200.0, apart=0.03)
    rounded = torch.mm(hidden, weight.t()).double()
    exact = rounded.clone()
    at = table.logit_rows, table.targets.long()
    exact[at] = (hidden.double() @ weight.double().T)[at]
    f, dx = fields(table), []
    for z in (exact, rounded):
        g = np.ones(table.n_tokens)
        dz = reference.logits_grad(z.numpy(), f["logit_rows"], f["targets"], g)
        dx.append(dz @ weight.double().numpy())
    options = {"exact_target": True, "chunk_rows": 5}
    got = run(hidden, weight, None, table, torch.ones(2, 2), plan, impl, **options)[1]
    # What all columns share is 30 times larger, and multiplies a sum that is 0 but for roundings.
    shared = weight.double().mean(0).numpy()
    ours, near, far = (
        d - np.outer(d @ shared, shared) / (shared @ shared) for d in (got.double().numpy(), *dx)
    )
    largest = np.abs(near).max()
    assert np.abs(far - near).max() > 0.05 * largest
    assert np.abs(ours - near).max() <= 0.01 * largest


def test_float64_is_unchanged():
    hidden, weight, bias, table = random_head(1)
    g = torch.ones(table.n_groups, 2, dtype=torch.float64)
    got = run(hidden, weight, bias, table, g, "recompute", exact_target=True)
    for a, b in zip(got, oracle(hidden, weight, bias, table, g), strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_plan_of_the_loss_takes_it(impl):
    where = device_of(impl)
    hidden, weight, table = large_head(5, torch.bfloat16)
    table, ref = table.to(where), torch.zeros(2, 2, device=where)
    results = {}
    for exact in (False, True):
        for plan in ("frozen", "pairwise", "recompute"):
            x = hidden.to(where).requires_grad_()
            w = weight.to(where).requires_grad_(plan != "frozen")
            out = linear_preference_loss(
                x, w, table, ref, plan=plan, impl=impl, chunk_rows=32, exact_target=exact
            )
            out.loss.backward()
            results[exact, plan] = (out.logps, x.grad)
        for plan in ("pairwise", "recompute"):
            for a, b in zip(results[exact, plan], results[exact, "frozen"], strict=True):
                torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)
    assert not torch.equal(results[False, "pairwise"][0], results[True, "pairwise"][0])
    two_steps = linear_sequence_logps(
        hidden.to(where), weight.to(where), table, impl=impl, exact_target=True
    )
    torch.testing.assert_close(
        preference_loss(two_steps, ref).loss,
        preference_loss(results[True, "pairwise"][0], ref).loss,
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", PLANS)
def test_what_is_not_there_is_refused_or_nan_and_what_is_not_scored_stays_out(impl, plan):
    hidden = torch.randn(4, 8)
    hidden[2] = torch.nan
    weight = torch.randn(11, 8)
    table = ScoreTable(
        logit_rows=[0, 1, 2, 3, 3],
        targets=torch.tensor([3, 11, -100, 10, -100], dtype=torch.int32),
        seq_offsets=[0, 1, 2, 3, 5],
    )
    given = hidden, weight, None, table, torch.ones(2, 2), plan, impl
    there = impl == "cuda"  # its values are not looked at
    if not there:
        with pytest.raises(TensorError, match="found 11 at token 1, row 1"):
            run(*given, exact_target=True)
        table.targets[1] = -100
    value, dx, *_ = run(*given, exact_target=True)
    assert value.isnan().tolist() == [[False, there], [False, False]]
    assert value[1, 0] == 0
    assert (dx[2] == 0).all()
    assert dx[[0, 3]].isfinite().all()


@pytest.mark.parametrize("plan", PLANS)
def test_an_empty_vocabulary_or_table_is_as_without_it(plan):
    for V, M in ((0, 0), (5, 0)):
        table = ScoreTable(logit_rows=list(range(M)), targets=[0] * M, seq_offsets=[0, M // 2, M])
        hidden, weight = torch.ones(3, 4), torch.ones(V, 4)
        results = [
            linear_sequence_logps(hidden, weight, table, plan=plan, exact_target=exact)
            for exact in (False, True)
        ]
        torch.testing.assert_close(*results, equal_nan=True)


def test_it_must_be_a_bool():
    hidden, weight, _, table = random_head(0, dtype=torch.float32)
    with pytest.raises(TypeError, match="`exact_target` must be a bool, found str"):
        linear_sequence_logps(hidden, weight, table, exact_target="yes")
