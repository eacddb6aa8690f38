"""Hazards of precision, on every implementation and plan."""

import math

import numpy as np
import pytest
import reference
import torch
from compare import assert_no_worse
from kernel_cases import place
from logps_cases import IMPLS, device_of, oracle

from dpo_ext.torch import (
    ScoreTable,
    linear_preference_loss,
    linear_sequence_logps,
    linear_token_scores,
    preference_loss,
    sequence_logps,
    token_scores,
)
from dpo_ext.torch.logps import cuda as kernels

PLAIN = (1.0, 0.0, 1.0)
PLANS = ["frozen", "recompute"]


def one_row(V, target, dtype=torch.float32):
    table = ScoreTable(logit_rows=[0], targets=[target], seq_offsets=[0, 1], group_size=1)
    return torch.zeros(1, V, dtype=dtype), table


def value_and_grad(z, table, impl, upstream=None, **how):
    where = device_of(impl)
    x = z.detach().to(where).requires_grad_()
    value = sequence_logps(x, table.to(where), impl=impl, **how)
    g = torch.ones_like(value) if upstream is None else upstream.to(where, value.dtype)
    return value.detach().cpu(), torch.autograd.grad(value, x, g)[0].cpu()


@pytest.mark.fault("H1", "H2", "H3")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shift", [0.0, 40.0, 200.0])
def test_log_probs_of_peaked_and_of_single_columns_are_never_above_0(impl, shift):
    for V in (1, 2, 9, 1000):
        for complement in (0.5, 1e-1, 1e-3, 1e-6, 1e-12):
            z, table = one_row(V, V - 1)
            z += shift
            z[0, -1] += math.log(max(V - 1, 1) * (1 - complement) / complement)
            value, grad = value_and_grad(z, table, impl)
            true_value, true_grad = oracle(z, table, torch.ones(1, 1))
            assert value.item() <= 0
            if V == 1:
                assert value.item() == 0
            if impl != "torch":  # the twin subtracts as plain autograd does
                np.testing.assert_allclose(grad[0, -1], true_grad[0, -1], rtol=1e-5)
                np.testing.assert_allclose(value, true_value, rtol=1e-5)


@pytest.mark.fault("H4")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_that_the_product_rounded_cost_what_they_cost_torch(impl, dtype):
    """Near |z| = 30 a bfloat16 logit is off by 0.06: against float64 of the product that was not rounded."""
    where = device_of(impl)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(32, 64, generator=generator).to(dtype)
        weight = (torch.randn(300, 64, generator=generator) * 3).to(dtype)
        targets = (hidden.double() @ weight.double().T).argmax(-1).int()
        table = ScoreTable(
            logit_rows=torch.arange(32), targets=targets, seq_offsets=torch.arange(33).int()
        )
        truth = reference.token_stats(
            (hidden.double() @ weight.double().T).numpy(), range(32), targets.tolist()
        )["logp"]
        log_p = (hidden.to(where) @ weight.to(where).T).float().log_softmax(-1).cpu()
        base = log_p[torch.arange(32), targets.long()]
        for plan in PLANS:
            errors = []
            for exact in (False, True):
                logps = linear_token_scores(
                    *(hidden.to(where), weight.to(where), table.to(where)),
                    plan=plan,
                    impl=impl,
                    exact_target=exact,
                ).logps.cpu()
                assert (logps <= 0).all()
                errors.append(np.abs(logps.double().numpy() - truth).mean())
                if not exact:
                    assert_no_worse(logps, base, truth, slack=1e-5)
            assert errors[0] != errors[1]
            # exact, what is left is the rounding of the other columns, weighted by their shares
            unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
            largest = float((hidden.double() @ weight.double().T).abs().max())
            assert np.abs(logps.double().numpy() - truth).max() <= unit * largest


