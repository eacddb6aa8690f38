"""Identities that hold for every logit matrix and table, on every implementation."""

import math

import numpy as np
import pytest
import reference
import torch
from compare import assert_no_worse
from logps_cases import (
    DTYPES,
    HOWS,
    IMPLS,
    KERNELS,
    WIDTHS,
    device_of,
    fields,
    name_of,
    oracle,
    ordinary,
    random_case,
)

from dpo_ext.torch import ScoreTable, sequence_logps, token_scores

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, pytest.importorskip("hypothesis.strategies")


@st.composite
def cases(draw, dtypes=(torch.float32,), weights=None):
    """Hypothesis strategy of what `random_case` makes."""
    return random_case(
        draw(st.integers(0, 2**32 - 1)),
        V=draw(st.sampled_from(WIDTHS)),
        S=2 * draw(st.integers(0, 3)),
        longest=draw(st.integers(0, 4)),
        spread=draw(st.sampled_from([0.0, 0.1, 2.0, 20.0])),
        dtype=draw(st.sampled_from(list(dtypes))),
        weights=draw(st.booleans()) if weights is None else weights,
    )


ALL_STATS = ("entropy", "mean_logit", "log_sum_sq", "is_top1")


def run(logits, table, impl, upstream=None, *, tokens=False, **how):
    """(values, gradient) by one implementation, back on the CPU."""
    where = device_of(impl)
    z = logits.detach().to(where).requires_grad_()
    score = (lambda *a, **k: token_scores(*a, **k).logps) if tokens else sequence_logps
    value = score(z, table.to(where), impl=impl, **how)
    grad = None
    if upstream is not None:
        (grad,) = torch.autograd.grad(value, z, upstream.to(where))
        grad = grad.cpu()
    return value.detach().cpu(), grad


def random_upstream(table, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(table.n_groups, table.group_size, generator=generator)


def same_bits(a, b):
    return torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0)) and torch.equal(
        a.signbit(), b.signbit()
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("how", HOWS, ids=name_of)
@given(case=cases(DTYPES), seed=st.integers(0, 99))
def test_no_worse_than_log_softmax_forward_and_backward(impl, how, case, seed):
    """Slack forward: 4e-6 a token. Backward: 4e-6 of the largest upstream, one rounding of the dtype."""
    logits, table = case
    g = random_upstream(table, seed)
    value, grad = run(logits, table, impl, g, **how)
    true_value, true_grad = oracle(logits, table, g, **how)
    base_value, base_grad = ordinary(logits, table, g, **how)
    assert value.dtype == torch.float32
    assert grad.dtype == logits.dtype
    weight = 1.0
    if table.weights is not None and table.n_tokens:
        weight = max(1.0, float(table.weights.abs().max()))
    tokens = max(int(table.lengths.max()) if table.n_groups else 0, 1)
    slack = 4e-6 * tokens * weight + float(np.abs(true_value).max(initial=0.0)) * 2**-23
    assert_no_worse(value, base_value, true_value, slack)
    slope = how.get("logit_scale", 1.0) / how.get("temperature", 1.0)
    largest = float(g.abs().max()) * weight * slope if g.numel() else 0.0
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}[logits.dtype]
    assert_no_worse(grad, base_grad, true_grad, largest * (4e-6 + rounding))


