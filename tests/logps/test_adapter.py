"""The head with an adapter: LoRA and DoRA as two small products beside the large one."""

import pytest
import torch
from compare import assert_no_worse
from linear_cases import Watch, random_head

from dpo_ext import TensorError
from dpo_ext.torch import (
    ScoreTable,
    linear_preference_loss,
    linear_sequence_logps,
    linear_token_scores,
    preference_loss,
    sequence_logps,
    token_scores,
)
from dpo_ext.torch.logps import products
from dpo_ext.torch.logps.lowrank import LowRank

K = 3
KINDS = ["lora", "dora"]
TRANSFORMS = [{}, {"softcap": 2.0, "logit_scale": 0.7, "temperature": 1.3}]


def case(seed, kind, dtype=torch.float64, low_dtype=None, **options):
    """Leaves: hidden, weight, bias and the adapter's tensors; and the table."""
    hidden, weight, bias, table = random_head(seed, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    down = torch.randn(K, hidden.shape[1], generator=generator, dtype=torch.float64)
    up = torch.randn(weight.shape[0], K, generator=generator, dtype=torch.float64)
    columns = None
    if kind == "dora":
        columns = 1.5 + 0.5 * torch.randn(len(weight), generator=generator, dtype=torch.float64)
    leaves = [t.to(dtype) for t in (hidden, weight, bias)]
    leaves += [None if t is None else t.to(low_dtype or dtype) for t in (down, up, columns)]
    return leaves, table


def leaves_of(tensors, trained="hwbduc"):
    return [
        None if t is None else t.detach().clone().requires_grad_(name in trained)
        for name, t in zip("hwbduc", tensors, strict=True)
    ]


def logits_of(hidden, weight, bias, down, up, columns):
    z = hidden @ weight.t()
    if columns is not None:
        z = z * columns
    return z + (hidden.to(down.dtype) @ down.t()) @ up.t() + bias


def gradients(value, leaves):
    value.sum().backward()
    return [None if t is None else t.grad for t in leaves]


def assert_same(got, want, atol=1e-9):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=atol, rtol=atol)


@pytest.mark.parametrize(("chunk_rows", "exact_target"), [(2, False), (None, True), (3, True)])
@pytest.mark.parametrize("how", TRANSFORMS, ids=["plain", "transformed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", ["hwbduc", "hduc", "du", "h", "uc", "hc", "wc"])
def test_values_and_gradients_are_those_of_the_logits(kind, how, chunk_rows, trained, exact_target):
    for seed in range(2):
        tensors, table = case(seed, kind, weights=True)
        got, want = leaves_of(tensors, trained), leaves_of(tensors, trained)
        hidden, weight, bias, *low = got
        ours = linear_sequence_logps(
            hidden, weight, table, bias=bias, adapter=LowRank(*low), chunk_rows=chunk_rows,
            exact_target=exact_target, **how,
        )  # fmt: skip
        theirs = sequence_logps(logits_of(*want), table, **how)
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
        if trained == "uc" and kind == "lora" and not ours.requires_grad:
            pytest.fail("no gradient")
        if not theirs.requires_grad:  # columns alone of an adapter that has none
            assert not ours.requires_grad
            continue
        assert_same(gradients(ours, got), gradients(theirs, want))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("trained", "plan"), [("hwbduc", "pairwise"), ("hduc", "pairwise"), ("h", "frozen")])  # fmt: skip
@pytest.mark.parametrize("chunk_rows", [2, None])
def test_a_loss_inside_has_the_gradients_of_the_loss_outside(kind, trained, plan, chunk_rows):
    tensors, table = case(3, kind, S=12)
    ref = torch.randn(table.n_groups, 2, dtype=torch.float64)
    got, want = leaves_of(tensors, trained), leaves_of(tensors, trained)
    hidden, weight, bias, *low = got
    out = linear_preference_loss(
        hidden, weight, table, ref, bias=bias, adapter=LowRank(*low), chunk_rows=chunk_rows
    )
    assert out.plan == plan
    theirs = preference_loss(sequence_logps(logits_of(*want), table), ref)
    torch.testing.assert_close(out.loss, theirs.loss)
    term, beside = 0.1 * out.differentiable_logps[:, 0].sum(), 0.1 * theirs.logps[:, 0].sum()
    first = torch.autograd.grad(out.loss, [t for t in got if t is not None and t.requires_grad], retain_graph=True)  # fmt: skip
    right = torch.autograd.grad(theirs.loss, [t for t in want if t is not None and t.requires_grad], retain_graph=True)  # fmt: skip
    assert_same(first, right)
    if theirs.logps.requires_grad:
        assert_same(gradients(out.loss + term, got), gradients(theirs.loss + beside, want))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low_dtype", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True], ids=["logps", "loss"])
