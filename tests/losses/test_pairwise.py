"""Head and loss in one pass: the gradient of the two steps, with fewer products."""

import numpy as np
import pytest
import torch
from linear_cases import EXAMPLES, Watch, random_head
from logps_cases import HOWS, IMPLS, device_of, name_of

from dpo_ext import TensorError
from dpo_ext.torch import (
    ScoreTable,
    linear_preference_loss,
    linear_sequence_logps,
    preference_loss,
)
from dpo_ext.torch.losses.registry import LOSSES
from dpo_ext.torch.pairwise import chunks_of_pairs

OPTIONS = [
    ("dpo", {"beta": 0.7}),
    ("ipo_avg", {"beta": 0.3}),
    ("cdpo", {"beta": 0.5, "label_smoothing": 0.2}),
    ("simpo", {"gamma": 0.5}),
    (["dpo", "ipo_sum"], {"loss_weights": [0.7, 0.3]}),
]


def reference_for(table, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return -5 * torch.rand(table.n_groups, 2, generator=generator, dtype=torch.float64).to(dtype)


def both(
    hidden,
    weight,
    bias,
    table,
    ref,
    plan,
    upstream=1.7,
    impl="auto",
    chunk_rows=None,
    how=None,
    **options,
):
    """(loss, logps, dX, dW, db) by `linear_preference_loss` or, for plan None, in two steps."""
    where = device_of(impl)
    parts = [None if p is None else p.detach().to(where).clone() for p in (hidden, weight, bias)]
    for part in parts:
        if part is not None and not (plan == "frozen" and part is not parts[0]):
            part.requires_grad_()
    x, w, b = parts
    table, ref, how = table.to(where), ref.to(where), how or {}
    if plan is None:
        logps = linear_sequence_logps(x, w, table, bias=b, plan="recompute", impl=impl, **how)
        if "pair_weight" in options:
            options["weight"] = options.pop("pair_weight")
        out = preference_loss(logps, ref.to(logps.dtype), lengths=table.lengths, **options)
    else:
        head = {"plan": plan, "impl": impl, "chunk_rows": chunk_rows, **how}
        out = linear_preference_loss(x, w, table, ref, bias=b, **head, **options)
    (out.loss * upstream).backward()
    grads = [None if p is None or p.grad is None else p.grad.cpu() for p in parts]
    return [out.loss.detach().cpu(), out.logps.cpu(), *grads], out


@pytest.mark.parametrize(
    ("loss", "options"), OPTIONS, ids=lambda v: str(v) if isinstance(v, str) else ""
)
@pytest.mark.parametrize("chunk_rows", [1, 3, 8, None])
@pytest.mark.parametrize("how", HOWS[-1:] + HOWS[:1], ids=name_of)
def test_float64_is_two_steps(loss, options, chunk_rows, how):
    for seed in range(3):
        hidden, weight, bias, table = random_head(seed, S=10, weights=seed == 1, longest=5)
        bias = bias if seed else None
        case = (hidden, weight, bias, table, reference_for(table, seed))
        expected, plain = both(*case, None, loss=loss, how=how, **options)
        got, out = both(*case, "pairwise", chunk_rows=chunk_rows, loss=loss, how=how, **options)
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(out.per_pair, plain.per_pair.detach())
        assert not out.per_pair.requires_grad
        for key, value in plain.metrics.items():
            torch.testing.assert_close(out.metrics[key], value)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_against_recompute(impl, dtype):
    """Same products of the same roundings; dX is kept in the hidden dtype, once more rounded."""
    for seed in range(EXAMPLES):
        hidden, weight, _, table = random_head(seed, S=6, V=33, H=8, dtype=dtype, spread=0.5)
        case = (hidden, weight, None, table, reference_for(table, seed))
        expected, _ = both(*case, None, impl=impl)
        got, _ = both(*case, "pairwise", impl=impl, chunk_rows=[1, 4, None][seed % 3])
        unit = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
        for a, b in zip(got, expected, strict=True):
            if a is not None:
                assert a.dtype == b.dtype
                largest = float(b.abs().max()) if b.numel() else 0.0
                torch.testing.assert_close(a, b, rtol=unit, atol=unit * largest)


def test_per_pair_parameters_weights_and_counts_reach_their_pairs():
    hidden, weight, bias, table = random_head(4, S=12, longest=4)
    N = table.n_groups
    case = (hidden, weight, bias, table, reference_for(table))
    options = {
        "beta": torch.linspace(0.1, 1, N, dtype=torch.float64),
        "pair_weight": torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64),
        "num_pairs": 11,
    }
    expected, _ = both(*case, None, **options)
    got, out = both(*case, "pairwise", chunk_rows=3, **options)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)
    plain, _ = both(*case, "pairwise", chunk_rows=3)
    assert not torch.allclose(plain[2], got[2])
    assert out.metrics["rewards/chosen"].isfinite()