@pytest.mark.parametrize("impl", IMPLS)
@given(case=cases())
def test_tokens_are_within_4e_6_of_float64(impl, case):
    logits, table = case
    value, _ = run(logits, table, impl, tokens=True)
    f = fields(table)
    truth = reference.token_stats(logits.double().numpy(), f["logit_rows"], f["targets"])["logp"]
    # a spread of 20 makes log-probs near -100, where a float32 itself is 8e-6 apart
    np.testing.assert_allclose(value.numpy(), truth, rtol=2**-23, atol=4e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("how", HOWS, ids=name_of)
@given(case=cases())
def test_statistics_against_float64(impl, how, case):
    logits, table = case
    where = device_of(impl)
    got = token_scores(logits.to(where), table.to(where), stats=ALL_STATS, impl=impl, **how)
    f = fields(table)
    truth = reference.token_stats(logits.double().numpy(), f["logit_rows"], f["targets"], **how)
    for name in ("entropy", "mean_logit", "log_sum_sq"):
        value = getattr(got, name)
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value.cpu().numpy(), truth[name], rtol=2e-6, atol=2e-5)
    if not how:  # the cap and the scale may make a tie of what float64 still tells apart
        assert got.is_top1.cpu().numpy().tolist() == truth["is_top1"].tolist()


@pytest.mark.parametrize("impl", IMPLS)
@given(case=cases(), k=st.integers(-30000, 30000))
def test_a_constant_added_to_all_logits_changes_no_bit(impl, case, k):
    logits, table = case
    grid = (logits * 64).round() / 64
    g = random_upstream(table)
    one, other = run(grid, table, impl, g), run(grid + float(k), table, impl, g)
    assert same_bits(one[0], other[0])
    assert same_bits(one[1], other[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("V", WIDTHS)
def test_probabilities_of_a_row_sum_to_one(impl, V, spread):
    row = torch.randn(1, V, generator=torch.Generator().manual_seed(V)) * spread
    table = ScoreTable(
        logit_rows=torch.arange(V),
        targets=torch.arange(V, dtype=torch.int32),
        seq_offsets=torch.arange(V + 1, dtype=torch.int32),
        group_size=1,
    )
    value, _ = run(row.repeat(V, 1), table, impl)
    assert (value <= 0).all()
    assert abs(math.fsum(value.double().exp().flatten().tolist()) - 1) <= 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@given(case=cases(weights=True), seed=st.integers(0, 99))
def test_permuting_rows_and_pairs_permutes_the_results(impl, case, seed):
    logits, table = case
    rng = np.random.default_rng(seed)
    g = random_upstream(table)
    value, grad = run(logits, table, impl, g)
    rows, groups = rng.permutation(len(logits)), rng.permutation(table.n_groups)
    back = np.argsort(rows)
    sequences = (2 * groups[:, None] + [0, 1]).flatten()
    f = fields(table)
    borders = f["seq_offsets"]
    tokens = np.concatenate(
        [np.arange(borders[s], borders[s + 1]) for s in sequences] or [np.zeros(0)]
    ).astype(int)
    moved = ScoreTable(
        logit_rows=back[f["logit_rows"][tokens]].astype(np.int64),
        targets=f["targets"][tokens],
        seq_offsets=np.concatenate([[0], np.cumsum(np.diff(borders)[sequences])]).astype(np.int32),
        weights=f["weights"][tokens],
    )
    other, other_grad = run(
        logits[torch.from_numpy(rows)], moved, impl, g[torch.from_numpy(groups)]
    )
    assert same_bits(value[torch.from_numpy(groups)], other)
    assert same_bits(grad[torch.from_numpy(rows)], other_grad)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@given(case=cases(DTYPES))
def test_rows_that_are_not_scored_are_never_read_and_get_no_gradient(impl, poison, case):
    logits, table = case
    scored = table.targets != -100
    if table.weights is not None:
        scored &= table.weights != 0
    others = torch.ones(len(logits), dtype=torch.bool)
    others[table.logit_rows[scored]] = False
    poisoned = logits.clone()
    poisoned[others] = poison
    g = random_upstream(table)
    one, other = run(logits, table, impl, g), run(poisoned, table, impl, g)
    assert same_bits(one[0], other[0])
    assert same_bits(one[1], other[1])
    assert not other[1][others].any()
    assert not other[1][others].signbit().any()


@pytest.mark.parametrize("impl", IMPLS)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=2, max_size=6),
    pad=st.integers(0, 3),
    left=st.booleans(),
    V=st.sampled_from([2, 9, 33]),
    seed=st.integers(0, 99),
)
def test_packed_and_padded_and_alone_give_the_same_bits(impl, lengths, pad, left, V, seed):
    lengths = lengths[: len(lengths) // 2 * 2]
    rng = np.random.default_rng(seed)
    N, T = len(lengths) // 2, max(p + c for p, c in lengths) + pad
    logits = [torch.tensor(rng.normal(0, 3, (p + c, V)), dtype=torch.float32) for p, c in lengths]
    labels = [
        torch.tensor([-100] * p + rng.integers(0, V, c).tolist(), dtype=torch.int64)
        for p, c in lengths
    ]
    # one by one
    alone = [
        run(z, ScoreTable.from_labels(y[None], group_size=1).compact(), impl)[0][0, 0]
        for z, y in zip(logits, labels, strict=True)
    ]
    # padded: chosen rows first, garbage in the pad rows
    padded = torch.full((2 * N, T, V), math.nan)
    padded_labels = torch.full((2 * N, T), -100)
    for s, (z, y) in enumerate(zip(logits, labels, strict=True)):
        row = s // 2 + (N if s % 2 else 0)
        start = T - len(y) if left else 0
        padded[row, start : start + len(y)] = z
        padded_labels[row, start : start + len(y)] = y
    table = ScoreTable.from_labels(padded_labels)
    # packed: interleaved, no padding
    starts = np.concatenate([[0], np.cumsum([len(y) for y in labels])])
    rows = [
        [starts[s] + t for t in range(len(y) - 1) if y[t + 1] >= 0] for s, y in enumerate(labels)
    ]
    packed_table = ScoreTable(
        logit_rows=[int(r) for sequence in rows for r in sequence],
        targets=[int(i) for y in labels for i in y[1:] if i >= 0],
        seq_offsets=np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int32),
    )
    results = [
        run(padded, table, impl)[0],
        run(padded.flatten(0, 1), table.compact(), impl)[0],
        run(torch.cat(logits), packed_table, impl)[0],
        torch.stack(alone).reshape(-1, 2),
    ]
    for other in results[1:]:
        assert same_bits(results[0], other)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("how", HOWS, ids=name_of)