def test_half_width_is_no_worse_than_the_logits_in_half_width(
    monkeypatch, kind, low_dtype, dtype, inside
):
    """Adapters in float32 beside a head in half width, which PEFT makes by itself, too."""
    monkeypatch.setattr(products, "TILE", 5)
    tensors, table = case(5, kind, dtype, low_dtype, H=32, V=33, S=8, longest=4)
    ref = torch.zeros(table.n_groups, 2)
    results = []
    for way in ("ours", "theirs", "oracle"):
        leaves = leaves_of(tensors)
        if way == "oracle":
            leaves = leaves_of([None if t is None else t.double() for t in tensors])
        hidden, weight, bias, *low = leaves
        if way == "ours" and inside:
            value = linear_preference_loss(
                hidden, weight, table, ref, bias=bias, adapter=LowRank(*low), chunk_rows=4
            ).loss
        elif way == "ours":
            value = linear_sequence_logps(
                hidden, weight, table, bias=bias, adapter=LowRank(*low), chunk_rows=4
            )
        else:
            z = logits_of(*leaves).to(hidden.dtype)
            value = sequence_logps(z, table)
            if inside:
                value = preference_loss(value, ref.to(value.dtype)).loss
        results.append([value, *gradients(value, leaves)])
    # as many roundings, in another order; in float32 the loss has more of its own
    eps = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 2)
    for ours, theirs, oracle in zip(*results, strict=True):
        if ours is not None:
            slack = eps * float(oracle.detach().abs().max())
            assert_no_worse(ours.detach(), theirs.detach(), oracle.detach(), slack)


def test_nan_in_rows_that_are_not_scored_reaches_nothing():
    tensors, table = case(2, "dora")
    hidden, weight, bias, *low = leaves_of(tensors)
    spoiled = torch.cat([hidden.detach(), torch.full((1, hidden.shape[1]), torch.nan)])
    spoiled.requires_grad_()
    want = gradients(
        linear_sequence_logps(hidden, weight, table, bias=bias, adapter=LowRank(*low)),
        [weight, *low],
    )
    again = leaves_of(tensors)
    got = linear_sequence_logps(
        spoiled, again[1], table, bias=again[2], adapter=LowRank(*again[3:])
    )
    assert_same(gradients(got, [again[1], *again[3:]]), want)
    assert spoiled.grad.isfinite().all()


