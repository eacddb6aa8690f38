"""Hazards of precision on every implementation and plan, 10,000 random batches, log 2, options that must act."""

import math
import os

import numpy as np
import pytest
import reference
import torch
from conftest import assert_no_worse
from logps_cases import HOWS, IMPLS, device_of, oracle, random_case
from test_cuda_host import place

from dpo_ext import kernels
from dpo_ext.torch import (
    ScoreTable,
    linear_preference_loss,
    linear_sequence_logps,
    linear_token_scores,
    preference_loss,
    sequence_logps,
    token_scores,
)

PLAIN = (1.0, 0.0, 1.0)
DEEPER = max(1, int(os.environ.get("DPO_EXT_EXAMPLES", "0")) // 500)
PLANS = ["frozen", "recompute"]
LOG2 = math.log(2)


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
            return out._logps.detach(), x.grad
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


# ---- K17: they agree ----------------------------------------------------------------------------


def check_batch(logits, table, upstream, how, got_value, got_grad):
    """Against the twin in float64 on the same logits, which test_logps holds against the oracle."""
    x = logits.double().requires_grad_()
    value = sequence_logps(x, table, impl="torch", **how)
    (grad,) = torch.autograd.grad(value, x, upstream.double())
    torch.testing.assert_close(got_value.double(), value.detach(), rtol=1e-5, atol=2e-5)
    # one rounding of the dtype, at most half a unit of its last place, is all that is lost
    relative = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[logits.dtype]
    largest = float(grad.abs().max()) if grad.numel() else 0.0
    smallest = 2e-6 * largest + (2**-24 if logits.dtype == torch.float16 else 1e-9)
    torch.testing.assert_close(got_grad.double(), grad, rtol=relative * 1.001, atol=smallest)


def random_batch(seed):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    V = (1, 2, 7, 8, 9, 33, 64, 130)[seed // 3 % 8]
    logits, table = random_case(seed, V=V, dtype=dtype, weights=seed % 2 == 0, spread=3.0)
    upstream = torch.randn(
        table.n_groups, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    )
    return logits, table, upstream, HOWS[seed % len(HOWS)]


@pytest.mark.fault("K17")
@pytest.mark.parametrize(("impl", "count"), [("cpu", 4500), ("torch", 2000)])
def test_thousands_of_random_batches_agree_with_float64(impl, count):
    """With the host-compiled CUDA kernels and the plans below: 10,000."""
    for seed in range(count * DEEPER):
        logits, table, g, how = random_batch(seed)
        inplace = impl == "cpu" and seed % 4 == 0
        x = logits.clone().requires_grad_()
        value = sequence_logps(x * 1, table, impl=impl, inplace_grad=inplace, **how)
        (grad,) = torch.autograd.grad(value, x, g)
        check_batch(logits, table, g, how, value.detach(), grad)


@pytest.mark.fault("K17")
def test_random_batches_through_the_cuda_kernels_on_the_host_agree_with_float64(emulator):
    for seed in range(500 * DEEPER):
        logits, table, g, how = random_batch(seed)
        transform = (
            how.get("logit_scale", 1.0),
            how.get("softcap", 0.0),
            how.get("temperature", 1.0),
        )
        scored = table.without_zero_weights()
        parts = (scored.logit_rows, scored.targets)
        scores = kernels.token_stats(logits, *parts, *transform, seed % 2 == 0)
        sums = kernels.segment_sum(scores[0], table.weights, table.seq_offsets)
        f = np.diff(table.seq_offsets.numpy())
        upstream = g.flatten().repeat_interleave(torch.from_numpy(f))
        if table.weights is not None:
            upstream = upstream * table.weights
        dz = torch.empty_like(logits)
        kernels.logits_grad(logits, *parts, *scores[1:3], upstream, *transform, dz)
        check_batch(logits, table, g, how, sums.view(-1, 2), dz)


@pytest.mark.fault("K17")
@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("plan", [*PLANS, "pairwise"])
def test_random_heads_agree_with_float64(impl, plan):
    for seed in range(500 * DEEPER):
        rng = torch.Generator().manual_seed(seed)
        logits, table, _, how = random_batch(seed)
        V, with_bias = logits.shape[1], seed % 3 == 0
        shapes = [(len(logits), 4), (V, 4)] + [(V,)] * with_bias
        parts = [torch.randn(s, generator=rng) for s in shapes]
        ref = torch.randn(table.n_groups, 2, generator=rng)
        results = []
        for dtype, kind, its_plan in (
            (torch.float32, impl, plan),
            (torch.float64, "torch", "recompute"),
        ):
            x, w, *b = (p.to(dtype, copy=True) for p in parts)
            leaves = [p.requires_grad_() for p in ([x] if plan == "frozen" else [x, w, *b])]
            out = linear_preference_loss(
                *(x, w, table, ref.to(dtype)),
                bias=b[0] if b else None,
                plan="recompute" if plan == "frozen" and dtype == torch.float64 else its_plan,
                impl=kind,
                chunk_rows=1 + seed % 5,
                **how,
            )
            results.append((out.loss.detach(), *torch.autograd.grad(out.loss, leaves)))
        for got, expected in zip(*results, strict=True):
            largest = float(expected.abs().max()) if expected.numel() else 0.0
            torch.testing.assert_close(
                got.double(), expected, rtol=1e-5, atol=2e-5 * max(largest, 1e-2)
            )


# ---- K18: log 2, and options --------------------------------------------------------------------


def head(seed=3):
    logits, table = random_case(seed, V=9, S=4, longest=4)
    rng = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(len(logits), 6, generator=rng), torch.randn(9, 6, generator=rng)
    return hidden, weight, torch.randn(9, generator=rng), table


@pytest.mark.fault("K18")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", ["logits", *PLANS, "pairwise"])
def test_a_policy_that_equals_its_reference_has_the_loss_log_2(impl, plan):
    hidden, weight, _, table = (p.to(device_of(impl)) for p in head())
    if plan == "pairwise":
        weight.requires_grad_()
    with torch.no_grad():
        ref = linear_sequence_logps(hidden, weight, table, impl=impl)
    if plan == "logits":
        z = hidden @ weight.T
        ref = sequence_logps(z, table, impl=impl)
        out = preference_loss(sequence_logps(z, table, impl=impl), ref)
    else:
        out = linear_preference_loss(hidden, weight, table, ref, plan=plan, impl=impl)
    assert abs(out.loss.item() - LOG2) <= 1e-7


WEIGHTS = torch.tensor([2.0, 0.5])
HEAD_OPTIONS = {
    "temperature": {"temperature": 1.5},
    "softcap": {"softcap": 1.5},
    "logit_scale": {"logit_scale": 1.5},
    "bias": {"bias": head()[2]},
    "beta": {"beta": 0.3},
    "pair_weight": {"pair_weight": WEIGHTS},
    "num_pairs": {"num_pairs": 5},
    "label_smoothing": {"loss": "cdpo", "label_smoothing": 0.3},
    "loss": {"loss": "ipo_sum"},
    "loss_weights": {"loss": ["dpo", "ipo_sum"], "loss_weights": [0.5, 2.0]},
    "lengths": {"loss": "simpo", "gamma": 0.5, "lengths": torch.tensor([[3, 1], [2, 7]])},
    "compat": {"loss": "ipo", "compat": "trl-1.16"},
}
BASES = {
    "label_smoothing": {"loss": "cdpo", "label_smoothing": 0.1},
    "loss_weights": {"loss": ["dpo", "ipo_sum"], "loss_weights": [0.5, 1.0]},
    "lengths": {"loss": "simpo", "gamma": 0.5},
}


@pytest.mark.fault("K18")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", [*PLANS, "pairwise"])
@pytest.mark.parametrize("option", [*HEAD_OPTIONS, "weights", "ref_logps"])
def test_every_option_of_the_loss_with_the_head_moves_loss_and_gradient(impl, plan, option):
    hidden, weight, _, table = (p.to(device_of(impl)) for p in head())
    if plan != "frozen":
        weight.requires_grad_()
    ref = torch.tensor([[-4.0, -6.0], [-5.0, -3.0]], device=hidden.device)

    def step(t=table, r=ref, **options):
        x = hidden.clone().requires_grad_()
        moved = {k: v.to(x.device) if torch.is_tensor(v) else v for k, v in options.items()}
        r = None if options.get("loss") == "simpo" else r
        out = linear_preference_loss(x, weight, t, r, plan=plan, impl=impl, **moved)
        return out.loss.detach(), torch.autograd.grad(out.loss, x)[0]

    if option == "compat" and plan == "pairwise":
        with pytest.raises(ValueError, match="`compat` may average over the batch"):
            step(**HEAD_OPTIONS[option])
        return
    plain = step(**BASES.get(option, {}))
    if option == "weights":
        half = {"weights": torch.full((table.n_tokens,), 0.5, device=table.device)}
        names = ("logit_rows", "targets", "seq_offsets")
        other = step(ScoreTable(**{n: getattr(table, n) for n in names}, **half))
    elif option == "ref_logps":
        other = step(r=ref * 2)
    else:
        other = step(**HEAD_OPTIONS[option])
    for a, b in zip(plain, other, strict=True):
        assert (a - b).abs().max() > 1e-3 * max(float(a.abs().max()), 1e-2)


@pytest.mark.fault("K18")
@pytest.mark.parametrize("plan", [*PLANS, "pairwise"])
def test_every_option_of_scoring_inside_a_model_acts(plan):
    transformers = pytest.importorskip("transformers")
    from dpo_ext.torch import attach_scoring

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 23}
    ids = torch.randint(1, 23, (4, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :3] = -100
    table, ref = ScoreTable.from_labels(labels), torch.tensor([[-9.0, -14.0], [-11.0, -8.0]])

    def loss(family="Gemma2", config=None, step=None, **options):
        torch.manual_seed(0)
        kind = getattr(transformers, f"{family}Config")
        extra = {"head_dim": 8} if family == "Gemma2" else {"pad_token_id": 0}
        config = kind(**small, initializer_range=0.3, **extra, **(config or {}))
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        if plan == "frozen":
            model.get_output_embeddings().weight.requires_grad_(False)
        attach_scoring(model, plan=plan, loss={"loss": "dpo", "beta": 0.1, **options})
        return model(input_ids=ids, score_table=table, ref_logps=ref, **(step or {})).loss.item()

    plain, cohere = loss(), loss("Cohere")
    moved = [
        plain - loss(config={"final_logit_softcapping": 1.0}),
        cohere - loss("Cohere", config={"logit_scale": 1.0}),
        plain - loss(beta=0.3),
        plain - loss(loss="ipo_sum"),
        plain - loss(loss="cdpo", label_smoothing=0.2),
        plain - loss(step={"num_pairs": 5}),
    ]
    assert min(map(abs, moved)) > 1e-3