@given(case=cases(DTYPES, weights=False))
def test_gradient_rows_sum_to_zero(impl, how, case):
    if "softcap" in how:
        how = {**how, "softcap": None}  # its slope differs from column to column
    logits, table = case
    g = random_upstream(table)
    _, grad = run(logits, table, impl, g, **how)
    scale = how.get("logit_scale", 1.0) / how.get("temperature", 1.0)
    # half a unit in the last place of each entry, whose absolute values sum to at most 2 |g|
    bound = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[logits.dtype]
    largest = scale * float(g.abs().max()) if g.numel() else 0.0
    assert (grad.double().sum(-1).abs() <= bound * largest).all()


@pytest.mark.parametrize("impl", IMPLS)
@given(case=cases(), power=st.integers(-8, 8))
def test_the_gradient_is_linear_in_the_upstream(impl, case, power):
    logits, table = case
    g = random_upstream(table)
    _, one = run(logits, table, impl, g)
    _, scaled = run(logits, table, impl, g * 2.0**power)
    # below 1e-30 the kernels may flush what is nearly denormal
    torch.testing.assert_close(one * 2.0**power, scaled, rtol=0, atol=1e-30)
    _, nothing = run(logits, table, impl, torch.zeros_like(g))
    assert not nothing.any()


@pytest.mark.parametrize("impl", KERNELS)
@given(case=cases(DTYPES))
def test_bits_do_not_depend_on_run_threads_or_neighbours(impl, case):
    logits, table = case
    g = random_upstream(table)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(logits, table, impl, g))
    finally:
        torch.set_num_threads(before)
    for value, grad in results[1:]:
        assert same_bits(results[0][0], value)
        assert same_bits(results[0][1], grad)