def test_nan_in_a_sequence_without_gradient_reaches_nothing():
    tensors, table = case(2, "dora", S=6, longest=4)
    scored = [table.logit_rows[table.seq_offsets[i] : table.seq_offsets[i + 1]] for i in range(6)]
    lost = max(range(6), key=lambda i: len(scored[i]))
    upstream = torch.ones(6, dtype=torch.float64)
    upstream[lost] = 0
    found = []
    for spoil in (0.0, torch.nan):
        leaves = leaves_of(tensors)
        with torch.no_grad():
            leaves[0][scored[lost]] += spoil
        hidden, weight, bias, *low = leaves
        value = linear_sequence_logps(
            hidden, weight, table, bias=bias, adapter=LowRank(*low), chunk_rows=3
        )
        value.backward(upstream.view_as(value))
        found.append([t.grad for t in leaves])
    assert len(scored[lost]) > 1
    assert_same(*found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inside", [False, True], ids=["recompute", "pairwise"])
def test_nothing_larger_than_a_chunk_of_logits_is_made(kind, inside):
    R, H, V, C = 64, 4, 1000, 8
    table = ScoreTable(
        logit_rows=torch.randperm(R),
        targets=torch.randint(0, V, (R,), dtype=torch.int32),
        seq_offsets=torch.arange(0, R + 1, 8, dtype=torch.int32)[: R // 8 + 1],
    )
    hidden = torch.randn(R, H, requires_grad=True)
    weight = torch.randn(V, H)
    low = LowRank(torch.randn(K, H), torch.randn(V, K), torch.rand(V) if kind == "dora" else None)
    for t in low:
        if t is not None:
            t.requires_grad_()
    kept = []
    with (
        Watch() as watch,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        if inside:
            value = linear_preference_loss(
                hidden, weight, table, torch.zeros(4, 2), adapter=low, chunk_rows=C
            )
            assert value.plan == "pairwise"
            value = value.loss
        else:
            value = linear_sequence_logps(hidden, weight, table, adapter=low, chunk_rows=C)
        value.sum().backward()
    assert watch.largest <= C * V
    given = {t.data_ptr() for t in (hidden, weight, *low) if t is not None}
    assert sum(t.numel() for t in kept if t.data_ptr() not in given) <= 8 * R + 64
    assert weight.grad is None
    assert low.up.grad.abs().sum() > 0


def test_statistics_are_those_of_the_adapted_logits():
    tensors, table = case(4, "dora")
    hidden, weight, bias, *low = tensors
    stats = ("entropy", "mean_logit", "is_top1")
    ours = linear_token_scores(
        hidden, weight, table, bias=bias, adapter=LowRank(*low), stats=stats, chunk_rows=2
    )
    theirs = token_scores(logits_of(*tensors), table, stats=stats)
    for name in ("logps", *stats):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


def test_torch_func_differentiates_by_the_adapter():
    tensors, table = case(6, "dora", torch.float32)
    hidden, weight, bias, down, up, columns = tensors

    def ours(up):
        low = LowRank(down, up, columns)
        return linear_sequence_logps(hidden, weight, table, bias=bias, adapter=low).sum()

    def theirs(up):
        return sequence_logps(logits_of(hidden, weight, bias, down, up, columns), table).sum()

    torch.testing.assert_close(torch.func.grad(ours)(up), torch.func.grad(theirs)(up))


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["recompute", "pairwise"])
def test_an_adapter_compiles_to_one_graph(inside):
    torch._dynamo.reset()
    tensors, table = case(7, "dora", torch.float32, S=8)
    ref = torch.zeros(table.n_groups, 2)

    def score(hidden, weight, bias, *low):
        adapter = LowRank(*low)
        if inside:
            return linear_preference_loss(hidden.tanh(), weight, table, ref, bias=bias, adapter=adapter).loss  # fmt: skip
        return linear_sequence_logps(hidden.tanh(), weight, table, bias=bias, adapter=adapter).sum()

    results = []
    for function in (score, torch.compile(score, fullgraph=True, backend="aot_eager")):
        leaves = leaves_of(tensors)
        value = function(*leaves)
        results.append([value, *gradients(value, leaves)])
    assert_same(*results, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down": torch.zeros(2, 5)}, r"`adapter\.down` must be floating-point of shape \(2, 6\)"),
        ({"up": torch.zeros(8, K)}, r"`adapter\.up` must be floating-point of shape \(9, 3\)"),
        ({"columns": torch.zeros(9, 1)}, r"`adapter\.columns` must be"),
        ({"down": torch.zeros(K, 6, dtype=torch.int32)}, r"`adapter\.down` must be floating"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(change, message):
    hidden, weight, _, table = random_head(0, dtype=torch.float32)
    low = LowRank(torch.zeros(K, 6), torch.zeros(9, K))._replace(**change)
    with pytest.raises(TensorError, match=message):
        linear_sequence_logps(hidden, weight, table, adapter=low)


def test_a_trained_adapter_is_not_frozen():
    hidden, weight, _, table = random_head(0, dtype=torch.float32)
    low = LowRank(torch.zeros(K, 6, requires_grad=True), torch.zeros(9, K))
    with pytest.raises(ValueError, match="an adapter without gradient"):
        linear_sequence_logps(hidden, weight, table, adapter=low, plan="frozen")
    with pytest.raises(TypeError, match="`adapter` must be a LowRank, found tuple"):
        linear_sequence_logps(hidden, weight, table, adapter=tuple(low))
    with pytest.raises(TypeError, match=r"`adapter\.down` must be a torch\.Tensor, found"):
        linear_sequence_logps(hidden, weight, table, adapter=LowRank(None, low.up))


@pytest.mark.parametrize("trained", ["h", "hwduc"], ids=["frozen", "pairwise"])
def test_large_columns_leave_the_range_of_float16_in_no_gradient(trained):
    """Gradients of logits are taken to the top of the range, and then multiplied by the columns."""
    tensors, table = case(8, "dora", torch.float16, torch.float32, H=8, V=17, S=8, longest=4)
    hidden, weight, bias, down, up, _ = tensors
    columns = torch.linspace(0.25, 64.0, len(weight))
    tensors = [hidden / 16, weight / 16, bias, down / 16, up / 16, columns]
    ref = torch.zeros(table.n_groups, 2)
    got, want = leaves_of(tensors, trained), leaves_of([t.double() for t in tensors], trained)
    hidden, weight, bias, *low = got
    ours = linear_preference_loss(
        hidden, weight, table, ref, bias=bias, adapter=LowRank(*low), chunk_rows=4
    )
    assert ours.plan == ("frozen" if trained == "h" else "pairwise")
    theirs = preference_loss(sequence_logps(logits_of(*want), table), ref.double())
    for mine, right in zip(gradients(ours.loss, got), gradients(theirs.loss, want), strict=True):
        if mine is not None:
            scale = float(right.abs().max())
            torch.testing.assert_close(mine.double(), right, atol=2e-2 * scale, rtol=2e-2)