@pytest.mark.fault("H5")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", ["recompute", "pairwise"])
def test_the_weight_gradient_of_64_chunks_is_rounded_once(plan, dtype):
    """Adding in bfloat16 is off by 0.5 to 1.6 percent; rounding once by 0.2 to 0.4."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(256, 8, generator=generator).to(dtype)
    weight = torch.randn(16, 8, generator=generator).to(dtype)
    table = ScoreTable(
        logit_rows=torch.arange(256),
        targets=torch.zeros(256, dtype=torch.int32),
        # chosen alone has tokens: no coefficient has the other sign, which would hide the sum's error
        seq_offsets=torch.arange(0, 257, 2).repeat_interleave(2)[:-1].int(),
    )

    def gradient(chunk_rows, *parts):
        x, w = (p.clone().requires_grad_() for p in parts)
        if plan == "recompute":
            linear_sequence_logps(x, w, table, plan=plan, chunk_rows=chunk_rows).sum().backward()
        else:
            ref = torch.tensor([[50.0, -50.0]]).expand(128, 2)  # c is near beta
            loss = linear_preference_loss(
                x, w, table, ref, plan=plan, chunk_rows=chunk_rows, beta=1.0
            )
            loss.loss.backward()
        return w.grad

    many, one = gradient(4, hidden, weight), gradient(256, hidden, weight)
    exact = gradient(256, hidden.double(), weight.double())
    large = exact.abs() > exact.abs().max() / 50
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for got in (many, one):
        assert ((got.double() - exact).abs() / exact.abs())[large].max() < 4 * unit


@pytest.mark.fault("H6")
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_gradient_of_few_rows_over_a_large_vocabulary_is_added_in_float32(rows):
    V, H = 128_256, 4
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, H, generator=generator).bfloat16()
    weight = torch.randn(V, H, generator=generator).bfloat16()
    offsets = torch.tensor([0, rows, rows]).int()
    table = ScoreTable(
        logit_rows=torch.arange(rows), targets=torch.arange(rows).int(), seq_offsets=offsets
    )
    x = hidden.clone().requires_grad_()
    linear_sequence_logps(x, weight, table, plan="frozen").sum().backward()
    z = (hidden @ weight.T).double().requires_grad_()  # the rounded logits are not dX's fault
    sequence_logps(z, table).sum().backward()
    exact = z.grad @ weight.double()
    torch.testing.assert_close(x.grad.double(), exact, rtol=2**-7, atol=2e-3)


@pytest.mark.fault("H7")
@pytest.mark.parametrize(
    ("precision", "unit"), [("highest", 2e-6), ("high", 2e-3), ("medium", 2e-2)]
)
def test_the_tolerance_of_float32_products_is_what_the_user_set(precision, unit):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator) for n in (16, 300))
    table = ScoreTable(
        logit_rows=torch.arange(16),
        targets=torch.arange(16).int(),
        seq_offsets=torch.arange(17).int(),
    )
    exact = sequence_logps(hidden.double() @ weight.double().T, table)
    logits = hidden @ weight.T
    given = sequence_logps(logits, table)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert torch.equal(sequence_logps(logits, table), given)  # no product in it
        value = linear_sequence_logps(hidden, weight, table)
    finally:
        torch.set_float32_matmul_precision(before)
    assert (value - exact).abs().max() <= 2 * unit * float(logits.abs().max()) + 1e-6


@pytest.mark.fault("H8")
@pytest.mark.parametrize("impl", IMPLS)
def test_a_hundred_thousand_tokens_are_summed_to_one_unit_and_none_is_0(impl):
    z = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0)).to(device_of(impl))
    table = ScoreTable(
        logit_rows=torch.arange(100_000),
        targets=torch.zeros(100_000, dtype=torch.int32),
        seq_offsets=torch.tensor([0, 100_000, 100_000], dtype=torch.int32),
    ).to(z.device)
    value = sequence_logps(z, table, impl=impl)
    tokens = token_scores(z, table, impl=impl).logps
    exact = np.float32(math.fsum(tokens.double().tolist()))
    assert abs(value[0, 0].item() - exact) <= np.spacing(abs(exact))
    assert value[0, 1] == 0
    averaged = preference_loss(value, lengths=table.lengths, loss="simpo", gamma=0.5)
    assert averaged.loss.isfinite()


@pytest.mark.fault("H11")
@pytest.mark.parametrize("impl", IMPLS)
def test_the_cap_makes_minus_infinity_finite_and_composes_in_one_order(impl):
    z = torch.tensor([[-math.inf, 1.0, 2.0, math.inf]])
    for target in (0, 1, 3):
        _, table = one_row(4, target)
        how = {"logit_scale": 2.0, "softcap": 3.0, "temperature": 0.7}
        value, grad = value_and_grad(z, table, impl, **how)
        y = np.array([-3.0, 3 * math.tanh(2 / 3), 3 * math.tanh(4 / 3), 3.0]) / 0.7
        assert value.item() == pytest.approx(y[target] - np.logaddexp.reduce(y), abs=2e-6)
        assert grad[0, [0, 3]].tolist() == [0.0, 0.0]
        assert grad.isfinite().all()


@pytest.mark.fault("H12")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", ["frozen", "pairwise"])
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_small_float16_gradients_are_kept_with_and_without_a_loss_scale(impl, plan, scale):
    """c = beta / N / 2 is near 1e-5: c * p, of a p near 1/200, is below the smallest float16."""
    N, V, H = 256, 200, 4
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * N, H, generator=generator).half()
    weight = (torch.randn(V, H, generator=generator) * 0.1).half()
    table = ScoreTable(
        logit_rows=torch.arange(2 * N),
        targets=(torch.arange(2 * N) * 7 % V).int(),
        seq_offsets=torch.arange(2 * N + 1).int(),
    )
    grads = []
    for dtype in (torch.float16, torch.float64):
        where, kind = ("cpu", "torch") if dtype == torch.float64 else (device_of(impl), impl)
        x = hidden.to(where, dtype, copy=True).requires_grad_()
        w = weight.to(where, dtype).requires_grad_(plan == "pairwise")
        ref = torch.zeros(N, 2, device=where)
        out = linear_preference_loss(
            x, w, table.to(where), ref, plan=plan, impl=kind, beta=0.005, chunk_rows=64
        )
        (out.loss * scale).backward()
        grads.append(x.grad.double().cpu())
    step = 2.0**-24  # of the smallest float16: what is given back cannot be closer
    assert (grads[0] - grads[1]).abs().max() <= 4e-3 * grads[1].abs().max() + step


@pytest.mark.fault("H16")
@pytest.mark.parametrize("plan", [*PLANS, "pairwise"])
def test_the_head_has_the_same_bits_twice_and_another_batch_is_within_the_tolerance(plan):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(24, 16, generator=generator)
    weight = torch.randn(50, 16, generator=generator)

    def step(rows, **how):
        x = hidden[:rows].clone().requires_grad_()
        w = weight.clone().requires_grad_(plan != "frozen")
        table = ScoreTable(
            logit_rows=torch.arange(rows),
            targets=torch.arange(rows).int(),
            seq_offsets=torch.arange(0, rows + 1, 3).int(),
        )
        if plan == "pairwise":
            ref = torch.zeros(rows // 6, 2)
            out = linear_preference_loss(x, w, table, ref, plan=plan, num_pairs=4, **how)
            out.loss.backward()
            return out.logps, x.grad
        value = linear_sequence_logps(x, w, table, plan=plan, **how)
        value.sum().backward()
        return value.detach(), x.grad

    once, again, part, cut = step(24), step(24), step(12), step(24, chunk_rows=6)
    for a, b, c, d in zip(once, again, part, cut, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, a[: len(c)], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(d, a, rtol=1e-5, atol=1e-5)


@pytest.mark.fault("H17")
def test_probabilities_too_small_for_float32_cost_no_more_than_their_size(emulator):
    """NVRTC flushes denormal numbers to 0, a host compiler does not: each term is within 2^-126."""
    z = torch.zeros(1, 64)
    z[0, 1:] = -torch.linspace(80, 110, 63)
    rows, target = torch.tensor([0]), torch.tensor([0], dtype=torch.int32)
    truth = reference.logits_grad(z.double().numpy(), [0], [0], [1.0])
    scores = torch.ops.dpo_ext.token_stats(z, rows, target, *PLAIN, False)
    by_cpu = torch.ops.dpo_ext.logits_grad(z, rows, target, *scores[1:3], torch.ones(1), *PLAIN)
    logits, by_host = place(z), torch.empty(1, 64)
    scores = kernels.token_stats(logits, rows, target, *PLAIN, False)
    kernels.logits_grad(logits, rows, target, *scores[1:3], torch.ones(1), *PLAIN, by_host)
    for got in (by_cpu, by_host):
        assert (np.abs(got.double().numpy() - truth) <= 64 * 2.0**-126 + 1e-5 * np.abs(truth)).all()