@pytest.mark.parametrize("impl", IMPLS)
@given(case=cases(weights=True))
def test_upstream_per_token_is_upstream_per_sequence(impl, case):
    logits, table = case
    g = random_upstream(table)
    _, by_sequence = run(logits, table, impl, g)
    per_token = torch.repeat_interleave(g.flatten(), table.seq_offsets.diff().long())
    per_token = torch.where(table.weights != 0, per_token * table.weights, 0.0)
    value, by_token = run(logits, table, impl, per_token, tokens=True)
    assert torch.equal(by_sequence, by_token)
    sums = reference.segment_sum(value.numpy(), table.weights.numpy(), table.seq_offsets.numpy())
    expected = torch.tensor(sums, dtype=torch.float32).reshape(-1, 2)
    assert torch.equal(run(logits, table, impl)[0], expected)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("how", HOWS, ids=name_of)
@given(case=cases(DTYPES))
def test_kernels_agree_with_the_twin(impl, how, case):
    logits, table = case
    g = random_upstream(table)
    value, grad = run(logits, table, impl, g, **how)
    twin_value, twin_grad = run(logits, table, "torch", g, **how)
    torch.testing.assert_close(value, twin_value, rtol=1e-5, atol=1e-5)
    relative = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[logits.dtype]
    largest = float(twin_grad.abs().max()) if grad.numel() else 0.0
    torch.testing.assert_close(grad, twin_grad, rtol=relative, atol=1e-6 * max(largest, 1.0))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("option", ["temperature", "softcap", "logit_scale", "weights"])
def test_every_option_moves_value_and_gradient(impl, option):
    logits, table = random_case(3, V=9, S=4, longest=4)
    g = random_upstream(table)
    plain = run(logits, table, impl, g)
    if option == "weights":
        half = torch.full((table.n_tokens,), 0.5)
        weighted = ScoreTable(
            logit_rows=table.logit_rows,
            targets=table.targets,
            seq_offsets=table.seq_offsets,
            weights=half,
        )
        other = run(logits, weighted, impl, g)
    else:
        other = run(logits, table, impl, g, **{option: 1.5})
    assert (plain[0] - other[0]).abs().max() > 1e-2
    assert (plain[1] - other[1]).abs().max() > 1e-2


@pytest.mark.parametrize("impl", IMPLS)
def test_identical_sides_give_no_gradient_to_the_parameters(impl):
    hidden, weight = torch.randn(4, 5), torch.randn(6, 5)
    where = device_of(impl)
    w = weight.to(where).requires_grad_()
    both = torch.cat([hidden, hidden]).to(where)
    table = ScoreTable.from_labels(torch.tensor([[-100, 3, 1, 2], [-100, 3, 1, 2]])).to(where)
    logps = sequence_logps(both @ w.T, table, impl=impl)
    (0.7 * (logps[:, 0] - logps[:, 1])).sum().backward()
    assert w.grad.abs().max() <= 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("step", [0.3, 1.9, 2.1, 100.0, -1.9])
def test_a_maximum_that_moves_all_along_the_row_costs_no_digit(impl, step):
    """The CPU kernel sums a block by the maximum of those before it where that is not far below."""
    generator = torch.Generator().manual_seed(3)
    V = 20 * 2048 + 7
    logits = torch.randn(2, V, generator=generator) + step * torch.arange(V).div(2048).floor()
    table = ScoreTable(logit_rows=[0, 1], targets=[5, V - 1], seq_offsets=[0, 1, 2])
    upstream = torch.ones(1, 2)
    value, grad = run(logits, table, impl, upstream)
    exact, exact_grad = run(logits.double(), table, "torch", upstream.double())
    assert ((value - exact) / exact).abs().max() <= 1e-6
    assert (grad - exact_grad).abs().max() <= 1e-6