def one_pair_tables(lengths):
    """Rows in order; ``lengths`` of chosen, rejected, chosen, ..."""
    M = sum(lengths)
    return ScoreTable(
        logit_rows=torch.arange(M),
        targets=(torch.arange(M) * 7 % 100).to(torch.int32),
        seq_offsets=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
    )


@pytest.mark.parametrize(
    ("lengths", "chunk_rows", "products"),
    [
        ([4, 4] * 4, 8, 4 * 3),  # 6MHV: logits, dX, dW of each chunk
        ([2, 2] * 8, 8, 4 * 3),  # two pairs to a chunk
        ([12, 12], 8, 3 * 4),  # a pair longer than a chunk: its logits twice
        ([4, 4, 12, 12], 8, 3 + 3 * 4),
    ],
)
def test_products_and_memory_are_those_of_the_plan(lengths, chunk_rows, products):
    H, V = 4, 100
    table = one_pair_tables(lengths)
    hidden = torch.randn(table.n_tokens, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    ref = torch.zeros(table.n_groups, 2)
    with Watch() as watch:
        out = linear_preference_loss(hidden, weight, table, ref, chunk_rows=chunk_rows)
    assert watch.products == products
    assert watch.largest <= max(chunk_rows * V, V * H)
    made = [t.data_ptr() for t in vars(out.loss.grad_fn)["made"] if t is not None]
    with Watch() as watch:
        out.loss.backward()
    assert watch.products == 0
    assert weight.grad.data_ptr() in made  # scaled where it lies and given away
    with torch.no_grad(), Watch() as watch:
        linear_preference_loss(hidden, weight, table, ref, plan="pairwise", chunk_rows=chunk_rows)
    assert watch.products == products // 3 if max(lengths) < 12 else watch.products < products // 2


def test_auto_is_frozen_then_pairwise_then_recompute():
    hidden, weight, _, table = random_head(0, S=4, dtype=torch.float32)
    ref = reference_for(table, dtype=torch.float32)
    x, w = hidden.requires_grad_(), weight.clone().requires_grad_()
    chunks = len(list(chunks_of_pairs(table.host_offsets.tolist(), 1)))

    plans = []

    def products(w, **options):
        with Watch() as watch:
            out = linear_preference_loss(x, w, table, ref, **options)
        forward = watch.products
        plans.append(out.plan)
        with Watch() as watch:
            out.loss.backward()
        return forward, watch.products

    assert products(weight) == (2, 0)  # frozen: logits and E
    assert products(w) == (3, 0)  # pairwise
    assert products(w, plan="recompute") == (1, 2)  # the last chunk's logits are still there
    callable_loss = lambda c, r: (r - c)[:, 0]  # noqa: E731
    assert products(w, loss=callable_loss) == (1, 2)
    assert plans == ["frozen", "pairwise", "recompute", "recompute"]
    assert chunks >= 1


def test_the_upstream_may_come_twice_or_be_a_tensor():
    hidden, weight, _, table = random_head(1, S=4)
    x = hidden.clone().requires_grad_()
    out = linear_preference_loss(x, weight.requires_grad_(), table, reference_for(table))
    (one,) = torch.autograd.grad(out.loss, x, retain_graph=True)
    (two,) = torch.autograd.grad(3.0 * out.loss**2, x)
    torch.testing.assert_close(two, 6.0 * out.loss.item() * one)
    out = linear_preference_loss(x, weight, table, reference_for(table))
    first = torch.autograd.grad(out.loss, (x, weight), retain_graph=True)
    again = torch.autograd.grad(-2.0 * out.loss, (x, weight))
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(b, -2.0 * a)
    out = linear_preference_loss(x, weight, table, reference_for(table))
    (grad,) = torch.autograd.grad(out.loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


def test_float16_gradients_survive_without_a_loss_scale():
    """c is near beta / N = 1e-5: written as it is, c * p would be lost below 6e-8."""
    N, V, H = 1024, 200, 4
    table = one_pair_tables([1, 1] * N)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * N, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) * 0.1
    ref = torch.zeros(N, 2)
    truth, _ = both(
        hidden.double(), weight.double(), None, table, ref, None, upstream=2.0**16, beta=0.01
    )
    half = [p.half() for p in (hidden, weight)]
    got, _ = both(*half, None, table, ref, "pairwise", upstream=2.0**16, beta=0.01)
    for a, b in zip(got[2:4], truth[2:4], strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error < 5e-3


def test_hidden_rows_that_are_not_scored_have_no_influence():
    hidden = torch.randn(4, 4, 6)
    hidden[:, 3] = float("nan")
    weight = torch.randn(5, 6)
    labels = torch.tensor(
        [[-100, 3, 1, 2], [-100, -100, 0, 4], [-100, 3, -100, -100], [-100, 2, 2, 1]]
    )
    got, _ = both(
        hidden,
        weight,
        None,
        ScoreTable.from_labels(labels),
        torch.zeros(2, 2),
        "pairwise",
        chunk_rows=2,
    )
    assert all(part.isfinite().all() for part in got if part is not None)
    assert not got[2][:, 3].any()


def test_nothing_to_score():
    x, w = torch.randn(3, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    for S in (0, 4):
        table = ScoreTable(logit_rows=[], targets=[], seq_offsets=[0] * (S + 1))
        out = linear_preference_loss(x, w, table, torch.zeros(S // 2, 2), plan="pairwise")
        assert out.loss.item() == pytest.approx(np.log(2) if S else 0.0)
        out.loss.backward()
        assert not x.grad.any()
        assert not w.grad.any()


def test_chunks_hold_whole_pairs():
    assert list(chunks_of_pairs([0], 4)) == []
    assert list(chunks_of_pairs([0, 0, 0], 4)) == [slice(0, 1)]
    assert list(chunks_of_pairs([0, 2, 4, 6, 8, 10, 12], 8)) == [slice(0, 2), slice(2, 3)]
    assert list(chunks_of_pairs([0, 9, 18, 19, 20, 21, 22], 4)) == [slice(0, 1), slice(1, 3)]


def test_what_cannot_be_pairwise_is_refused():
    hidden, weight, _, table = random_head(0, S=4, dtype=torch.float32)
    ref = reference_for(table)
    for message, options in (
        ("a callable may look at the whole batch", {"loss": lambda c, r: c[:, 0]}),
        ("`compat` may average", {"compat": "trl-1.16", "loss": "sigmoid"}),
        ("a parameter that needs a gradient", {"beta": torch.ones(2, requires_grad=True)}),
    ):
        with pytest.raises(ValueError, match=message):
            linear_preference_loss(hidden, weight, table, ref, plan="pairwise", **options)
    coupled = next(name for name, row in LOSSES.items() if row.couples_batch)
    with pytest.raises(ValueError, match="couples the pairs"):
        linear_preference_loss(hidden, weight, table, ref, plan="pairwise", loss=coupled)
    with pytest.raises(ValueError, match="`plan` must be one of auto, frozen, pairwise, recompute"):
        linear_preference_loss(hidden, weight, table, ref, plan="best")
    three = ScoreTable(logit_rows=[0], targets=[1], seq_offsets=[0, 1, 1, 1], group_size=3)
    with pytest.raises(TensorError, match="groups of 2"):
        linear_preference_loss(hidden, weight, three, ref)
    with pytest.raises(TensorError, match=r"`ref_logps` must have shape \(2, 2\)"):
        linear_preference_loss(hidden, weight.requires_grad_(), table, ref[:1])
    with pytest.raises(ValueError, match="unknown loss"):
        linear_preference_loss(hidden, weight, table, ref, loss="ddpo")
